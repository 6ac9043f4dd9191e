"""`eetq` and `bitsandbytes`: 8-bit weights, one scale for each output; activations stay as they are.

Both round each output's weights to -127 ... 127 of its largest, as EETQ and LLM.int8 (Dettmers et al., 2022) do.
LLM.int8 also rounds activations below a threshold; its aim is the result without that, so we leave it out.
"""

from __future__ import annotations

import torch

from textgen_engine.models.quantization.linear import Code, CodedLinear, quantize_rows
from textgen_engine.models.quantization.method import LoadMethod


class WeightOnlyInt8(LoadMethod):
    bytes_per_weight = 1.01

    def __init__(self, name: str) -> None:
        self.name = name

    def replacement(self, linear: torch.nn.Linear, name: str) -> CodedLinear:
        return CodedLinear(
            linear.in_features, linear.out_features, linear.bias, code=Code.INT8, group_size=linear.in_features
        )

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, scales = quantize_rows(weight)
        return {"weight": codes.to(torch.int8), "scales": scales[:, None]}
