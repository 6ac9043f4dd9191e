"""What of a linear layer somebody holds, and where that lies in stored tensors that pack or group it.

A rank may hold any ranges of a layer's outputs or inputs; tensors of quantized checkpoints hold words of several codes,
and one scale for a group. Of those a rank reads the words and groups that cover its ranges, and picks out its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from textgen_engine.parallel.split import Range, Slice


@dataclass(frozen=True)
class Axis:
    """A dimension of a stored tensor, in which one number stands for `per` neighbouring outputs or inputs."""

    of: Literal["outputs", "inputs"]
    per: int = 1


@dataclass(frozen=True)
class LayerPart:
    """Ranges of a layer's outputs and of its inputs, and how many of each there are in all."""

    outputs: tuple[Range, ...]
    num_outputs: int
    inputs: tuple[Range, ...]
    num_inputs: int

    def slice(self, dim: int, axis: Axis) -> Slice | None:
        """What is read along dimension `dim`, which is `axis`; None for all of it."""
        ranges, size = self._ranges(axis)
        if ranges == ((0, size),):
            return None
        return Slice(dim, tuple((start // axis.per, -(-stop // axis.per)) for start, stop in ranges))

    def length(self, axis: Axis) -> int:
        """How many numbers are read along `axis`."""
        return sum(-(-stop // axis.per) - start // axis.per for start, stop in self._ranges(axis)[0])

    def places(self, axis: Axis, step: int = 1) -> torch.Tensor:
        """For every `step`-th output or input held, the place of its number in what is read along `axis`."""
        places, offset = [], 0
        for start, stop in self._ranges(axis)[0]:
            first = start // axis.per
            places.append(torch.arange(start, stop, step) // axis.per - first + offset)
            offset += -(-stop // axis.per) - first
        return torch.cat(places)

    def held(self, codes: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        """Of the unpacked codes of words read along `axis`, those of what is held."""
        places, offset = [], 0
        for start, stop in self._ranges(axis)[0]:
            first, last = start // axis.per, -(-stop // axis.per)
            places.append(torch.arange(start, stop) - first * axis.per + offset)
            offset += (last - first) * axis.per
        return _picked(codes, dim, torch.cat(places))

    def by_group(self, values: torch.Tensor, dim: int, axis: Axis, group_size: int) -> torch.Tensor:
        """Of values read along `axis`, which is inputs in groups, one for each group of `group_size` inputs held."""
        return _picked(values, dim, self.places(axis, group_size))

    def group_size(self, per: int) -> int:
        """The largest equal groups of the inputs held, none of which has a part in two of the layer's groups of `per`
        inputs. Where ranges begin and end within groups, these are smaller."""
        if len({start // per for start, _ in self.inputs} | {(stop - 1) // per for _, stop in self.inputs}) == 1:
            return sum(stop - start for start, stop in self.inputs)
        return math.gcd(per, *(end for ends in self.inputs for end in ends))

    def _ranges(self, axis: Axis) -> tuple[tuple[Range, ...], int]:
        return (self.outputs, self.num_outputs) if axis.of == "outputs" else (self.inputs, self.num_inputs)


def part_of(linear: Any) -> LayerPart:
    """What this process holds of a linear layer; all of it, unless models/sharding.py has said otherwise."""
    part = getattr(linear, "part_of_rank", None)
    if isinstance(part, LayerPart):
        return part
    num_outputs, num_inputs = linear.out_features, linear.in_features
    return LayerPart(((0, num_outputs),), num_outputs, ((0, num_inputs),), num_inputs)


def _picked(values: torch.Tensor, dim: int, places: torch.Tensor) -> torch.Tensor:
    if torch.equal(places, torch.arange(values.shape[dim])):
        return values
    return values.index_select(dim, places.to(values.device))
