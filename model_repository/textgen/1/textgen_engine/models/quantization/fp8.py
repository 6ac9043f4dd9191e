"""`fp8`: weights as float8_e4m3fn. At load, one scale for each output; in checkpoints, one for each block of them."""

from __future__ import annotations

from typing import Any

import torch

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.quantization.linear import Code, CodedLinear
from textgen_engine.models.quantization.method import LoadMethod, StoredLinear, StoredMethod

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

    def __init__(self, settings: dict[str, Any], stored: frozenset[str]) -> None:
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
        self._expect("weight", (self.out_features, self.in_features), torch.float8_e4m3fn)
        if block is None:
            shape: tuple[int, ...] = ()
        elif block == "channel":
            shape = (self.out_features, 1)
        elif block == "tensor":
            shape = (1,)
        else:
            shape = (-(-self.out_features // int(block[0])), -(-self.in_features // int(block[1])))
        self._expect(scales_name, shape, torch.float32)

    def finished(self) -> CodedLinear:
        scales = getattr(self, self._scales_name).float()
        group = self.in_features
        if isinstance(self._block, list):
            rows, columns = self._block
            scales = scales.repeat_interleave(rows, dim=0)[: self.out_features]
            if self.in_features % columns == 0:
                group = columns
            else:  # a last, narrower block
                group = _common_divisor(self.in_features, columns)
                scales = scales.repeat_interleave(columns // group, dim=1)[:, : self.in_features // group]
        layer = CodedLinear(self.in_features, self.out_features, self.bias, code=Code.FLOAT8, group_size=group)
        return layer.fill(self.weight, scales.expand(self.out_features, self.in_features // group))


def _common_divisor(first: int, second: int) -> int:
    while second:
        first, second = second, first % second
    return first
