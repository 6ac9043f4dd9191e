"""LoRA adapters over several ranks: each holds, of every adapter, the part that goes with its part of the layers.

A layer split by its outputs takes the whole `down` matrix and its columns of `up`; one split by its inputs its columns
of `down` and the whole `up`, and what it adds is summed over the ranks with the layer's own result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textgen_engine.adapters.layers import AdapterLayers
from textgen_engine.adapters.peft_folder import AdapterWeights, LinearSizes
from textgen_engine.models.sharding import Plan
from textgen_engine.parallel.group import Collectives


@dataclass(frozen=True)
class PutAdapter:
    """Rank 0 to the others: load this adapter, whole as it is here, into a slot."""

    slot: int
    weights: AdapterWeights


@dataclass(frozen=True)
class ClearAdapter:
    """Rank 0 to the others: empty a slot."""

    slot: int


class AdaptersOfAllRanks:
    """What the registry on rank 0 sees: layers of whole sizes, whose parts are filled on every rank.

    Stands in for AdapterLayers there; `part` is rank 0's own.
    """

    def __init__(self, part: AdapterLayers, plan: Plan, collectives: Collectives) -> None:
        self._part, self._plan, self._collectives = part, plan, collectives
        self.head = part.head
        self.sizes = {name: LinearSizes(*plan.whole_sizes(name, sizes)) for name, sizes in part.sizes.items()}

    @property
    def dtype(self) -> torch.dtype:
        return self._part.dtype

    def base_weight(self, module: str) -> torch.Tensor | None:
        """None for what is split: it is on no rank whole."""
        return None if f"{module}.weight" in self._plan.slices else self._part.base_weight(module)

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """On every rank. Raises as AdapterLayers.put does; the other ranks' parts are then overwritten by the next."""
        self._collectives.send(PutAdapter(slot, weights))
        put_part(self._part, self._plan, slot, weights)

    def clear(self, slot: int) -> None:
        self._collectives.send(ClearAdapter(slot))
        self._part.clear(slot)


def put_part(part: AdapterLayers, plan: Plan, slot: int, weights: AdapterWeights) -> None:
    """Load this rank's part of a whole adapter into a slot."""
    layers = {name: plan.part_of_products(name, down, up) for name, (down, up) in weights.layers.items()}
    part.put(slot, AdapterWeights(layers, weights.rank, weights.num_bytes))
