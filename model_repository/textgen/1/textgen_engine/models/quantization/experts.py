"""Experts with quantized weights: transformers keeps all of a layer in two tensors, we a linear layer for each.

`QuantizedExperts` receives plain weights, which are quantized at load; `StoredExperts` reads the experts of a
checkpoint that has them quantized already, one by one. Both become `ExpertLayers`, which run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.experts import by_expert, has_known_form
from textgen_engine.models.quantization.linear import QuantizedLinear
from textgen_engine.models.quantization.method import LoadMethod, StoredLinear, StoredMethod
from textgen_engine.models.quantization.part import LayerPart
from textgen_engine.models.weights import StoredParts, StoredTensor

PROJECTIONS = ("gate_up_proj", "down_proj")
# What checkpoints call an expert's gate, up and down.
STORED_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("fc1", "fc3", "fc2"))
Gate = Callable[[torch.Tensor], torch.Tensor]


class ExpertLayers(torch.nn.Module):
    """In the place of transformers' experts of a layer, called as they are. gate: of both products of gate and up."""

    def __init__(self, gate: Gate, gate_up: list[torch.nn.Module], down: list[QuantizedLinear]) -> None:
        super().__init__()
        self._gate = gate
        self.gate_up = torch.nn.ModuleList(gate_up)
        self.down = torch.nn.ModuleList(down)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """See models/experts.py."""

        def expert(number: int, rows: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.down[number](self._gate(self.gate_up[number](rows)))
            return result

        return by_expert(hidden_states, top_k_index, top_k_weights, len(self.down), expert)


class QuantizedExperts(torch.nn.Module):
    """While weights are read it has each projection's buffers of all experts in one tensor, on the meta device, under
    the names that transformers knows."""

    def __init__(self, stock: Any, method: LoadMethod) -> None:
        """Raises TypeError where the method has no form for these sizes."""
        super().__init__()
        self._gate = stock._apply_gate
        self._method = method
        self.num_experts = len(stock.gate_up_proj)
        self.num_weights = num_weights(stock)
        self._sizes = {projection: tuple(getattr(stock, projection).shape) for projection in PROJECTIONS}
        for projection in PROJECTIONS:
            for part, buffer in self._layer(projection).named_buffers():
                whole = torch.empty((self.num_experts, *buffer.shape), dtype=buffer.dtype, device="meta")
                self.register_buffer(_buffer_name(projection, part), whole)

    def shape(self, projection: str) -> tuple[int, ...]:
        """Of the plain weights of all experts."""
        return self._sizes[projection]

    def quantize(self, projection: str, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """Plain weights [experts, outputs, inputs] as this module's buffers by their names; one expert at a time."""
        parts = [self._method.quantize(weight.float()) for weight in weights]
        return {_buffer_name(projection, part): torch.stack([one[part] for one in parts]) for part in parts[0]}

    def finished(self) -> ExpertLayers:
        """What runs, after loading."""
        gate_up, down = (
            [self._filled(projection, expert) for expert in range(self.num_experts)] for projection in PROJECTIONS
        )
        return ExpertLayers(self._gate, list(gate_up), down)

    def _filled(self, projection: str, expert: int) -> QuantizedLinear:
        layer = self._layer(projection)
        for part, _ in list(layer.named_buffers()):
            setattr(layer, part, self.get_buffer(_buffer_name(projection, part))[expert])
        return layer

    def _layer(self, projection: str) -> QuantizedLinear:
        _, num_outputs, num_inputs = self._sizes[projection]
        layer = self._method.replacement(
            torch.nn.Linear(num_inputs, num_outputs, bias=False, device="meta"), projection
        )
        if layer is None:
            raise TypeError(f"{self._method.name} has no form for {num_inputs} inputs")
        return layer


# By the prefix of their names in the checkpoint, then by the names that a StoredLinear has for them.
TensorsByPrefix = Mapping[str, Mapping[str, StoredTensor]]


class StoredExperts(torch.nn.Module):
    """Has no tensors that transformers could look for; `read` makes the layers of the checkpoint's own."""

    def __init__(self, stock: Any, method: StoredMethod, name: str, prefixes: Mapping[tuple[int, str], str]) -> None:
        """prefixes: of the names of the tensors of each expert and projection in the checkpoint. name: of the module.

        Raises ModelLoadError for experts that are quantized, but not all, or not in a form that can be served.
        """
        super().__init__()
        self._method = method
        self._name = name
        self._layers: list[list[tuple[str, StoredLinear]]] = []  # gate, up, down of each expert, with their prefixes
        if not has_known_form(stock) or stock.has_bias:
            raise ModelLoadError(f"{name}: {type(stock).__name__} with {method.name} weights is not served")
        self._gate = stock._apply_gate
        self.num_weights = num_weights(stock)
        for expert in range(len(stock.gate_up_proj)):
            names = next((names for names in STORED_NAMES if (expert, names[0]) in prefixes), STORED_NAMES[0])
            self._layers.append([self._stored(stock, prefixes, expert, names, place) for place in range(3)])

    def _stored(
        self,
        stock: Any,
        prefixes: Mapping[tuple[int, str], str],
        expert: int,
        names: tuple[str, str, str],
        place: int,
    ) -> tuple[str, StoredLinear]:
        prefix = prefixes.get((expert, names[place]))
        hidden, inner = stock.down_proj.shape[1:]
        sizes = (inner, hidden) if place == 2 else (hidden, inner)
        linear: Any = torch.nn.Linear(*sizes, bias=False, device="meta")
        ranges = getattr(stock, "inner_of_rank", None)  # models/sharding.py
        if ranges is not None:
            (held, whole), everything = ranges, (((0, hidden),), hidden)
            ends = (*everything, held, whole) if place == 2 else (held, whole, *everything)
            linear.part_of_rank = LayerPart(*ends)
        layer = None if prefix is None else self._method.replacement(linear, prefix)
        if prefix is None or layer is None:
            raise ModelLoadError(
                f"the checkpoint lacks {self._method.name} weights of expert {expert}'s {names[place]} in {self._name}"
            )
        return prefix, layer

    def read(self, tensors: TensorsByPrefix, device: torch.device) -> ExpertLayers:
        """Read one expert after another, and return what runs. Raises ModelLoadError for a tensor that is missing."""
        gate_up: list[torch.nn.Module] = []
        down: list[QuantizedLinear] = []
        for three in self._layers:
            gate, up, last = (_read(layer, prefix, tensors.get(prefix, {}), device) for prefix, layer in three)
            gate_up.append(gate.joined_with([up]) or _Apart(gate, up))
            down.append(last)
        self._layers.clear()
        return ExpertLayers(self._gate, gate_up, down)


def _read(
    layer: StoredLinear, prefix: str, tensors: Mapping[str, StoredTensor], device: torch.device
) -> QuantizedLinear:
    for name, expected in list(layer.named_buffers()):
        if name not in tensors:
            raise ModelLoadError(f"the checkpoint lacks {prefix}.{name}")
        tensor: StoredTensor | StoredParts = tensors[name]
        part = layer.slices.get(name)
        if part is not None:
            ranges = [tensors[name].narrow(part.dim, start, stop - start) for start, stop in part.ranges]
            tensor = StoredParts(tuple(ranges), part.dim)
        if tensor.get_shape() != list(expected.shape):
            raise ModelLoadError(
                f"the checkpoint has {prefix}.{name} of shape {tensor.get_shape()}, the model's is "
                f"{list(expected.shape)}: config.json is another model's"
            )
        setattr(layer, name, tensor[...].to(device, expected.dtype))
    return layer.finished()


class _Apart(torch.nn.Module):
    """Two layers that cannot be joined, for their inputs have orders of their own."""

    def __init__(self, gate: QuantizedLinear, up: QuantizedLinear) -> None:
        super().__init__()
        self.gate, self.up = gate, up

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.gate(rows), self.up(rows)), dim=-1)


def quantized_experts(module: Any, method: LoadMethod) -> QuantizedExperts | None:
    """What takes the module's place, if these are experts of a known form that the method applies to."""
    if not has_known_form(module) or module.has_bias:
        return None
    try:
        return QuantizedExperts(module, method)
    except TypeError:
        return None


def num_weights(stock: Any) -> int:
    """Of transformers' experts of a layer."""
    return sum(getattr(stock, projection).numel() for projection in PROJECTIONS)


def _buffer_name(projection: str, part: str) -> str:
    return projection if part == "weight" else f"{projection}_{part}"
