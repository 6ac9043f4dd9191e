"""Which tokens stay in the draw: temperature, top_k, top_p, typical_p and min_p, in that order.

Sorting a vocabulary costs twenty times what finding its 256 largest logits costs, and the cut nearly always lies
among those. So `candidates` works on the sorted best of each row and says for which rows they were enough; for the
others the caller comes back with more. Rows do not depend on each other, and a row's result does not depend on how
many candidates it was decided on: order is total (ties go to the lower id), and probabilities are summed as integers,
for which the order of a sum does not matter. (Float sums differ between a batch of one and a batch of two.)

Keeps no state. The order is TGI's and transformers', with min_p, which TGI lacks, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.rows import RowSet
from textgen_engine.transfer import to_device

_UNIT = 2.0**40  # one, as a fixed-point mass; 2**22 tokens of mass one still fit into an int64
_LEAST_Z = -80.0  # its mass is zero in fixed point, and exp stays clear of slow subnormal numbers
_LEAST_TEMPERATURE = 1e-6  # below it the most likely token wins anyway, and float32 would overflow
_FLOAT32 = torch.finfo(torch.float32)
# More are sorted faster than searched for.
_MOST_SEARCHED = 1024


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of `n` rows.

    temperature: [n, 1] float64. top_k: [n, 1] int64, vocab_size where off. top_p, typical_p: [n, 1] float64, 1.0 is
    off. log_min_p: [n, 1] float64, -inf is off. The flags say whether any row uses the filter.
    """

    vocab_size: int
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    typical_p: Tensor
    log_min_p: Tensor
    any_top_p: bool
    any_typical_p: bool
    any_min_p: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Filters:
        """The filters of rows with these parameters."""
        top_ks = [min(one.top_k, vocab_size) or vocab_size for one in params]
        return cls(
            vocab_size=vocab_size,
            temperature=temperature_column(params, device),
            top_k=to_device(top_ks, device, torch.int64)[:, None],
            top_p=_column([one.top_p for one in params], device),
            typical_p=_column([one.typical_p for one in params], device),
            log_min_p=_column([np.log(one.min_p) if one.min_p > 0.0 else -np.inf for one in params], device),
            any_top_p=any(one.top_p < 1.0 for one in params),
            any_typical_p=any(one.typical_p < 1.0 for one in params),
            any_min_p=any(one.min_p > 0.0 for one in params),
        )

    def rows(self, index: Tensor) -> Filters:
        """The same for some of the rows; index [m] int64."""
        return Filters(
            vocab_size=self.vocab_size,
            temperature=self.temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            typical_p=self.typical_p[index],
            log_min_p=self.log_min_p[index],
            any_top_p=self.any_top_p,
            any_typical_p=self.any_typical_p,
            any_min_p=self.any_min_p,
        )


@dataclass(frozen=True, slots=True)
class Mass:
    """Sums over a row's whole vocabulary, in units of 2**-40. Each [n, 1] int64; zero where no filter needs them.

    total: of exp(z). moment: of z * exp(z). z is (logit - largest) / temperature.
    """

    total: Tensor
    moment: Tensor

    def rows(self, index: Tensor) -> Mass:
        """The same for some of the rows; index [m] int64."""
        return Mass(self.total[index], self.moment[index])


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best tokens of each row, most likely first.

    ids: [n, m] int64. scaled: [n, m] float64, z where the token stays in the draw, -inf where a filter took it out.
    decided: [n] bool, whether no token beyond these can be in the draw; always so when m is the vocabulary.
    """

    ids: Tensor
    scaled: Tensor
    decided: Tensor


def cuts(params: SamplingParams, vocab_size: int) -> bool:
    """Whether a request that samples takes any token out of the draw."""
    return 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.typical_p < 1.0 or params.min_p > 0.0


def needs_mass(params: SamplingParams, vocab_size: int) -> bool:
    """Whether a filter relates to the whole vocabulary: top_p and typical_p do, unless top_k has cut it before."""
    return not 0 < params.top_k < vocab_size and min(params.top_p, params.typical_p) < 1.0


def temperature_column(params: Sequence[SamplingParams], device: torch.device) -> Tensor:
    """-> [n, 1] float64."""
    return _column([max(one.temperature, _LEAST_TEMPERATURE) for one in params], device)


def largest_finite(logits: Tensor) -> Tensor:
    """The largest logit of each row [n, 1], finite even where all are -inf, so that no difference becomes NaN."""
    return logits.amax(-1, keepdim=True).clamp(_FLOAT32.min, _FLOAT32.max)


def weigh(logits: Tensor, filters: Filters, needing: RowSet) -> Mass:
    """The masses of whole rows, for the rows `needing` them. logits: [n, vocab] float32."""
    total = torch.zeros((logits.shape[0], 1), dtype=torch.int64, device=logits.device)
    moment = torch.zeros_like(total)
    if needing:
        part = needing.take(logits)
        z = _scale(part, largest_finite(part), needing.take(filters.temperature))
        total[needing.index] = _masses(z).sum(-1, keepdim=True)
        if filters.any_typical_p:
            moment[needing.index] = _moments(z).sum(-1, keepdim=True)
    return Mass(total, moment)


def candidates(
    logits: Tensor, filters: Filters, mass: Mass, count: int, kernels: CpuKernels | None = None
) -> Candidates:
    """Filter the `count` most likely tokens of each row. logits: [n, vocab] float32; mass: from `weigh`."""
    find = largest if kernels is None or count > _MOST_SEARCHED else kernels.largest
    values, ids = find(logits, count)  # [n, count]
    top = values[:, :1].clamp(_FLOAT32.min, _FLOAT32.max)
    z = _scale(values, top, filters.temperature)
    keep, decided = _cut(z, ~torch.isneginf(values), filters, mass)
    scaled = (values.to(torch.float64) - top.to(torch.float64)) / filters.temperature
    return Candidates(ids, scaled.masked_fill_(~keep, -torch.inf), decided)


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, in order, ties by lower id. [n, vocab] float32 -> values, ids [n, count].

    Value and id together make one integer, so that no two are equal: the only way to an exact order, and on a CPU
    faster than torch's float comparison.
    """
    vocab_size = logits.shape[1]
    bits = (logits + 0.0).view(torch.int32)  # adding 0.0 turns -0.0 into 0.0
    flips = torch.bitwise_right_shift(bits, 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.bitwise_xor_(flips).to(torch.int64)  # order of the integers = order of the floats
    keys.bitwise_left_shift_(32).sub_(torch.arange(vocab_size, device=logits.device))
    ids = keys.topk(count, dim=-1).indices if count < vocab_size else keys.sort(dim=-1, descending=True).indices
    return logits.gather(1, ids), ids


def _scale(logits: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """z = (logit - largest) / temperature in float32, between -80 and 0. [n, m], [n, 1], [n, 1] -> [n, m]."""
    return torch.sub(logits, top).div_(temperature.to(torch.float32)).clamp_(min=_LEAST_Z, max=0.0)


def _masses(z: Tensor) -> Tensor:
    """exp(z) in fixed point, int64."""
    return z.exp().mul_(_UNIT).to(torch.int64)


def _moments(z: Tensor) -> Tensor:
    """z * exp(z) in fixed point, int64."""
    return z.exp().mul_(z).mul_(_UNIT).to(torch.int64)


def _cut(z: Tensor, allowed: Tensor, filters: Filters, mass: Mass) -> tuple[Tensor, Tensor]:
    """Apply the filters to the `m` most likely tokens of each row. -> keep [n, m] bool, decided [n] bool.

    z: [n, m] float32, descending. allowed: [n, m] bool, False for forbidden tokens (logit -inf).
    mass: of the whole rows, needed where top_k is off and top_p or typical_p is on.
    Where `decided`, no token beyond the m candidates can belong to the draw and `keep` is final; always so when
    m == vocab_size. At least one allowed token is kept.

    - top_k keeps exactly k; TGI keeps all that tie with the k-th.
    - top_p (Holtzman et al. 2020): a token stays while the mass of the tokens before it is below p.
    - typical_p (Meister et al. 2023): the tokens whose surprise is nearest the entropy H, up to mass p. With
      p_i = exp(z_i) / Z, surprise - H = E[z] - z_i, so the distance is |z_i - E[z]|. Ties at the border stay.
    - min_p (Nguyen et al. 2024): tokens at least min_p times as likely as the most likely of those left.
    top_p, typical_p and min_p agree with transformers' processors of those names.
    """
    width, vocab_size = z.shape[1], filters.vocab_size
    keep = allowed & (torch.arange(width, device=z.device) < filters.top_k)
    has_top_k = filters.top_k < vocab_size  # [n, 1]
    known = (filters.top_k <= width) | ~has_top_k | (width == vocab_size)  # the sums below are known
    closed = (filters.top_k <= width) | (width == vocab_size)  # no token beyond the candidates is left

    mass_here = _masses(z) * keep
    total = torch.where(has_top_k | (width == vocab_size), mass_here.sum(-1, keepdim=True), mass.total)
    if filters.any_top_p:
        wanted = total.to(torch.float64) * filters.top_p
        sums = mass_here.cumsum(-1)
        off = filters.top_p >= 1.0
        keep &= ((sums - mass_here).to(torch.float64) < wanted) | off
        closed |= known & ~off & (sums[:, -1:].to(torch.float64) >= wanted)
        known = closed | (known & off)
        mass_here *= keep
        total = torch.where(closed, mass_here.sum(-1, keepdim=True), total)
    failed = torch.zeros_like(closed)
    if filters.any_typical_p:
        off = filters.typical_p >= 1.0
        moment = torch.where(closed, (_moments(z) * keep).sum(-1, keepdim=True), mass.moment)
        mean = moment.to(torch.float64) / total.clamp(min=1).to(torch.float64)
        distance = (z.to(torch.float64) - mean).abs_().masked_fill_(~keep, torch.inf)
        nearest, order = distance.sort(-1)
        wanted = total.to(torch.float64) * filters.typical_p
        below = mass_here.gather(1, order).cumsum(-1).to(torch.float64) < wanted  # [n, m], a prefix
        reached = ~below[:, -1:]
        limit = nearest.gather(1, below.sum(-1, keepdim=True).clamp_(max=width - 1))
        keep &= (distance <= limit) | off
        closed |= known & ~off & reached & (limit < mean - z[:, -1:].to(torch.float64))
        failed = ~off & ~closed
    if filters.any_min_p:
        z64 = z.to(torch.float64)
        least = z64.masked_fill(~keep, -torch.inf).amax(-1, keepdim=True) + filters.log_min_p
        keep &= z64 >= least
        closed |= (known | ~has_top_k) & (z64[:, -1:] < least)
    return keep, (closed & ~failed)[:, 0]


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return to_device(values, device, torch.float64)[:, None]
