"""Linear layers that add what the adapters of a step's rows say, and the stacks their matrices lie in.

Every adapted layer keeps two stacks, one place per adapter, ranks padded with zeros to the largest:

    down [num_slots, rank, num_inputs]      up [num_slots, rank, num_outputs]

A step of few rows (decodes) computes the products of all adapters from its lowest to its highest slot at once, and a
mask leaves to each row those of its own adapter: three operations, whatever the number of adapters. A step of many rows
(prompts) goes adapter by adapter, over the rows of each. Steps without adapters run the plain layers.

The layers read which rows belong to whom from an object that the runner of their model writes before each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from textgen_engine.adapters.peft_folder import AdapterWeights, LinearSizes
from textgen_engine.adapters.spec import AdapterRun, StepAdapters
from textgen_engine.parallel.linear import RankWrapper

# Up to so many rows the products of adapters that a row does not use cost less than going adapter by adapter.
_MOST_MASKED_ROWS = 64
# Ranks are padded to a multiple of this, so that adapters of similar rank do not each make the stacks grow.
_RANK_MULTIPLE = 8


@dataclass(frozen=True)
class _RowPlan:
    """Rows of one step and their adapters. mask: [num_rows, (stop - start) * rank] 0 or 1, for slots start:stop;
    None where the runs are gone through one by one."""

    runs: tuple[AdapterRun, ...]
    num_rows: int
    slots: slice
    mask: torch.Tensor | None


@dataclass
class _Step:
    """The step that runs: what the layers of one model read. None: no row has an adapter."""

    tokens: _RowPlan | None = None
    head: _RowPlan | None = None


class AdaptedLinear(torch.nn.Module):
    """A linear layer of any kind, with the adapters' products added: x [..., inputs] -> [..., outputs]."""

    def __init__(self, base: torch.nn.Module, sizes: LinearSizes, step: _Step, *, is_head: bool) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = sizes.num_inputs, sizes.num_outputs
        self._step = step
        self._is_head = is_head
        self._down = torch.empty(0)
        self._up = torch.empty(0)

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's, for code of the model that looks at its type or device."""
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def grown(self, num_slots: int, rank: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stacks with room for so many adapters of this rank, and what is in the present ones."""
        stacks = []
        for old, width in ((self._down, self.in_features), (self._up, self.out_features)):
            new = torch.zeros(num_slots, rank, width, dtype=like.dtype, device=like.device)
            if old.numel():
                new[: old.shape[0], : old.shape[1]] = old
            stacks.append(new)
        return stacks[0], stacks[1]

    def use(self, stacks: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Take these stacks from now on."""
        self._down, self._up = stacks

    def fill(self, slot: int, products: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Put an adapter's matrices (see AdapterWeights) into its place; None: it does not adapt this layer."""
        for stack, matrix in zip((self._down, self._up), products or (None, None), strict=True):
            stack[slot].zero_()
            if matrix is not None:
                stack[slot, : matrix.shape[0]] = matrix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base(x)
        plan = self._step.head if self._is_head else self._step.tokens
        if plan is None:
            return output
        rows = x.reshape(-1, self.in_features)
        assert rows.shape[0] == plan.num_rows, f"{rows.shape[0]} rows in a step of {plan.num_rows}"
        added_to = output.contiguous().view(-1, self.out_features)
        if plan.mask is not None:
            down = self._down[plan.slots].view(-1, self.in_features)
            inner = (rows @ down.t()).mul_(plan.mask)  # [num_rows, slots * rank]
            added_to.addmm_(inner, self._up[plan.slots].view(-1, self.out_features))
        else:
            for run in plan.runs:
                inner = rows[run.start : run.stop] @ self._down[run.slot].t()  # [rows of the run, rank]
                added_to[run.start : run.stop].addmm_(inner, self._up[run.slot])
        return added_to.view(output.shape)


class AdapterLayers:
    """The linear layers of one model, and the adapters in their slots. Written by the engine's loop thread alone."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._model = model
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._step = _Step()
        self._modules: dict[str, torch.nn.Module] = {}
        self._adapted: dict[str, AdaptedLinear] = {}
        self._num_slots = 0
        self._rank = 0
        self.sizes: dict[str, LinearSizes] = {}
        for name, module in model.named_modules():
            sizes = _linear_sizes(module)
            if sizes is not None:
                self._modules[name] = module
                self.sizes[name] = sizes
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.head = next((name for name, module in self._modules.items() if module is head), None)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    def base_weight(self, module: str) -> torch.Tensor | None:
        """A weight of the model by its module's name; None where there is none, or none that can be compared."""
        try:
            weight = getattr(self._modules.get(module) or self._model.get_submodule(module), "weight", None)
        except AttributeError:
            return None
        return weight if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Load an adapter into a slot. What raises (no memory) has changed nothing."""
        rank = max(self._rank, -(-weights.rank // _RANK_MULTIPLE) * _RANK_MULTIPLE)
        num_slots = max(self._num_slots, slot + 1)
        new = {
            name: AdaptedLinear(self._modules[name], self.sizes[name], self._step, is_head=name == self.head)
            for name in weights.layers
            if name not in self._adapted
        }
        layers = self._adapted | new
        growing = layers if (num_slots, rank) != (self._num_slots, self._rank) else new
        stacks = {name: layer.grown(num_slots, rank, self._like) for name, layer in growing.items()}
        for name, grown in stacks.items():
            layers[name].use(grown)
        for name, layer in layers.items():
            layer.fill(slot, weights.layers.get(name))
        for name, layer in new.items():
            parent, _, attribute = name.rpartition(".")
            place = self._model.get_submodule(parent)
            around = getattr(place, attribute)
            if isinstance(around, RankWrapper):  # what it does with the result, it does with the adapter's part of it
                place, attribute = around, "inner"
            setattr(place, attribute, layer)
        self._adapted, self._num_slots, self._rank = layers, num_slots, rank

    def clear(self, slot: int) -> None:
        """Empty a slot; no step may use it until `put`."""
        for layer in self._adapted.values():
            layer.fill(slot, None)

    def begin_step(self, step: StepAdapters | None, *, head_takes_logits_rows: bool) -> None:
        """Say which rows of the forward pass that follows belong to which adapter."""
        if step is None:
            self._step.tokens = self._step.head = None
            return
        self._step.tokens = self._plan(step.tokens, step.num_tokens)
        self._step.head = self._plan(step.logits, step.num_logits) if head_takes_logits_rows else self._step.tokens

    def _plan(self, runs: tuple[AdapterRun, ...], num_rows: int) -> _RowPlan | None:
        if not runs:
            return None
        slots = slice(min(run.slot for run in runs), max(run.slot for run in runs) + 1)
        mask = None
        if num_rows <= _MOST_MASKED_ROWS:
            mask = self._like.new_zeros(num_rows, slots.stop - slots.start, self._rank)
            for run in runs:
                mask[run.start : run.stop, run.slot - slots.start] = 1
            mask = mask.view(num_rows, -1)
        return _RowPlan(runs, num_rows, slots, mask)


def _linear_sizes(module: torch.nn.Module) -> LinearSizes | None:
    """The sizes of a linear layer, told by its attributes: there are many classes of them (quantized, compiled)."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # the second are those of GPT-2's Conv1D
        sizes: Iterable[object] = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            num_inputs, num_outputs = sizes
            assert isinstance(num_inputs, int) and isinstance(num_outputs, int)
            return LinearSizes(num_inputs, num_outputs)
    return None
