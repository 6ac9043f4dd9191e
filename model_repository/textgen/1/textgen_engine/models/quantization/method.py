"""What a method of quantization must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from textgen_engine.models.quantization.linear import QuantizedLinear
from textgen_engine.models.quantization.part import Axis, part_of
from textgen_engine.parallel.split import Slice


class Method(ABC):
    """One way to keep weights small.

    name: as QUANTIZE has it. bytes_per_weight: about, scales included, to tell whether a model fits into memory.
    """

    name: str
    bytes_per_weight: float

    @abstractmethod
    def replacement(self, linear: torch.nn.Linear, name: str) -> torch.nn.Module | None:
        """A module for this layer, on the meta device as it is itself; None: it stays as it is."""


class LoadMethod(Method):
    """A method that quantizes plain weights as they are read."""

    @abstractmethod
    def replacement(self, linear: torch.nn.Linear, name: str) -> QuantizedLinear | None: ...

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """A weight [out_features, in_features], float32, as the buffers of its QuantizedLinear by their names."""


class StoredMethod(Method):
    """A method whose checkpoints hold quantized weights already, under names of their own."""

    @abstractmethod
    def replacement(self, linear: torch.nn.Linear, name: str) -> StoredLinear | None: ...

    def stored_name(self, name: str) -> str:
        """What the model knows the checkpoint's tensor `name` by."""
        return name


class StoredLinear(torch.nn.Module):
    """Receives a layer's tensors under the names and in the shapes of its checkpoint; then becomes the layer itself.

    part: what is held of the layer. slices: what is read of each of its tensors, of those that are not read whole.
    """

    bias: torch.nn.Parameter | None

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.part = part_of(linear)
        self.slices: dict[str, Slice] = {}
        self.bias = linear.bias

    def _expect(self, name: str, dtype: torch.dtype, *axes: Axis | int) -> None:
        """A tensor of this name, whose dimensions are of outputs or inputs, or of a size that nothing splits."""
        shape = [axis if isinstance(axis, int) else self.part.length(axis) for axis in axes]
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        for dim, axis in enumerate(axes):
            part = None if isinstance(axis, int) else self.part.slice(dim, axis)
            if part is not None:
                assert name not in self.slices, "split by outputs and by inputs"
                self.slices[name] = part

    def finished(self) -> QuantizedLinear:
        """The layer that runs, made of what was read."""
        raise NotImplementedError
