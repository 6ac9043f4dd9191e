"""`awq`: checkpoints of AWQ (Lin et al., 2023), 4 bits, in AutoAWQ's GEMM packing.

`qweight` int32 [inputs, outputs / 8], eight outputs in a word, interleaved; `qzeros` int32 [groups, outputs / 8],
packed alike; `scales` [groups, outputs]. A weight is (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.quantization.gptq import coded_layer, unpack_words
from textgen_engine.models.quantization.linear import CodedLinear
from textgen_engine.models.quantization.method import StoredLinear, StoredMethod
from textgen_engine.models.quantization.part import Axis, part_of

_BITS = 4
_PER_WORD = 32 // _BITS
_OUTPUT_WORDS = Axis("outputs", _PER_WORD)
# Output i of eight lies in place _PLACES[i] of a word, counted from its lowest bits.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(StoredMethod):
    name = "awq"

    def __init__(self, settings: dict[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
        bits = settings.get("bits", settings.get("w_bit"))
        self._group_size = settings.get("group_size", settings.get("q_group_size", 128))
        version = str(settings.get("version", "gemm")).lower()
        if bits != _BITS:
            raise ModelLoadError(f"quantization_config: awq with {bits} bits is not served; 4 are")
        if version != "gemm":
            raise ModelLoadError(f"quantization_config: awq's packing {version!r} is not served; gemm is")
        self.bytes_per_weight = _BITS / 8 + 8 / max(self._group_size, 32)
        self._stored = stored

    def replacement(self, linear: torch.nn.Linear, name: str) -> StoredLinear | None:
        if f"{name}.qweight" not in self._stored:
            return None
        num_inputs = part_of(linear).num_inputs
        group_size = num_inputs if self._group_size == -1 else self._group_size
        if num_inputs % group_size:
            raise ModelLoadError(
                f"quantization_config: group_size {group_size} does not divide the {num_inputs} inputs of {name}"
            )
        return AwqLinear(linear, group_size)


class AwqLinear(StoredLinear):
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, group_size: int) -> None:
        super().__init__(linear)
        self._groups = Axis("inputs", group_size)
        self._expect("qweight", torch.int32, Axis("inputs"), _OUTPUT_WORDS)
        self._expect("qzeros", torch.int32, self._groups, _OUTPUT_WORDS)
        self._expect("scales", torch.float32, self._groups, Axis("outputs"))

    def finished(self) -> CodedLinear:
        codes, zeros = (
            self.part.held(_in_order(unpack_words(words, _BITS)), 1, _OUTPUT_WORDS).t()
            for words in (self.qweight, self.qzeros)
        )
        size = self.part.group_size(self._groups.per)
        zeros, scales = (self.part.by_group(values, 1, self._groups, size) for values in (zeros, self.scales.t()))
        return coded_layer(self, codes.contiguous(), zeros, scales, _BITS, size)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(codes.shape[0], -1, _PER_WORD)[:, :, list(_PLACES)].reshape(codes.shape)
