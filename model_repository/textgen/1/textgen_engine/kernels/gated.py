"""The gate of an MLP in Triton's language: activation(gate) * up, from the joined product of both."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch.nn import functional

Activation = Literal["silu", "gelu", "gelu_tanh"]
_TILE = 1024


def gated(gate_up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """gate_up [n, 2 * width], gate before up -> [n, width]. The activation is rounded to the type before it is
    multiplied, as PyTorch's operations one by one would."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1 and gate_up.shape[1] % 2 == 0
    output = gate_up.new_empty(num_rows, width)
    if num_rows:
        tile = min(_TILE, triton.next_power_of_2(width))
        _gated[(num_rows, triton.cdiv(width, tile))](
            gate_up, output, gate_up.stride(0), width, TILE=tile, ACTIVATION=activation, num_warps=4
        )
    return output


def gated_reference(gate_up: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """The same with PyTorch's operations."""
    gate, up = gate_up.chunk(2, dim=1)
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


@triton.jit
def _gated(gate_up_ptr, output_ptr, row_stride, width, TILE: tl.constexpr, ACTIVATION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < width
    gate = tl.load(gate_up_ptr + row * row_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(inner)) is a sigmoid
    else:
        active = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    dtype = output_ptr.dtype.element_ty
    product = active.to(dtype).to(tl.float32) * up
    tl.store(output_ptr + row * width + columns, product.to(dtype), mask=mask)
