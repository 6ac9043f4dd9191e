"""Rotary positions and the write into the paged cache in Triton's language, from the joined product of q, k and v.

One program per token and head. A query or key head is normed where the model norms heads (Qwen3), then turned, in its
place; keys and values go to the cache as well, clamped to what the cache's type holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rotary_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_blocks: torch.Tensor,
    slot_offsets: torch.Tensor,
    *,
    num_heads: int,
    interleaved: bool = False,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """qkv [num_tokens, num_heads + 2 * kv_heads, dim], contiguous in its last two dimensions, is edited in place: its
    query and key heads are turned by cos and sin [num_tokens, rotary_dim] (rotary_dim <= dim). keys and values
    [num_blocks, kv_heads, block_size, dim] get the token's at slot_blocks, slot_offsets int64 [num_tokens], divided by
    key_scale and value_scale.

    interleaved: neighbouring dimensions turn together (GPT-J), not those half the rotary dimension apart.
    query_norm, key_norm: [dim], RMSNorm over the head before it is turned.
    """
    num_tokens, num_all_heads, dim = qkv.shape
    num_kv_heads, rotary_dim = keys.shape[1], cos.shape[1]
    assert num_all_heads == num_heads + 2 * num_kv_heads and keys.shape[3] == values.shape[3] == dim
    assert qkv.stride(2) == keys.stride(3) == values.stride(3) == 1 and rotary_dim % 2 == 0 and rotary_dim <= dim
    assert (query_norm is None) == (key_norm is None)
    assert cos.stride(1) == sin.stride(1) == 1 and slot_blocks.is_contiguous() and slot_offsets.is_contiguous()
    if num_tokens == 0:
        return
    _rotary_store[(num_tokens, num_all_heads)](
        qkv,
        cos,
        sin,
        keys,
        values,
        slot_blocks,
        slot_offsets,
        qkv if query_norm is None else query_norm,
        qkv if key_norm is None else key_norm,
        qkv.stride(0),
        qkv.stride(1),
        cos.stride(0),
        sin.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        epsilon,
        1.0 / key_scale,
        1.0 / value_scale,
        torch.finfo(keys.dtype).max,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        DIM=dim,
        HALF=rotary_dim // 2,
        HALF_PADDED=triton.next_power_of_2(max(rotary_dim // 2, 1)),
        REST_PADDED=triton.next_power_of_2(max(dim - rotary_dim, 1)),
        DIM_PADDED=triton.next_power_of_2(dim),
        INTERLEAVED=interleaved,
        HAS_NORM=query_norm is not None,
        num_warps=1,
    )


def rotary_store_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_blocks: torch.Tensor,
    slot_offsets: torch.Tensor,
    *,
    num_heads: int,
    interleaved: bool = False,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """The same with PyTorch's operations."""
    num_kv_heads, rotary_dim = keys.shape[1], cos.shape[1]
    if query_norm is not None and key_norm is not None:
        for part, weight in (
            (qkv[:, :num_heads], query_norm),
            (qkv[:, num_heads : num_heads + num_kv_heads], key_norm),
        ):
            wide = part.float()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
            part.copy_(weight * normed.to(qkv.dtype))
    turned = qkv[:, : num_heads + num_kv_heads, :rotary_dim]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        partner = torch.cat((-second, first), -1)
    turned.copy_(turned.float() * cos[:, None].float() + partner.float() * sin[:, None].float())
    for cache, part, scale in (
        (keys, qkv[:, num_heads : num_heads + num_kv_heads], key_scale),
        (values, qkv[:, num_heads + num_kv_heads :], value_scale),
    ):
        largest = torch.finfo(cache.dtype).max
        stored = torch.nan_to_num(part.float() / scale, nan=0.0).clamp(-largest, largest).to(cache.dtype)
        for token in range(len(stored)):
            cache[slot_blocks[token], :, slot_offsets[token]] = stored[token]


@triton.jit
def _rotary_store(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    blocks_ptr,
    offsets_ptr,
    query_norm_ptr,
    key_norm_ptr,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
    value_block_stride,
    value_head_stride,
    value_slot_stride,
    epsilon,
    inverse_key_scale,
    inverse_value_scale,
    largest,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    source = qkv_ptr + token * token_stride + head * head_stride
    block = tl.load(blocks_ptr + token)
    slot = tl.load(offsets_ptr + token)
    dtype = qkv_ptr.dtype.element_ty
    if head >= NUM_HEADS + NUM_KV_HEADS:
        dims = tl.arange(0, DIM_PADDED)
        value = tl.load(source + dims, mask=dims < DIM, other=0.0).to(tl.float32) * inverse_value_scale
        value = tl.where(value == value, tl.minimum(tl.maximum(value, -largest), largest), 0.0)
        target = values_ptr + block * value_block_stride + slot * value_slot_stride
        target += (head - NUM_HEADS - NUM_KV_HEADS) * value_head_stride
        tl.store(target + dims, value.to(values_ptr.dtype.element_ty), mask=dims < DIM)
    else:
        halves = tl.arange(0, HALF_PADDED)
        rest = 2 * HALF + tl.arange(0, REST_PADDED)
        in_half = halves < HALF
        in_rest = rest < DIM
        first_dims = halves
        second_dims = halves + HALF
        if INTERLEAVED:
            first_dims = 2 * halves
            second_dims = 2 * halves + 1
        # Each element is loaded and stored by one thread only, so nothing needs a barrier.
        first = tl.load(source + first_dims, mask=in_half, other=0.0).to(tl.float32)
        second = tl.load(source + second_dims, mask=in_half, other=0.0).to(tl.float32)
        others = tl.load(source + rest, mask=in_rest, other=0.0).to(tl.float32)
        if HAS_NORM:
            mean = (tl.sum(first * first, 0) + tl.sum(second * second, 0) + tl.sum(others * others, 0)) / DIM
            factor = tl.rsqrt(mean + epsilon)
            weight_ptr = query_norm_ptr
            if head >= NUM_HEADS:
                weight_ptr = key_norm_ptr
            first_weight = tl.load(weight_ptr + first_dims, mask=in_half, other=0.0).to(tl.float32)
            second_weight = tl.load(weight_ptr + second_dims, mask=in_half, other=0.0).to(tl.float32)
            rest_weight = tl.load(weight_ptr + rest, mask=in_rest, other=0.0).to(tl.float32)
            first = ((first * factor).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
            second = ((second * factor).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
            others = ((others * factor).to(dtype).to(tl.float32) * rest_weight).to(dtype).to(tl.float32)
        first_cos = tl.load(cos_ptr + token * cos_stride + first_dims, mask=in_half, other=0.0).to(tl.float32)
        second_cos = tl.load(cos_ptr + token * cos_stride + second_dims, mask=in_half, other=0.0).to(tl.float32)
        first_sin = tl.load(sin_ptr + token * sin_stride + first_dims, mask=in_half, other=0.0).to(tl.float32)
        second_sin = tl.load(sin_ptr + token * sin_stride + second_dims, mask=in_half, other=0.0).to(tl.float32)
        turned_first = (first * first_cos - second * first_sin).to(dtype)
        turned_second = (second * second_cos + first * second_sin).to(dtype)
        tl.store(source + first_dims, turned_first, mask=in_half)
        tl.store(source + second_dims, turned_second, mask=in_half)
        if HAS_NORM:
            tl.store(source + rest, others.to(dtype), mask=in_rest)
        if head >= NUM_HEADS:
            target = keys_ptr + block * key_block_stride + slot * key_slot_stride
            target += (head - NUM_HEADS) * key_head_stride
            kept = turned_first.to(tl.float32) * inverse_key_scale
            kept = tl.where(kept == kept, tl.minimum(tl.maximum(kept, -largest), largest), 0.0)
            tl.store(target + first_dims, kept.to(keys_ptr.dtype.element_ty), mask=in_half)
            kept = turned_second.to(tl.float32) * inverse_key_scale
            kept = tl.where(kept == kept, tl.minimum(tl.maximum(kept, -largest), largest), 0.0)
            tl.store(target + second_dims, kept.to(keys_ptr.dtype.element_ty), mask=in_half)
            kept = others * inverse_key_scale
            kept = tl.where(kept == kept, tl.minimum(tl.maximum(kept, -largest), largest), 0.0)
            tl.store(target + rest, kept.to(keys_ptr.dtype.element_ty), mask=in_rest)
