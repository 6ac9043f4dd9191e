"""`Sampler`: one row of logits per sequence in, one token id per row out. Batched tensors on the model's device.

Owns the order of the steps, the split of a batch by how rows are chosen, and the reported log-probabilities. Per
slot it keeps the request's parameters and, through `Penalties`, what was produced. Knows no text, no request object,
and nothing of grammars but a bit mask.

    logits ─ additions, bans ─ watermark ─ penalties ─ grammar mask ─┬─ greedy rows: argmax
      │            (penalties.py)                       (masks.py)   ├─ free rows: temperature, race over all ids
      │                                                              └─ cut rows: temperature, top_k, top_p, typical_p,
      └─ log_softmax of the raw logits, for reporting                               min_p, race over what is left

- A row's result depends on its own logits, parameters, seed, choice and position only: never on its slot, its
  neighbours, their number, or the padding of the vocabulary.
- The order is TGI's, with what TGI lacks placed where it does no harm: additions first, min_p last. Unlike TGI,
  reported log-probabilities are those of the model (OpenAI's and vLLM's default), before any of these steps.
- No host synchronization, with one exception: when a row filters by top_p, typical_p or min_p without a top_k, the
  rows are read back for which the 256 best candidates were not enough (see filters.py); most often there are none.
- A row whose every token is forbidden gets token id 0, and `exhausted` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.kernels.sampling import sampling_kernels
from textgen_engine.sampling import randomness
from textgen_engine.sampling.filters import (
    Filters,
    candidates,
    cuts,
    largest,
    largest_finite,
    needs_mass,
    temperature_column,
    weigh,
)
from textgen_engine.sampling.masks import GrammarRows, MaskApplier
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.penalties import Penalties, PenaltyPlan
from textgen_engine.sampling.rows import RowSet
from textgen_engine.transfer import to_device

__all__ = ["GrammarRows", "PromptLogprobs", "SampledTokens", "Sampler", "prompt_logprobs"]

_NUM_CANDIDATES = 256  # covers nearly every nucleus
_MAX_TOP_K = 1024  # a larger top_k does not make every row of its batch carry that many candidates
_MORE_CANDIDATES = 4096  # second try for the rows that need it; what is still open is sorted whole
_NUM_FINALISTS = 8  # of the float32 race over all ids; the float64 race among them decides


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The tokens chosen by one call, on the sampler's device, row by row.

    token_ids: [num_rows] int64. logprobs: [num_rows] float32, of the chosen tokens; 0 in rows that did not ask;
    None when no row asked. top_ids int64, top_logprobs float32: [num_rows, most asked for], best first, ties by lower
    id; a row that asked for n has them in its first n columns, the rest is meaningless; None when no row asked.
    exhausted: [num_rows] bool, rows in which every token was forbidden; None when no row could be.
    """

    token_ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None
    exhausted: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of given tokens. logprobs: [n] float32; top_*: [n, top_n] as in SampledTokens, or None."""

    logprobs: Tensor
    top_ids: Tensor | None
    top_logprobs: Tensor | None


@dataclass(frozen=True, slots=True)
class _Slot:
    params: SamplingParams
    stream_key: int
    want_logprobs: bool
    top_n_tokens: int


@dataclass(frozen=True, slots=True)
class _CutPlan:
    """The rows with a filter. weighed: which of them need their whole mass, counted among these rows.

    widths: how many candidates to try, ever more; the last is sure to be enough.
    """

    rows: RowSet
    filters: Filters
    weighed: RowSet
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """All tensors of one batch that stay the same from step to step."""

    slots: tuple[int, ...]
    penalties: PenaltyPlan
    stream_keys: NDArray[np.uint64]  # [num_rows] uint64
    sampled: bool
    greedy: RowSet
    free: RowSet
    free_temperature: Tensor  # [n, 1] float64
    cut: _CutPlan
    reported: RowSet
    top_n: int


class Sampler:
    """Chooses tokens for sequences that live in numbered slots. Not thread safe; the engine's thread owns it."""

    def __init__(
        self,
        *,
        vocab_size: int,
        num_slots: int,
        device: torch.device,
        watermark_gamma: float = 0.5,
        watermark_delta: float = 2.0,
        cpu_kernels: CpuKernels | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._cpu_kernels = cpu_kernels
        self._num_slots = num_slots
        self._device = device
        self._id_hashes = randomness.hashed_ids(vocab_size, device)  # [vocab_size] int32
        self._penalties = Penalties(
            vocab_size=vocab_size,
            device=device,
            watermark_gamma=watermark_gamma,
            watermark_delta=watermark_delta,
            id_hashes=self._id_hashes,
        )
        self._masks = MaskApplier(device, cpu_kernels)
        self._kernels = sampling_kernels(device)
        self._slots: dict[int, _Slot] = {}
        self._plan: _Plan | None = None

    def add(
        self,
        slot: int,
        params: SamplingParams,
        *,
        choice: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        suppressed_ids: Sequence[int] = (),
        suppressed_until: int = 0,
        want_logprobs: bool = False,
        top_n_tokens: int = 0,
    ) -> None:
        """Put one choice of a request into a free slot.

        output_ids: tokens it has already produced (it was preempted); its future is the same as if never removed.
        suppressed_ids: may not be produced at positions below `suppressed_until` (end tokens under min_new_tokens).
        want_logprobs, top_n_tokens: report the chosen token's log-probability, and the n most likely tokens.
        """
        if not 0 <= slot < self._num_slots:
            raise ValueError(f"slot must be between 0 and {self._num_slots - 1}; given: {slot}")
        if slot in self._slots:
            raise ValueError(f"slot {slot} is taken")
        if params.do_sample and params.seed is None:
            raise ValueError("sampling needs a seed")
        self._penalties.add(
            slot,
            params,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            suppressed_ids=suppressed_ids,
            suppressed_until=suppressed_until,
        )
        self._slots[slot] = _Slot(
            params=params,
            stream_key=randomness.stream_key(params.seed or 0, choice),
            want_logprobs=want_logprobs or top_n_tokens > 0,
            top_n_tokens=min(top_n_tokens, self._vocab_size),
        )
        self._plan = None

    def remove(self, slot: int) -> None:
        """Free the slot and forget what it produced."""
        del self._slots[slot]
        self._penalties.remove(slot)
        self._plan = None

    def sample(
        self,
        logits: Tensor,
        slots: Sequence[int],
        positions: Sequence[int],
        bitmask: GrammarRows | None = None,
    ) -> SampledTokens:
        """Choose one token per row and count it into the row's history.

        logits: [num_rows, at least vocab_size] float, left unchanged. slots: the slot of each row, each at most once.
        positions: how many tokens that choice has produced before (the counter of its randomness).
        """
        plan = self._plan_for(slots)
        host_positions = np.asarray(positions, dtype=np.int64)
        raw = logits[:, : self._vocab_size].to(torch.float32)
        masked = bitmask is not None and bitmask.row_ids.numel() > 0
        edited = raw
        if plan.penalties.edited or masked:
            edited = raw.clone(memory_format=torch.contiguous_format)
            self._penalties.apply(edited, plan.penalties, host_positions)
            if bitmask is not None:
                self._masks.apply(edited, bitmask)

        token_ids = self._choose(edited, plan, host_positions)
        exhausted = None
        if plan.penalties.edited or masked:
            exhausted = torch.isneginf(edited.gather(1, token_ids[:, None])[:, 0])
            token_ids = token_ids.masked_fill(exhausted, 0)
        self._penalties.count(plan.penalties, token_ids)
        return self._report(raw, token_ids, exhausted, plan)

    def _plan_for(self, slots: Sequence[int]) -> _Plan:
        """The plan of the last call if the batch is the same, else a new one."""
        key = tuple(slots)
        if self._plan is None or self._plan.slots != key:
            self._plan = self._make_plan(key)
        return self._plan

    def _make_plan(self, slots: tuple[int, ...]) -> _Plan:
        if len(set(slots)) != len(slots):
            raise ValueError(f"a slot appears twice in {slots}")
        entries = [self._slots[slot] for slot in slots]
        greedy, free, filtered, reported = [], [], [], []
        for row, entry in enumerate(entries):
            if not entry.params.do_sample or entry.params.top_k == 1:
                greedy.append(row)
            elif cuts(entry.params, self._vocab_size):
                filtered.append(row)
            else:
                free.append(row)
            if entry.want_logprobs:
                reported.append(row)
        return _Plan(
            slots=slots,
            penalties=self._penalties.plan(slots),
            stream_keys=np.array([entry.stream_key for entry in entries], dtype=np.uint64),
            sampled=bool(free or filtered),
            greedy=RowSet(greedy, len(slots), self._device),
            free=RowSet(free, len(slots), self._device),
            free_temperature=temperature_column([entries[row].params for row in free], self._device),
            cut=self._plan_cut(filtered, [entries[row].params for row in filtered], len(slots)),
            reported=RowSet(reported, len(slots), self._device),
            top_n=max((entry.top_n_tokens for entry in entries), default=0),
        )

    def _plan_cut(self, rows: Sequence[int], params: Sequence[SamplingParams], num_rows: int) -> _CutPlan:
        top_ks = [min(one.top_k, self._vocab_size) or self._vocab_size for one in params]
        width = _NUM_CANDIDATES
        while width < max((k for k in top_ks if k <= _MAX_TOP_K), default=0):
            width *= 2
        widths = [width] if all(k <= width for k in top_ks) else [width, _MORE_CANDIDATES, self._vocab_size]
        return _CutPlan(
            rows=RowSet(rows, num_rows, self._device),
            filters=Filters.of(params, self._vocab_size, self._device),
            weighed=RowSet(
                [i for i, one in enumerate(params) if needs_mass(one, self._vocab_size)], len(params), self._device
            ),
            widths=tuple(sorted({min(width, self._vocab_size) for width in widths})),
        )

    def _choose(self, logits: Tensor, plan: _Plan, positions: NDArray[np.int64]) -> Tensor:
        """One id per row of the edited logits. -> [num_rows] int64."""
        if not plan.sampled:
            return logits.argmax(-1)
        keys = to_device(torch.from_numpy(randomness.row_keys(plan.stream_keys, positions)), self._device)  # [n, 2]
        token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=self._device)
        if plan.greedy:
            token_ids[plan.greedy.index] = plan.greedy.take(logits).argmax(-1)
        if plan.free:
            chosen = self._choose_free(plan.free.take(logits), plan.free_temperature, plan.free.take(keys))
            token_ids[plan.free.index] = chosen
        if plan.cut.rows:
            chosen = self._choose_cut(plan.cut.rows.take(logits), plan.cut, plan.cut.rows.take(keys))
            token_ids[plan.cut.rows.index] = chosen
        return token_ids

    def _choose_free(self, logits: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
        """A race over the whole vocabulary: sifted in float32, decided in float64. [n, vocab] -> [n]."""
        top = largest_finite(logits)
        count = min(_NUM_FINALISTS, self._vocab_size)
        if self._cpu_kernels is not None:
            ids = self._cpu_kernels.finalists(logits, top, temperature, self._id_hashes, keys, count)
        else:
            if self._kernels is not None:
                scores = self._kernels.race_scores(logits, top, temperature, self._id_hashes, keys)
            else:
                scores = randomness.gumbel_noise(randomness.noise_bits(self._id_hashes, keys), torch.float32)
                scores += torch.sub(logits, top).div_(temperature.to(torch.float32))
            ids = scores.topk(count, dim=-1).indices  # [n, finalists]
        scaled = (logits.gather(1, ids).to(torch.float64) - top.to(torch.float64)) / temperature
        return self._race(ids, scaled, keys)

    def _choose_cut(self, logits: Tensor, plan: _CutPlan, keys: Tensor) -> Tensor:
        """A race among what the filters leave of the best candidates; of more of them for the rows that need it."""
        mass = weigh(logits, plan.filters, plan.weighed)
        found = candidates(logits, plan.filters, mass, plan.widths[0], self._cpu_kernels)
        token_ids = self._race(found.ids, found.scaled, keys)
        if len(plan.widths) == 1:
            return token_ids
        open_rows = (~found.decided).nonzero()[:, 0]  # the host synchronization
        for width in plan.widths[1:]:
            if open_rows.numel() == 0:
                break
            found = candidates(
                logits[open_rows], plan.filters.rows(open_rows), mass.rows(open_rows), width, self._cpu_kernels
            )
            token_ids[open_rows] = self._race(found.ids, found.scaled, keys[open_rows])
            open_rows = open_rows[~found.decided]
        return token_ids

    def _race(self, ids: Tensor, scaled: Tensor, keys: Tensor) -> Tensor:
        """The winning id of each row. ids: [n, m] int64; scaled: [n, m] float64; keys: [n, 2] -> [n] int64."""
        columns = randomness.race(scaled, self._id_hashes[ids], keys)
        return ids.gather(1, columns[:, None])[:, 0]

    def _report(self, raw: Tensor, token_ids: Tensor, exhausted: Tensor | None, plan: _Plan) -> SampledTokens:
        if not plan.reported:
            return SampledTokens(token_ids, exhausted=exhausted)
        found = prompt_logprobs(plan.reported.take(raw), plan.reported.take(token_ids), plan.top_n)

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None or len(plan.reported) == len(token_ids):
                return values
            return values.new_zeros((len(token_ids), *values.shape[1:])).index_copy_(0, plan.reported.index, values)

        logprobs, top_ids, top_logprobs = spread(found.logprobs), spread(found.top_ids), spread(found.top_logprobs)
        return SampledTokens(token_ids, logprobs, top_ids, top_logprobs, exhausted)


def prompt_logprobs(logits: Tensor, target_ids: Tensor, top_n: int) -> PromptLogprobs:
    """Log-softmax of unedited logits [n, vocab_size] float32 at target_ids [n] int64, and the top_n best of each row.

    Give the vocabulary's columns only: padding would count into the sum. Rows are independent, so a long prompt may
    come in chunks. The best are exactly top_n, ties by lower id (TGI reports more on ties).
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, target_ids[:, None])[:, 0]
    if top_n == 0:
        return PromptLogprobs(chosen, None, None)
    _, top_ids = largest(logits, top_n)
    return PromptLogprobs(chosen, top_ids, logprobs.gather(1, top_ids))
