"""`gptq`: checkpoints of GPTQ (Frantar et al., 2022) in AutoGPTQ's and GPTQModel's format, 4 and 8 bits.

`qweight` int32 [inputs * bits / 32, outputs], several inputs in a word, the first in its lowest bits; `scales`
[groups, outputs]; `qzeros` int32 [groups, outputs * bits / 32], less one in version 1; `g_idx` [inputs], the group of
each input, in no order at all with act-order (desc_act). A weight is (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.quantization.linear import KERNEL_MULTIPLE, Code, CodedLinear, pack_nibbles
from textgen_engine.models.quantization.method import StoredLinear, StoredMethod
from textgen_engine.models.quantization.part import Axis, part_of

_WORD_BITS = 32


class Gptq(StoredMethod):
    name = "gptq"

    def __init__(self, settings: dict[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
        bits = settings.get("bits")
        form = settings.get("checkpoint_format") or "gptq"
        if bits not in (4, 8):
            raise ModelLoadError(f"quantization_config: gptq with {bits} bits is not served; 4 and 8 are")
        if form not in ("gptq", "gptq_v2"):
            raise ModelLoadError(
                f"quantization_config: gptq's checkpoint_format {form!r} is not served; gptq and gptq_v2 are"
            )
        self._bits, self._group_size = int(bits), int(settings.get("group_size", -1))
        self._zero_shift = 1 if form == "gptq" else 0
        self.bytes_per_weight = self._bits / 8 + 8 / max(self._group_size, 32)
        self._stored = stored

    def replacement(self, linear: torch.nn.Linear, name: str) -> StoredLinear | None:
        if f"{name}.qweight" not in self._stored:
            return None
        num_inputs = part_of(linear).num_inputs
        group_size = num_inputs if self._group_size == -1 else self._group_size
        has_index = f"{name}.g_idx" in self._stored
        if num_inputs % group_size:
            raise ModelLoadError(
                f"quantization_config: group_size {group_size} does not divide the {num_inputs} inputs of {name}"
            )
        return GptqLinear(linear, self._bits, group_size, self._zero_shift, has_index=has_index)


class GptqLinear(StoredLinear):
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    def __init__(
        self, linear: torch.nn.Linear, bits: int, group_size: int, zero_shift: int, *, has_index: bool
    ) -> None:
        super().__init__(linear)
        self._bits, self._zero_shift, self._has_index = bits, zero_shift, has_index
        per_word = _WORD_BITS // bits
        self._input_words, self._output_words = Axis("inputs", per_word), Axis("outputs", per_word)
        self._groups = Axis("inputs", group_size)
        # With an index the inputs of a part may belong to any group.
        groups = self.part.num_inputs // group_size if has_index else self._groups
        self._expect("qweight", torch.int32, self._input_words, Axis("outputs"))
        self._expect("qzeros", torch.int32, groups, self._output_words)
        self._expect("scales", torch.float32, groups, Axis("outputs"))
        if has_index:
            self._expect("g_idx", torch.int32, Axis("inputs"))

    def finished(self) -> CodedLinear:
        codes = self.part.held(unpack_words(self.qweight.t(), self._bits), 1, self._input_words)  # [outputs, inputs]
        zeros = self.part.held(unpack_words(self.qzeros, self._bits), 1, self._output_words).t() + self._zero_shift
        scales = self.scales.t()  # [outputs, groups], as are zeros
        group_size, order = self.part.group_size(self._groups.per), None
        if not self._has_index:
            zeros, scales = (self.part.by_group(values, 1, self._groups, group_size) for values in (zeros, scales))
            return coded_layer(self, codes, zeros, scales, self._bits, group_size)
        groups = self.g_idx.long().cpu()
        counts = torch.bincount(groups, minlength=zeros.shape[1])
        is_whole = self.in_features == self.part.num_inputs
        if len(counts) > zeros.shape[1] or (is_whole and not bool((counts == self._groups.per).all())):
            raise ModelLoadError(f"g_idx of a gptq checkpoint: groups are not of {self._groups.per} inputs each")
        if bool((groups.diff() >= 0).all()) and not bool((counts[groups[::group_size]] % group_size).any()):
            used = groups[::group_size]  # in order: neighbours share a group
        elif is_whole:
            order, used = torch.argsort(groups, stable=True), torch.arange(zeros.shape[1])
        else:
            group_size = KERNEL_MULTIPLE
            order, used = _with_gaps(groups, counts, group_size)
            codes = functional.pad(codes, (0, 1))
        if order is not None:
            order = order.to(codes.device)
            codes = codes[:, order]
        return coded_layer(self, codes, zeros[:, used], scales[:, used], self._bits, group_size, order)


def _with_gaps(groups: torch.Tensor, counts: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An order in which inputs of one group stand together and every group fills whole runs of `size`, its last places
    naming the input behind the last, which is none; and the group of each run.

    groups [inputs], counts: how many inputs each group has here.
    """
    runs = -(-counts // size)
    first_place = (runs.cumsum(0) - runs) * size
    by_group = torch.argsort(groups, stable=True)
    first_member = counts.cumsum(0) - counts
    own_groups = groups[by_group]
    places = first_place[own_groups] + torch.arange(len(groups)) - first_member[own_groups]
    order = torch.full((int(runs.sum()) * size,), len(groups))
    order[places] = by_group
    return order, torch.arange(len(counts)).repeat_interleave(runs)


def coded_layer(
    stored: StoredLinear,
    codes: torch.Tensor,
    zeros: torch.Tensor | None,
    scales: torch.Tensor,
    bits: int,
    group_size: int,
    order: torch.Tensor | None = None,
) -> CodedLinear:
    """Unsigned codes [outputs, inputs] with zeros and scales [outputs, groups]: a weight is (code - zero) * scale.

    zeros None: the middle of the codes' range. order: see CodedLinear.
    """
    middle = 1 << (bits - 1)
    code = Code.NIBBLE if bits == 4 and codes.shape[1] % KERNEL_MULTIPLE == 0 else Code.INT8
    layer = CodedLinear(
        stored.in_features,
        stored.out_features,
        stored.bias,
        code=code,
        group_size=group_size,
    )
    shift = 0 if code is Code.NIBBLE else middle  # a signed byte holds the code less the middle
    zero = torch.tensor(middle) if zeros is None else zeros
    offsets = (shift - zero).float() * scales.float()
    weight = pack_nibbles(codes) if code is Code.NIBBLE else (codes - middle).to(torch.int8)
    return layer.fill(weight, scales, offsets.expand_as(scales), order)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words] -> unsigned codes, int32 [rows, words * 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, _WORD_BITS, bits, device=words.device, dtype=torch.int32)
    codes = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)
