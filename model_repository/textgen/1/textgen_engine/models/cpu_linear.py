"""Linear layers that stay fast at the row counts of batched decoding on CPUs.

PyTorch's float32 linear multiplies a few rows by a large weight as if each row were alone: 8 rows cost almost 8 times
one. A compiled kernel on a packed weight reads it once for several of them. Where it cannot be compiled, the same
product with the rows as columns, (W x^T)^T, does better than the plain one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.kernels.cpu_records import PackedWeight
from textgen_engine.mapped_memory import WeightMemory

# Between these numbers of rows the turned product was faster for every layer shape tried (weights of 576 x 960 up to
# 576 x 49152, two cores with AVX-512, MKL): at 8 rows by 1.2 to 1.6 times, at 16 and 32 by 2 to 2.7. Outside them the
# plain form is as fast or faster.
_LEAST_ROWS = 6
_MOST_ROWS = 48
_TILE_ROWS = 16
# Smaller weights stay as they are: nothing is gained, and a model's code may look at them in every step (a router's).
_LEAST_PACKED = 1 << 14


class CpuLinear(torch.nn.Module):
    """Stands in for torch.nn.Linear, with its parameters: x [..., in_features] -> [..., out_features], float32.

    Agrees with torch.nn.functional.linear up to the order of float32 additions.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.numel() // self.in_features
        if not _LEAST_ROWS <= num_rows <= _MOST_ROWS:
            return functional.linear(x, self.weight, self.bias)
        turned = torch.mm(self.weight, x.reshape(num_rows, self.in_features).t())  # [out_features, num_rows]
        output = turned.t().contiguous().view(*x.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


class PackedLinear(torch.nn.Module):
    """Stands in for torch.nn.Linear with a packed copy of its weight, float32 or bfloat16: x [..., in_features] ->
    [..., out_features], in the type of x. Sums are float32; beside a bfloat16 weight x is rounded to bfloat16.

    Agrees with torch.nn.functional.linear up to the order of float32 additions; a row's result is the same to the last
    bit whatever rows stand beside it.
    """

    def __init__(self, linear: Any, kernels: CpuKernels, memory: WeightMemory | None = None) -> None:
        """linear: a torch.nn.Linear, or JoinedLinears."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed: torch.Tensor
        parts = linear.parts if isinstance(linear, JoinedLinears) else [linear]
        self.register_buffer(
            "packed", _packed([part.weight.detach() for part in parts], kernels, memory), persistent=False
        )
        bias = linear.bias
        self.bias = (
            bias
            if bias is None or bias.dtype is torch.float32
            else torch.nn.Parameter(bias.float(), requires_grad=False)
        )
        self.for_kernels = PackedWeight(self.packed, self.bias)
        self.kernels = kernels

    @property
    def weight(self) -> torch.Tensor:
        """The weight [out_features, in_features] itself, unpacked anew: for code that rarely looks at it."""
        rows = self.packed.transpose(1, 2).flatten(2).flatten(0, 1)
        return rows[: self.out_features, : self.in_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float()
        output = self.kernels.linear(rows, self.for_kernels, self.out_features)
        return output.view(*x.shape[:-1], self.out_features).to(x.dtype)


class JoinedLinears(torch.nn.Module):
    """Plain linear layers of the same inputs as one: their outputs one behind the other. To be packed, which needs no
    copy of their weights."""

    def __init__(self, parts: list[torch.nn.Linear]) -> None:
        super().__init__()
        self.parts = parts
        self.in_features, self.out_features = parts[0].in_features, sum(part.out_features for part in parts)
        biases: list[torch.Tensor] = [part.bias for part in parts if part.bias is not None]
        self.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None


def _packed(weights: list[torch.Tensor], kernels: CpuKernels, memory: WeightMemory | None) -> torch.Tensor:
    """The packed form of weights whose outputs stand one behind the other."""
    empty = torch.empty if memory is None else memory.empty
    if len(weights) > 1 and any(len(weight) % kernels.block for weight in weights[:-1]):
        weights = [torch.cat(weights)]
    if len(weights) == 1:
        return kernels.pack(weights[0], None if memory is None else memory.empty)
    num_blocks = [-(-len(weight) // kernels.block) for weight in weights]
    together = 4 // weights[0].dtype.itemsize
    depth = -(-weights[0].shape[1] // together)
    whole = empty((sum(num_blocks), depth, kernels.block, together), dtype=weights[0].dtype)
    for weight, part in zip(weights, whole.split(num_blocks), strict=True):
        kernels.pack(weight, functools.partial(_given, part))
    return whole


def _given(memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    assert (memory.shape, memory.dtype) == (shape, dtype)
    return memory


class PackedEmbedding(torch.nn.Module):
    """Stands in for a torch.nn.Embedding whose weight is also that of a PackedLinear: ids [...] -> [..., depth]."""

    def __init__(self, embedding: torch.nn.Embedding, head: PackedLinear) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self._head = (head,)  # not a submodule of this one as well

    @property
    def weight(self) -> torch.Tensor:
        return self._head[0].weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        head = self._head[0]
        flat = ids.reshape(-1)
        if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < self.num_embeddings:
            raise IndexError(f"a token id outside 0 to {self.num_embeddings - 1}")
        return head.kernels.take(head.packed, flat, self.embedding_dim).view(*ids.shape, self.embedding_dim)


class TiledLinear(CpuLinear):
    """A CpuLinear whose result for a row is the same to the last bit, whatever rows stand beside it.

    Every product has the same shape: the rows in tiles of 16, the last one padded. (Where a row stands in its tile
    does not matter: the library adds each output element's terms in the same order. A test checks it.)
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        padded = functional.pad(rows, (0, 0, 0, -rows.shape[0] % _TILE_ROWS))
        tiles = [torch.mm(self.weight, tile.t()).t() for tile in padded.split(_TILE_ROWS)]
        output = torch.cat(tiles)[: rows.shape[0]].view(*x.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody wants to be called when the module is; a replacement would not do so."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def replace_linears(model: torch.nn.Module, kernels: CpuKernels | None = None, *, batch_invariant: bool = False) -> int:
    """Put a PackedLinear (without kernels a CpuLinear, for batch_invariant a TiledLinear) in the place of every plain
    torch.nn.Linear; returns how many. One with hooks of its own (a checkpoint's code may set them) stays.

    An embedding that shares its weight with a packed layer reads it from there, so that it lies in memory once.
    """
    memory = WeightMemory()
    packed: dict[int, PackedLinear] = {}  # by the address of the weight they were made of

    def replacement(linear: torch.nn.Linear) -> torch.nn.Module:
        if kernels is None or (linear.weight.numel() < _LEAST_PACKED and linear.weight.dtype is torch.float32):
            return TiledLinear(linear) if batch_invariant else CpuLinear(linear)
        layer = PackedLinear(linear, kernels, memory)
        packed[linear.weight.data_ptr()] = layer
        return layer

    num_replaced = 0
    dtypes = {torch.float32} if kernels is None else kernels.dtypes
    shared = {
        child.weight.data_ptr(): (module, name, child)
        for module, name, child in _children(model)
        if type(child) is torch.nn.Embedding and not has_hooks(child)
    }
    for module, name, child in _children(model):
        if type(child) is torch.nn.Linear and child.weight.dtype in dtypes and not has_hooks(child):
            setattr(module, name, replacement(child))
            num_replaced += 1
    for address, layer in packed.items():
        if address in shared:
            module, name, embedding = shared[address]
            setattr(module, name, PackedEmbedding(embedding, layer))
    return num_replaced


def _children(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.nn.Module]]:
    return [(module, name, child) for module in model.modules() for name, child in module.named_children()]
