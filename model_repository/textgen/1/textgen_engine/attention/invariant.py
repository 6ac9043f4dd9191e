"""Attention whose result for a token is the same to the last bit, however the token came to be computed.

Float addition is not associative: a matrix product may add in another order when it has more rows or more keys, so a
token's hidden state usually differs in the last bits between batches, chunks and restarts. Here every product has the
same shape, whatever the batch: tiles of 16 query rows against runs of 256 keys, added up run by run (the online
softmax of Milakov and Gimelshein 2018). Keys a row may not see add exact zeros.

For the CPU, and slower than sdpa.py; chosen by the option `batch_invariant`.
"""

from __future__ import annotations

import torch

from textgen_engine.attention.base import AttentionBackend, AttentionFeatures, AttentionMetadata, Scoring
from textgen_engine.attention.paging import gather_blocks, store
from textgen_engine.attention.scores import adjusted, hidden_keys

_TILE_ROWS = 16
_RUN_KEYS = 256


class InvariantBackend(AttentionBackend):
    """See the module's docstring."""

    def check(self, features: AttentionFeatures) -> None:
        pass

    def prepare(self, metadata: AttentionMetadata) -> None:
        pass

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
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        start = 0
        for i, (query_len, seq_len) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
            blocks = metadata.block_tables[i : i + 1, : -(-seq_len // keys.shape[2])]
            output[start : start + query_len] = _attend(
                query[start : start + query_len],
                _whole_runs(gather_blocks(keys, blocks, query.dtype)[0]),
                _whole_runs(gather_blocks(values, blocks, query.dtype)[0]),
                seq_len - query_len,
                scoring,
            )
            start += query_len
        return output


def _whole_runs(gathered: torch.Tensor) -> torch.Tensor:
    """[kv_heads, num_keys, dim], zero-padded to whole runs of keys."""
    return torch.nn.functional.pad(gathered, (0, 0, 0, -gathered.shape[1] % _RUN_KEYS))


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first_position: int, scoring: Scoring
) -> torch.Tensor:
    """query [rows, heads, dim], at positions first_position + row; keys, values [kv_heads, whole runs, dim]
    -> [rows, heads, value_dim]."""
    num_rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    padding = -(num_rows * group) % _TILE_ROWS
    scaled = (query * scoring.scale).view(num_rows, num_kv_heads, group, dim)
    tiles = scaled.transpose(0, 1).reshape(num_kv_heads, -1, dim)
    tiles = torch.nn.functional.pad(tiles, (0, 0, 0, padding)).view(num_kv_heads, -1, _TILE_ROWS, dim)
    num_tiles = tiles.shape[1]
    rows = torch.arange(num_rows * group + padding, device=query.device)  # of all heads that share keys, head by head
    positions = (rows // group + first_position).view(1, num_tiles, _TILE_ROWS, 1)

    def per_row(values: torch.Tensor) -> torch.Tensor:  # [num_heads] -> [kv_heads, tiles, _TILE_ROWS, 1]
        return values.view(num_kv_heads, group)[:, rows % group].view(num_kv_heads, num_tiles, _TILE_ROWS, 1)

    slopes = None if scoring.alibi_slopes is None else per_row(scoring.alibi_slopes)
    if scoring.sinks is None:
        highest = query.new_full((num_kv_heads, num_tiles, _TILE_ROWS, 1), float("-inf"))
        total = torch.zeros_like(highest)
    else:  # as if a run before the first had held the sink alone
        highest = per_row(scoring.sinks).to(query.dtype)
        total = torch.ones_like(highest)
    output = query.new_zeros(num_kv_heads, num_tiles, _TILE_ROWS, values.shape[2])
    for begin in range(0, keys.shape[1], _RUN_KEYS):
        run_keys = keys[:, None, begin : begin + _RUN_KEYS].expand(-1, num_tiles, -1, -1)
        run_values = values[:, None, begin : begin + _RUN_KEYS].expand(-1, num_tiles, -1, -1)
        scores = torch.matmul(tiles, run_keys.transpose(2, 3))  # [kv_heads, tiles, _TILE_ROWS, _RUN_KEYS]
        key_positions = torch.arange(begin, begin + _RUN_KEYS, device=query.device)
        scores = adjusted(scores, positions, key_positions, scoring.soft_cap, slopes)
        scores = scores.masked_fill(hidden_keys(positions, key_positions, scoring), float("-inf"))
        new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
        # Before a row has seen any key its highest score is -inf, and -inf - -inf would be NaN.
        reference = new_highest.clamp(min=torch.finfo(scores.dtype).min)
        weights = torch.exp(scores - reference)
        correction = torch.exp(highest - reference)
        total = total * correction + weights.sum(-1, keepdim=True)
        output = output * correction + torch.matmul(weights, run_values)
        highest = new_highest
    output = (output / total).view(num_kv_heads, -1, values.shape[2])[:, : num_rows * group]
    return output.view(num_kv_heads, num_rows, group, -1).transpose(0, 1).reshape(num_rows, num_heads, -1)
