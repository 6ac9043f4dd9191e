"""Experts quantized at load: transformers keeps all of a layer in two tensors, we a linear layer for each."""

from __future__ import annotations

from typing import Any

import torch

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.models.experts import by_expert, has_known_form
from textgen_engine.models.quantization.linear import QuantizedLinear
from textgen_engine.models.quantization.method import LoadMethod

PROJECTIONS = ("gate_up_proj", "down_proj")


class QuantizedExperts(torch.nn.Module):
    """Stands in for transformers' experts of a layer.

    While weights are read it has each projection's buffers of all experts in one tensor, on the meta device, under the
    names that transformers knows; `finish` makes them one layer an expert.
    """

    def __init__(self, stock: Any, method: LoadMethod) -> None:
        """Raises TypeError where the method has no form for these sizes."""
        super().__init__()
        self._gate = stock._apply_gate
        self._method = method
        self.num_experts = len(stock.gate_up_proj)
        self.num_weights = sum(getattr(stock, projection).numel() for projection in PROJECTIONS)
        self._sizes = {projection: tuple(getattr(stock, projection).shape) for projection in PROJECTIONS}
        for projection in PROJECTIONS:
            for part, buffer in self._layer(projection).named_buffers():
                whole = torch.empty((self.num_experts, *buffer.shape), dtype=buffer.dtype, device="meta")
                self.register_buffer(_buffer_name(projection, part), whole)
        self.gate_up = torch.nn.ModuleList()
        self.down = torch.nn.ModuleList()

    def shape(self, projection: str) -> tuple[int, ...]:
        """Of the plain weights of all experts."""
        return self._sizes[projection]

    def quantize(self, projection: str, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Plain weights [experts, outputs, inputs] as this module's buffers by their names; one expert at a time."""
        parts = [self._method.quantize(weight.float()) for weight in weights]
        return {_buffer_name(projection, part): torch.stack([one[part] for one in parts]) for part in parts[0]}

    def finish(self, kernels: CpuKernels | None) -> None:
        """After loading: from here on it can be called."""
        for projection, layers in zip(PROJECTIONS, (self.gate_up, self.down), strict=True):
            for expert in range(self.num_experts):
                layer = self._layer(projection)
                for part, _ in list(layer.named_buffers()):
                    setattr(layer, part, self.get_buffer(_buffer_name(projection, part))[expert])
                layer.kernels = kernels
                layers.append(layer)
        for name in [name for name, _ in self.named_buffers(recurse=False)]:
            delattr(self, name)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """See models/experts.py."""

        def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.down[number](self._gate(self.gate_up[number](rows)))
            return result

        return by_expert(hidden_states, top_k_index, top_k_weights, self.num_experts, expert)

    def _layer(self, projection: str) -> QuantizedLinear:
        _, num_outputs, num_inputs = self._sizes[projection]
        layer = self._method.replacement(
            torch.nn.Linear(num_inputs, num_outputs, bias=False, device="meta"), projection
        )
        if layer is None:
            raise TypeError(f"{self._method.name} has no form for {num_inputs} inputs")
        return layer


def quantized_experts(module: Any, method: LoadMethod) -> QuantizedExperts | None:
    """What takes the module's place, if these are experts of a known form that the method applies to."""
    if not has_known_form(module) or module.has_bias:
        return None
    try:
        return QuantizedExperts(module, method)
    except TypeError:
        return None


def _buffer_name(projection: str, part: str) -> str:
    return projection if part == "weight" else f"{projection}_{part}"
