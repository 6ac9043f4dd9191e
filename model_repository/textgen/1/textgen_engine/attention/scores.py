"""Scores to weights with PyTorch's operations: what `Scoring` asks for beyond scaled products."""

from __future__ import annotations

import torch

from textgen_engine.attention.base import Scoring


def hidden_keys(query_positions: torch.Tensor, key_positions: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Bool [..., rows, keys], True where a key may not be seen: query_positions [..., rows, 1], key_positions [keys]
    (or anything that broadcasts like that)."""
    hidden = key_positions > query_positions
    if scoring.sliding_window is not None:
        hidden = hidden | (key_positions <= query_positions - scoring.sliding_window)
    if scoring.chunk_size is not None:
        hidden = hidden | (key_positions < query_positions // scoring.chunk_size * scoring.chunk_size)
    return hidden


def adjusted(
    scores: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    soft_cap: float | None,
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Scaled scores [..., rows, keys] with soft cap and ALiBi; positions and slopes broadcast to them. Not masked."""
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    if alibi_slopes is not None:
        scores = scores + alibi_slopes * (key_positions - query_positions).to(torch.float32)
    return scores


def weights_of(scores: torch.Tensor, hidden: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Softmax in float32 over the last dimension of [..., kv_heads, heads per kv head, rows, keys]."""
    scores = scores.masked_fill(hidden, float("-inf"))
    if scoring.sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    sinks = per_head(scoring.sinks, scores)
    assert sinks is not None
    sinks = sinks.expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores.float(), sinks.float()), dim=-1), dim=-1)[..., :-1]


def per_head(values: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor | None:
    """[num_heads] shaped so that it broadcasts over scores [..., kv_heads, heads per kv head, rows, keys]."""
    return None if values is None else values.view(*scores.shape[-4:-2], 1, 1)
