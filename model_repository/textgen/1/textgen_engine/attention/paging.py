"""Writing to and reading from the paged cache with PyTorch's own operations; shared by the backends that do so."""

from __future__ import annotations

import torch

from textgen_engine.attention.base import AttentionMetadata


def store(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, metadata: AttentionMetadata
) -> None:
    """Write a step's key and value [num_tokens, heads, dim] to their places in one layer's cache."""
    places = (metadata.slot_blocks, metadata.slot_offsets)
    keys.permute(0, 2, 1, 3).index_put_(places, key)
    # A hidden key weighs 0, but 0 times NaN is NaN: what a request that overflowed left in its blocks would reach the
    # next owners of those blocks, so only finite values are stored.
    values.permute(0, 2, 1, 3).index_put_(places, torch.nan_to_num(value))


def gather_blocks(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Blocks of each sequence, head-major: cache [num_blocks, heads, block_size, dim], blocks [n, m] ->
    [n, heads, m * block_size, dim], contiguous."""
    _, num_heads, block_size, dim = cache.shape
    heads = torch.arange(num_heads, device=cache.device)
    index = blocks[:, None, :] * num_heads + heads[None, :, None]  # [n, heads, m]
    gathered = cache.view(-1, block_size * dim).index_select(0, index.reshape(-1))
    return gathered.view(blocks.shape[0], num_heads, -1, dim)
