"""`compressed-tensors`: the simple ones of its checkpoints, those where all quantized layers follow one scheme.

`float-quantized` (8-bit floats, a scale for each output or for all), `int-quantized` (8-bit integers likewise) and
`pack-quantized` (4 and 8 bits, symmetric, in groups). Activations stay as they are, whatever the scheme says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.quantization.fp8 import Fp8Linear
from textgen_engine.models.quantization.gptq import coded_layer, unpack_words
from textgen_engine.models.quantization.linear import Code, CodedLinear
from textgen_engine.models.quantization.method import StoredLinear, StoredMethod
from textgen_engine.models.quantization.part import Axis, part_of

_FORMATS = ("float-quantized", "int-quantized", "pack-quantized")


class CompressedTensors(StoredMethod):
    name = "compressed-tensors"

    def __init__(self, settings: dict[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
        groups = list((settings.get("config_groups") or {}).values())
        self._format = settings.get("format")
        if len(groups) != 1 or self._format not in _FORMATS:
            raise ModelLoadError(
                f"quantization_config: compressed-tensors of format {self._format!r} with {len(groups)} config_groups "
                f"is not served; one group of {', '.join(_FORMATS)} is"
            )
        weights = groups[0].get("weights") or {}
        given_bits, self._strategy = weights.get("num_bits"), weights.get("strategy")
        self._group_size = weights.get("group_size")
        bits = (4, 8) if self._format == "pack-quantized" else (8,)
        strategies = ("group", "channel") if self._format == "pack-quantized" else ("channel", "tensor")
        if given_bits not in bits or self._strategy not in strategies or not weights.get("symmetric", True):
            raise ModelLoadError(
                f"quantization_config: {self._format} with {given_bits} bits by {self._strategy}, "
                f"{'symmetric' if weights.get('symmetric', True) else 'asymmetric'}, is not served; {bits} bits by "
                f"{' or '.join(strategies)}, symmetric, are"
            )
        assert given_bits is not None
        self._bits = int(given_bits)
        self.bytes_per_weight = self._bits / 8 + 0.1
        self._stored = stored

    def replacement(self, linear: torch.nn.Linear, name: str) -> StoredLinear | None:
        if f"{name}.weight_scale" not in self._stored:
            return None
        if self._format == "float-quantized":
            return Fp8Linear(linear, "weight_scale", self._strategy)
        if self._format == "int-quantized":
            return IntLinear(linear, per_channel=self._strategy == "channel")
        return PackedLinear(linear, self._bits, self._group_size or part_of(linear).num_inputs)


class IntLinear(StoredLinear):
    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, *, per_channel: bool) -> None:
        super().__init__(linear)
        self._expect("weight", torch.int8, Axis("outputs"), Axis("inputs"))
        self._expect("weight_scale", torch.float32, *((Axis("outputs"), 1) if per_channel else (1,)))

    def finished(self) -> CodedLinear:
        layer = CodedLinear(self.in_features, self.out_features, self.bias, code=Code.INT8, group_size=self.in_features)
        return layer.fill(self.weight, self.weight_scale.expand(self.out_features, 1))


class PackedLinear(StoredLinear):
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, bits: int, group_size: int) -> None:
        super().__init__(linear)
        self._bits, self._words, self._groups = bits, Axis("inputs", 32 // bits), Axis("inputs", group_size)
        self._expect("weight_packed", torch.int32, Axis("outputs"), self._words)
        self._expect("weight_scale", torch.float32, Axis("outputs"), self._groups)
        self._expect("weight_shape", torch.int64, 2)

    def finished(self) -> CodedLinear:
        codes = self.part.held(unpack_words(self.weight_packed, self._bits), 1, self._words)
        size = self.part.group_size(self._groups.per)
        return coded_layer(
            self, codes, None, self.part.by_group(self.weight_scale, 1, self._groups, size), self._bits, size
        )
