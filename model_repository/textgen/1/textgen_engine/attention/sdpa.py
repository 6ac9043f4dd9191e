"""Attention with PyTorch's own operations: the reference, and the CPU's path.

Decodes are batched: sequences of similar length are gathered from the cache into one padded tensor and attend in two
batched matrix products per group (PyTorch's scaled_dot_product_attention takes a slow path for one-row queries with
grouped heads). Chunks of prompts run one by one through scaled_dot_product_attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from textgen_engine.attention.base import AttentionBackend, AttentionFeatures, AttentionMetadata
from textgen_engine.attention.paging import gather_blocks, store
from textgen_engine.errors import ModelLoadError


@dataclass
class _DecodeGroup:
    """Decodes whose lengths differ by less than a factor of two.

    rows: int64 [n], query rows (None: all of the first n rows, in order). blocks: int64 [n, num_blocks].
    lengths: int64 [n, 1, 1, 1]; key_positions: int64 [num_blocks * block_size].
    """

    rows: torch.Tensor | None
    num_rows: int
    blocks: torch.Tensor
    lengths: torch.Tensor
    key_positions: torch.Tensor
    hidden: torch.Tensor  # bool [n, 1, 1, num_keys]: True where the key is past the sequence's end


@dataclass
class Chunk:
    """A chunk of one prompt: query rows [start, start + query_len), positions [seq_len - query_len, seq_len)."""

    start: int
    query_len: int
    seq_len: int
    blocks: torch.Tensor | None  # int64 [num_blocks]; None when the chunk is the whole sequence
    visible: torch.Tensor | None  # bool [query_len, seq_len]; None when the plain causal mask does


@dataclass
class _Plan:
    groups: list[_DecodeGroup]
    chunks: list[Chunk]


class SdpaBackend(AttentionBackend):
    """See the module's docstring. Works on any device, in any float type."""

    def check(self, features: AttentionFeatures) -> None:
        if features.soft_cap or features.sinks:
            lacking = "soft-capped scores" if features.soft_cap else "attention sinks"
            raise ModelLoadError(f"the SDPA attention backend does not support {lacking}, which this model needs")

    def prepare(self, metadata: AttentionMetadata) -> None:
        block_size = metadata.keys[0].shape[2]
        device = metadata.block_tables.device
        groups = []
        decode_lens = metadata.seq_lens[: metadata.num_decodes]
        for rows in _similar_lengths(decode_lens):
            num_blocks = -(-max(decode_lens[row] for row in rows) // block_size)
            lengths = torch.tensor([decode_lens[row] for row in rows], device=device).view(-1, 1, 1, 1)
            is_all = len(rows) == metadata.num_decodes
            index = torch.tensor(rows, device=device)
            blocks = metadata.block_tables[: metadata.num_decodes] if is_all else metadata.block_tables[index]
            positions = torch.arange(num_blocks * block_size, device=device)
            groups.append(
                _DecodeGroup(
                    None if is_all else index,
                    len(rows),
                    blocks[:, :num_blocks],
                    lengths,
                    positions,
                    positions >= lengths,
                )
            )
        metadata.plan = _Plan(groups, plan_chunks(metadata))

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        keys, values = metadata.keys[layer], metadata.values[layer]
        store(key, value, keys, values, metadata)
        plan = metadata.plan
        assert isinstance(plan, _Plan)
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for group in plan.groups:
            rows = query[: group.num_rows] if group.rows is None else query[group.rows]
            attended = _decode(rows, keys, values, group, scale, sliding_window)
            if group.rows is None:
                output[: group.num_rows] = attended
            else:
                output[group.rows] = attended
        attend_chunks(output, query, key, value, keys, values, plan.chunks, scale, sliding_window)
        return output


def plan_chunks(metadata: AttentionMetadata) -> list[Chunk]:
    """The step's chunks of prompts, for `attend_chunks`."""
    block_size = metadata.keys[0].shape[2]
    chunks = []
    start = metadata.num_decodes
    for i in range(metadata.num_decodes, len(metadata.seq_lens)):
        query_len, seq_len = metadata.query_lens[i], metadata.seq_lens[i]
        if query_len == seq_len:
            chunks.append(Chunk(start, query_len, seq_len, None, None))
        else:
            num_blocks = -(-seq_len // block_size)
            positions = torch.arange(seq_len, device=metadata.block_tables.device)
            visible = positions <= positions[seq_len - query_len :].view(-1, 1)
            chunks.append(Chunk(start, query_len, seq_len, metadata.block_tables[i, :num_blocks], visible))
        start += query_len
    return chunks


def attend_chunks(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunks: list[Chunk],
    scale: float,
    sliding_window: int | None,
) -> None:
    """Fill the chunks' rows of output [num_tokens, num_heads, value_dim]; the step's K and V are stored already."""
    for chunk in chunks:
        end = chunk.start + chunk.query_len
        output[chunk.start : end] = _prefill(
            query[chunk.start : end],
            key[chunk.start : end],
            value[chunk.start : end],
            keys,
            values,
            chunk,
            scale,
            sliding_window,
        )


def _similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Rows in groups whose lengths differ by less than a factor of two (padding costs at most as much as the work)."""
    if not lengths or max(lengths) < 2 * min(lengths) + 64:
        return [list(range(len(lengths)))] if lengths else []
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(max(length, 64).bit_length(), []).append(row)
    return list(groups.values())


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: _DecodeGroup,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """One query row per sequence: query [n, num_heads, dim] -> [n, num_heads, value_dim]."""
    num_rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    k = gather_blocks(keys, group.blocks)  # [n, kv_heads, num_keys, dim]
    v = gather_blocks(values, group.blocks)
    q = query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, dim) * scale
    scores = torch.matmul(q, k.transpose(2, 3))  # [n, kv_heads, heads per kv head, num_keys]
    hidden = group.hidden
    if sliding_window is not None:
        hidden = hidden | (group.key_positions < group.lengths - sliding_window)
    scores = scores.masked_fill_(hidden, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(weights, v).reshape(num_rows, num_heads, v.shape[3])


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: Chunk,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """One chunk: query [query_len, num_heads, dim] -> [query_len, num_heads, value_dim]."""
    if chunk.blocks is None:
        k, v = key.transpose(0, 1)[None], value.transpose(0, 1)[None]  # [1, kv_heads, seq_len, dim]
    else:
        k = gather_blocks(keys, chunk.blocks[None])[:, :, : chunk.seq_len]
        v = gather_blocks(values, chunk.blocks[None])[:, :, : chunk.seq_len]
    visible = chunk.visible
    if sliding_window is not None and chunk.seq_len > sliding_window:
        positions = torch.arange(chunk.seq_len, device=query.device)
        queries = positions[chunk.seq_len - chunk.query_len :].view(-1, 1)
        visible = (positions <= queries) & (positions > queries - sliding_window)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], k, v, attn_mask=visible, is_causal=visible is None, scale=scale
    )
    return attended[0].transpose(0, 1)
