"""`fp8`: weights as float8_e4m3fn. At load, one scale for each output; in checkpoints, one for each block of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.quantization.linear import Code, CodedLinear
from textgen_engine.models.quantization.method import LoadMethod, StoredLinear, StoredMethod
from textgen_engine.models.quantization.part import Axis

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8AtLoad(LoadMethod):
    name = "fp8"
    bytes_per_weight = 1.01

    def replacement(self, linear: torch.nn.Linear, name: str) -> CodedLinear:
        return CodedLinear(
            linear.in_features, linear.out_features, linear.bias, code=Code.FLOAT8, group_size=linear.in_features
        )

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scales = (weight.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        return {"weight": (weight / scales).to(torch.float8_e4m3fn), "scales": scales}


class Fp8Checkpoint(StoredMethod):
    """`quant_method: fp8`, as DeepSeek's and Qwen's: `weight` with `weight_scale_inv`, by blocks or whole."""

    name = "fp8"
    bytes_per_weight = 1.01

    def __init__(self, settings: dict[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
        self._block = settings.get("weight_block_size")
        if self._block is not None and len(self._block) != 2:
            raise ModelLoadError(f"quantization_config: weight_block_size must be two numbers; given: {self._block}")
        self._stored = stored

    def replacement(self, linear: torch.nn.Linear, name: str) -> StoredLinear | None:
        if f"{name}.weight_scale_inv" not in self._stored:
            return None
        return Fp8Linear(linear, "weight_scale_inv", self._block)


class Fp8Linear(StoredLinear):
    """scales_name: the tensor that float8 weights are multiplied by: one number, one for each output, or one for each
    block [outputs, inputs] of weights."""

    weight: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, scales_name: str, block: list[int] | str | None) -> None:
        super().__init__(linear)
        self._scales_name, self._block = scales_name, block
        self._expect("weight", torch.float8_e4m3fn, Axis("outputs"), Axis("inputs"))
        if block is None:
            axes: tuple[Axis | int, ...] = ()
        elif block == "channel":
            axes = (Axis("outputs"), 1)
        elif block == "tensor":
            axes = (1,)
        else:
            axes = (Axis("outputs", int(block[0])), Axis("inputs", int(block[1])))
        self._expect(scales_name, torch.float32, *axes)

    def finished(self) -> CodedLinear:
        scales = getattr(self, self._scales_name).float()
        group = self.in_features
        if isinstance(self._block, list):
            rows, columns = (int(size) for size in self._block)
            group = self.part.group_size(columns)  # less than a block where a part, or the last block, is cut off
            scales = self.part.by_group(
                scales[self.part.places(Axis("outputs", rows))], 1, Axis("inputs", columns), group
            )
        layer = CodedLinear(self.in_features, self.out_features, self.bias, code=Code.FLOAT8, group_size=group)
        return layer.fill(self.weight, scales.expand(self.out_features, self.in_features // group))
