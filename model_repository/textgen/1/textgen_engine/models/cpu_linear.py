"""Linear layers that stay fast at the row counts of batched decoding on CPUs.

PyTorch's float32 linear multiplies a few rows by a large weight as if each row were alone: 8 rows cost almost 8 times
one. A compiled kernel reads the weight once for several of them. Where it cannot be compiled, the same product with the
rows as columns, (W x^T)^T, does better than the plain one.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from textgen_engine.kernels.cpu import CpuKernels

# Between these numbers of rows the turned product was faster for every layer shape tried (weights of 576 x 960 up to
# 576 x 49152, two cores with AVX-512, MKL): at 8 rows by 1.2 to 1.6 times, at 16 and 32 by 2 to 2.7. Outside them the
# plain form is as fast or faster.
_LEAST_ROWS = 6
_MOST_ROWS = 48
_TILE_ROWS = 16
# Up to this number of rows the compiled kernel was as fast as the best of the others or faster, for nearly all shapes.
MOST_COMPILED_ROWS = 48


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


class CompiledLinear(CpuLinear):
    """A CpuLinear that takes the compiled kernel for few rows."""

    def __init__(self, linear: torch.nn.Linear, kernels: CpuKernels) -> None:
        super().__init__(linear)
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() > MOST_COMPILED_ROWS * self.in_features:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        return self._kernels.linear(rows, self.weight, self.bias).view(*x.shape[:-1], self.out_features)


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
    """Put a CompiledLinear (CpuLinear without kernels, TiledLinear for batch_invariant) in the place of every plain
    torch.nn.Linear, sharing its parameters; returns how many. One with hooks of its own (a checkpoint's code may set
    them) stays."""

    def replacement(linear: torch.nn.Linear) -> CpuLinear:
        if batch_invariant:
            return TiledLinear(linear)
        if kernels is None or not linear.weight.is_contiguous():
            return CpuLinear(linear)
        return CompiledLinear(linear, kernels)

    num_replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and child.weight.dtype is torch.float32 and not has_hooks(child):
                setattr(module, name, replacement(child))
                num_replaced += 1
    return num_replaced
