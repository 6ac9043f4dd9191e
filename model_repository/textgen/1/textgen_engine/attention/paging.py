"""Writing to and reading from the paged cache with PyTorch's own operations; shared by the backends that do so."""

from __future__ import annotations

import torch

from textgen_engine.attention.base import AttentionMetadata


def store(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, metadata: AttentionMetadata
) -> None:
    """Write a step's key and value [num_tokens, heads, dim] to their places in one layer's cache."""
    places = (metadata.slot_blocks, metadata.slot_offsets)
    # A hidden key weighs 0, but 0 times NaN is NaN: what a request that overflowed left in its blocks would reach the
    # next owners of those blocks, so only finite values are stored.
    value = torch.nan_to_num(value)
    if is_narrow(keys):  # index_put_ knows no 8-bit floats, but bytes
        key, value = (_narrowed(tensor, keys.dtype).view(torch.uint8) for tensor in (key, value))
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    keys.permute(0, 2, 1, 3).index_put_(places, key.to(keys.dtype))
    values.permute(0, 2, 1, 3).index_put_(places, value.to(values.dtype))


def is_narrow(cache: torch.Tensor) -> bool:
    """Whether a cache keeps 8-bit floats."""
    return cache.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def as_stored(tensor: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """Keys or values as the cache will give them back: a token sees its own chunk as later chunks see it."""
    return _narrowed(tensor, cache.dtype).to(tensor.dtype) if is_narrow(cache) else tensor


def _narrowed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max  # beyond it the conversion gives no number
    return tensor.clamp(-largest, largest).to(dtype)


def gather_blocks(cache: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of each sequence, head-major: cache [num_blocks, heads, block_size, dim], blocks [n, m] ->
    [n, heads, m * block_size, dim], contiguous, of type `dtype`."""
    _, num_heads, block_size, dim = cache.shape
    heads = torch.arange(num_heads, device=cache.device)
    index = blocks[:, None, :] * num_heads + heads[None, :, None]  # [n, heads, m]
    stored = cache.view(torch.uint8) if is_narrow(cache) else cache
    gathered = stored.view(-1, block_size * dim).index_select(0, index.reshape(-1)).view(cache.dtype)
    return gathered.view(blocks.shape[0], num_heads, -1, dim).to(dtype)
