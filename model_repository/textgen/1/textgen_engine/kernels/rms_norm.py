"""RMSNorm in Triton's language, with the addition to the residual that comes before it. One program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, width] (+ residual [n, width]) -> its norm times (weight + offset), and the sum that was normed.

    The sum is rounded to x's type before it is normed, and the norm before it is multiplied, as Llama's classes in
    transformers do; with an offset (Gemma's 1) the product is taken in float32.
    """
    num_rows, width = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape == (width,)
    assert residual is None or (residual.stride(1) == 1 and residual.shape == x.shape)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(normed)
    if num_rows:
        _rms_norm[(num_rows,)](
            x,
            x if residual is None else residual,
            weight,
            normed,
            total,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            width,
            epsilon,
            offset,
            TILE=triton.next_power_of_2(width),
            HAS_RESIDUAL=residual is not None,
            HAS_OFFSET=offset != 0.0,
            num_warps=min(16, max(1, triton.next_power_of_2(width) // 256)),
        )
    return normed, total


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with PyTorch's operations."""
    total = x if residual is None else x + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    if offset:
        return (wide * (weight.float() + offset)).to(x.dtype), total
    return weight * wide.to(x.dtype), total


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    width,
    epsilon,
    offset,
    TILE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    mask = columns < width
    dtype = normed_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(total_ptr + row * width + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    normed = normed * (weight + offset) if HAS_OFFSET else normed.to(dtype).to(tl.float32) * weight
    tl.store(normed_ptr + row * width + columns, normed.to(dtype), mask=mask)
