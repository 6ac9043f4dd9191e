"""`gptq`: checkpoints of GPTQ (Frantar et al., 2022) in AutoGPTQ's and GPTQModel's format, 4 and 8 bits.

`qweight` int32 [inputs * bits / 32, outputs], several inputs in a word, the first in its lowest bits; `scales`
[groups, outputs]; `qzeros` int32 [groups, outputs * bits / 32], less one in version 1; `g_idx` [inputs], the group of
each input, in no order at all with act-order (desc_act). A weight is (code - zero) * scale.
"""

from __future__ import annotations

from typing import Any

import torch

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.quantization.linear import Code, CodedLinear, pack_nibbles
from textgen_engine.models.quantization.method import StoredLinear, StoredMethod

_WORD_BITS = 32


class Gptq(StoredMethod):
    name = "gptq"

    def __init__(self, settings: dict[str, Any], stored: frozenset[str]) -> None:
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
        group_size = linear.in_features if self._group_size == -1 else self._group_size
        has_index = f"{name}.g_idx" in self._stored
        if linear.in_features % group_size:
            raise ModelLoadError(
                f"quantization_config: group_size {group_size} does not divide the {linear.in_features} inputs of "
                f"{name}"
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
        self._bits, self._group_size, self._zero_shift, self._has_index = bits, group_size, zero_shift, has_index
        num_groups = self.in_features // group_size
        self._expect("qweight", (self.in_features * bits // _WORD_BITS, self.out_features), torch.int32)
        self._expect("qzeros", (num_groups, self.out_features * bits // _WORD_BITS), torch.int32)
        self._expect("scales", (num_groups, self.out_features), torch.float32)
        if has_index:
            self._expect("g_idx", (self.in_features,), torch.int32)

    def finished(self) -> CodedLinear:
        codes = unpack_words(self.qweight.t(), self._bits)  # [outputs, inputs]
        zeros = unpack_words(self.qzeros, self._bits).t() + self._zero_shift  # [outputs, groups]
        order = None
        if self._has_index:
            order = torch.argsort(self.g_idx, stable=True)
            counts = torch.bincount(self.g_idx.long(), minlength=zeros.shape[1])
            if not bool((counts == self._group_size).all()):
                raise ModelLoadError(f"g_idx of a gptq checkpoint: groups are not of {self._group_size} inputs each")
            if torch.equal(order, torch.arange(len(order), device=order.device)):
                order = None
            else:
                codes = codes[:, order]
        return coded_layer(self, codes, zeros, self.scales.t(), self._bits, self._group_size, order)


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

    zeros None: the middle of the codes' range.
    """
    middle = 1 << (bits - 1)
    code = Code.NIBBLE if bits == 4 else Code.INT8
    layer = CodedLinear(
        stored.in_features,
        stored.out_features,
        stored.bias,
        code=code,
        group_size=group_size,
    )
    shift = 0 if bits == 4 else middle  # a signed byte holds code - 128
    zero = torch.tensor(middle) if zeros is None else zeros
    offsets = (shift - zero).float() * scales.float()
    weight = pack_nibbles(codes) if bits == 4 else (codes - middle).to(torch.int8)
    return layer.fill(weight, scales, offsets.expand_as(scales), order)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words] -> unsigned codes, int32 [rows, words * 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, _WORD_BITS, bits, device=words.device, dtype=torch.int32)
    codes = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)
