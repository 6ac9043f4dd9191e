"""`int8`: 8-bit weights, one scale for each output, and activations rounded to 8 bits as they come (W8A8, dynamic)."""

from __future__ import annotations

import torch

from textgen_engine.models.quantization.linear import IntegerLinear, quantize_rows
from textgen_engine.models.quantization.method import LoadMethod


class Int8(LoadMethod):
    name = "int8"
    bytes_per_weight = 1.02

    def replacement(self, linear: torch.nn.Linear, name: str) -> IntegerLinear:
        return IntegerLinear(linear.in_features, linear.out_features, linear.bias)

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scales = quantize_rows(weight)
        integers = codes.to(torch.int8)
        return {"weight": integers, "scales": scales, "sums": integers.sum(dim=1, dtype=torch.int32)}
