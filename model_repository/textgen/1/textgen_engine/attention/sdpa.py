"""Attention with PyTorch's own operations: the reference, and the CPU's path.

Decodes are batched: sequences of similar length are gathered from the cache into one padded tensor and attend in two
batched matrix products per group (PyTorch's scaled_dot_product_attention takes a slow path for one-row queries with
grouped heads). Chunks of prompts run one by one through scaled_dot_product_attention, or, where a layer caps its scores
or has sinks or ALiBi, through matrix products over tiles of query rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from textgen_engine.attention.base import AttentionBackend, AttentionFeatures, AttentionMetadata, Scoring
from textgen_engine.attention.paging import as_stored, gather_blocks, store
from textgen_engine.attention.scores import adjusted, hidden_keys, per_head, weights_of

# Scores that one tile of a chunk may take at most: 64 MiB as float32.
_TILE_SCORES = 1 << 24


@dataclass
class _DecodeGroup:
    """Decodes whose lengths differ by less than a factor of two.

    rows: int64 [n], query rows (None: all of the first n rows, in order). blocks: int64 [n, num_blocks].
    positions: int64 [n, 1, 1, 1, 1], of the queries; key_positions: int64 [num_blocks * block_size].
    """

    rows: torch.Tensor | None
    num_rows: int
    blocks: torch.Tensor
    positions: torch.Tensor
    key_positions: torch.Tensor


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
        pass

    def prepare(self, metadata: AttentionMetadata) -> None:
        block_size = metadata.keys[0].shape[2]
        device = metadata.block_tables.device
        groups = []
        decode_lens = metadata.seq_lens[: metadata.num_decodes]
        for rows in _similar_lengths(decode_lens):
            num_blocks = -(-max(decode_lens[row] for row in rows) // block_size)
            positions = torch.tensor([decode_lens[row] - 1 for row in rows], device=device).view(-1, 1, 1, 1, 1)
            is_all = len(rows) == metadata.num_decodes
            index = torch.tensor(rows, device=device)
            blocks = metadata.block_tables[: metadata.num_decodes] if is_all else metadata.block_tables[index]
            key_positions = torch.arange(num_blocks * block_size, device=device)
            groups.append(
                _DecodeGroup(None if is_all else index, len(rows), blocks[:, :num_blocks], positions, key_positions)
            )
        metadata.plan = _Plan(groups, plan_chunks(metadata))

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring,
    ) -> torch.Tensor:
        keys, values = metadata.keys[layer], metadata.values[layer]
        store(key, value, keys, values, metadata)
        key, value = as_stored(key, keys), as_stored(value, values)
        plan = metadata.plan
        assert isinstance(plan, _Plan)
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        for group in plan.groups:
            rows = query[: group.num_rows] if group.rows is None else query[group.rows]
            attended = _decode(rows, keys, values, group, scoring)
            if group.rows is None:
                output[: group.num_rows] = attended
            else:
                output[group.rows] = attended
        attend_chunks(output, query, key, value, keys, values, plan.chunks, scoring)
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
    scoring: Scoring,
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
            scoring,
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
    scoring: Scoring,
) -> torch.Tensor:
    """One query row per sequence: query [n, num_heads, dim] -> [n, num_heads, value_dim]."""
    num_rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    k = gather_blocks(keys, group.blocks, query.dtype)  # [n, kv_heads, num_keys, dim]
    v = gather_blocks(values, group.blocks, query.dtype)
    q = query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, dim) * scoring.scale
    scores = torch.matmul(q, k.transpose(2, 3)).unsqueeze(3)  # [n, kv_heads, heads per kv head, 1, num_keys]
    slopes = per_head(scoring.alibi_slopes, scores)
    scores = adjusted(scores, group.positions, group.key_positions, scoring.soft_cap, slopes)
    hidden = hidden_keys(group.positions, group.key_positions, scoring)
    weights = weights_of(scores, hidden, scoring).squeeze(3).to(v.dtype)
    return torch.matmul(weights, v).reshape(num_rows, num_heads, v.shape[3])


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: Chunk,
    scoring: Scoring,
) -> torch.Tensor:
    """One chunk: query [query_len, num_heads, dim] -> [query_len, num_heads, value_dim]."""
    if chunk.blocks is None:
        k, v = key.transpose(0, 1)[None], value.transpose(0, 1)[None]  # [1, kv_heads, seq_len, dim]
    else:
        k = gather_blocks(keys, chunk.blocks[None], key.dtype)[:, :, : chunk.seq_len]
        v = gather_blocks(values, chunk.blocks[None], value.dtype)[:, :, : chunk.seq_len]
    positions = torch.arange(chunk.seq_len, device=query.device)
    queries = positions[chunk.seq_len - chunk.query_len :].view(-1, 1)
    if scoring.soft_cap is not None or scoring.sinks is not None or scoring.alibi_slopes is not None:
        return _prefill_by_tiles(query, k[0], v[0], queries, positions, scoring)
    visible = chunk.visible
    if scoring.first_visible(chunk.seq_len - 1) > 0:
        visible = ~hidden_keys(queries, positions, scoring)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], k, v, attn_mask=visible, is_causal=visible is None, scale=scoring.scale
    )
    return attended[0].transpose(0, 1)


def _prefill_by_tiles(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """query [rows, heads, dim] at query_positions [rows, 1], keys and values [kv_heads, num_keys, dim] ->
    [rows, heads, value_dim]."""
    num_rows, num_heads, dim = query.shape
    num_kv_heads, num_keys, value_dim = values.shape
    group = num_heads // num_kv_heads
    output = query.new_empty(num_rows, num_heads, value_dim)
    tile_rows = max(1, _TILE_SCORES // (num_heads * num_keys))
    for begin in range(0, num_rows, tile_rows):
        rows = query[begin : begin + tile_rows]
        positions = query_positions[begin : begin + tile_rows]
        q = rows.view(-1, num_kv_heads, group, dim).permute(1, 2, 0, 3) * scoring.scale  # [kv_heads, group, rows, dim]
        scores = torch.matmul(q.reshape(num_kv_heads, -1, dim), keys.transpose(1, 2))
        scores = scores.view(num_kv_heads, group, -1, num_keys)
        slopes = per_head(scoring.alibi_slopes, scores)
        scores = adjusted(scores, positions, key_positions, scoring.soft_cap, slopes)
        weights = weights_of(scores, hidden_keys(positions, key_positions, scoring), scoring).to(values.dtype)
        attended = torch.matmul(weights.view(num_kv_heads, -1, num_keys), values)
        output[begin : begin + tile_rows] = (
            attended.view(num_kv_heads, group, -1, value_dim).permute(2, 0, 1, 3).reshape(-1, num_heads, value_dim)
        )
    return output
