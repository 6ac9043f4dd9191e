"""Checkpoints that bitsandbytes has quantized: LLM.int8 and, nested or not, nf4 and fp4.

8 bits: `weight` int8 [outputs, inputs] and `SCB` [outputs], the largest of each output's weights.

4 bits: `weight` uint8 [outputs * inputs / 2, 1], the first of two codes in the high half; `weight.absmax`, the largest
of each block of neighbouring weights; `weight.quant_map`, what the 16 codes mean; and, JSON as bytes,
`weight.quant_state.bitsandbytes__nf4`. Nested, absmax holds codes of its own: `weight.nested_quant_map` says what they
mean, times `weight.nested_absmax` for each 256 of them, plus an offset that stands in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.quantization.linear import KERNEL_MULTIPLE, Code, CodedLinear, pack_nibbles
from textgen_engine.models.quantization.method import StoredLinear, StoredMethod
from textgen_engine.models.quantization.part import Axis
from textgen_engine.parallel.split import CannotSplit

_INT8_MAX = 127.0
_STATE = "weight.quant_state.bitsandbytes__"


class BitsAndBytes(StoredMethod):
    name = "bitsandbytes"

    def __init__(self, settings: dict[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
        self.bytes_per_weight = 0.6 if settings.get("load_in_4bit") else 1.01
        self._stored = stored

    def replacement(self, linear: torch.nn.Linear, name: str) -> StoredLinear | None:
        if f"{name}.SCB" in self._stored:
            return Int8Linear(linear, has_format=f"{name}.weight_format" in self._stored)
        for kind in ("nf4", "fp4"):
            if f"{name}.{_STATE}{kind}" in self._stored:
                return FourBitLinear(linear, name, kind, self._stored)
        return None

    def stored_name(self, name: str) -> str:
        """Attributes have no dots in their names."""
        start, mark, rest = name.rpartition(".weight.")
        return f"{start}.weight_{rest.replace('.', '_')}" if mark else name


class Int8Linear(StoredLinear):
    weight: torch.Tensor
    SCB: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, *, has_format: bool) -> None:
        super().__init__(linear)
        self._expect("weight", torch.int8, Axis("outputs"), Axis("inputs"))
        self._expect("SCB", torch.float32, Axis("outputs"))
        if has_format:
            self._expect("weight_format", torch.uint8)

    def finished(self) -> CodedLinear:
        if int(getattr(self, "weight_format", 0)) != 0:
            raise ModelLoadError("a bitsandbytes checkpoint with weight_format other than row is not served")
        layer = CodedLinear(self.in_features, self.out_features, self.bias, code=Code.INT8, group_size=self.in_features)
        return layer.fill(self.weight, self.SCB[:, None] / _INT8_MAX)


class FourBitLinear(StoredLinear):
    weight: torch.Tensor
    weight_absmax: torch.Tensor
    weight_quant_map: torch.Tensor
    weight_nested_absmax: torch.Tensor
    weight_nested_quant_map: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, name: str, kind: str, stored: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(linear)
        num_weights = self.in_features * self.out_features
        if num_weights != self.part.num_inputs * self.part.num_outputs:
            raise CannotSplit("its weights are stored as bitsandbytes' 4-bit codes")
        found = stored.get(f"{name}.weight")
        if found != (num_weights // 2, 1):
            raise ModelLoadError(
                f"{name}.weight of shape {list(found or ())} is not served: 4-bit codes of {num_weights} weights, two "
                f"in a byte (bnb_4bit_quant_storage uint8), are"
            )
        (num_blocks,) = stored[f"{name}.weight.absmax"]
        self._block_size = num_weights // num_blocks
        if self.in_features % self._block_size or self._block_size % KERNEL_MULTIPLE:
            raise ModelLoadError(
                f"bitsandbytes' blocks of {self._block_size} weights do not divide the {self.in_features} inputs of "
                f"{name}"
            )
        self._state_name = f"weight_quant_state_bitsandbytes__{kind}"
        self._is_nested = f"{name}.weight.nested_absmax" in stored
        self._expect("weight", torch.uint8, num_weights // 2, 1)
        self._expect("weight_absmax", torch.uint8 if self._is_nested else torch.float32, num_blocks)
        self._expect("weight_quant_map", torch.float32, 16)
        self._expect(self._state_name, torch.uint8, *stored[f"{name}.{_STATE}{kind}"])
        if self._is_nested:
            self._expect("weight_nested_absmax", torch.float32, *stored[f"{name}.weight.nested_absmax"])
            self._expect("weight_nested_quant_map", torch.float32, 256)

    def finished(self) -> CodedLinear:
        pairs = torch.cat((self.weight >> 4, self.weight & 15), dim=1)
        layer = CodedLinear(
            self.in_features,
            self.out_features,
            self.bias,
            code=Code.NIBBLE,
            group_size=self._block_size,
            table=self.weight_quant_map.float(),
        )
        codes = pairs.view(self.out_features, self.in_features)
        return layer.fill(pack_nibbles(codes), self._scales().view(self.out_features, -1))

    def _scales(self) -> torch.Tensor:
        if not self._is_nested:
            return self.weight_absmax
        try:
            state = json.loads(bytes(getattr(self, self._state_name).tolist()))
            block_size, offset = int(state["nested_blocksize"]), float(state["nested_offset"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelLoadError(f"quant_state of a bitsandbytes checkpoint cannot be read: {error!r}") from error
        largest = self.weight_nested_absmax.repeat_interleave(block_size)[: len(self.weight_absmax)]
        return self.weight_nested_quant_map[self.weight_absmax.long()] * largest + offset
