"""Tries an attention library on a few random rows before a model's layers are given to it.

A library may be built for another device or toolkit, or be called differently in its next version, and shows it only
when it runs. What fails here, or gives other results than PyTorch's operations, is passed over like one that is not
installed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from textgen_engine.attention.base import Scoring
from textgen_engine.attention.libraries import Need, Spans, VarlenLibrary
from textgen_engine.attention.scores import adjusted, hidden_keys, per_head, weights_of

# Why a library cannot be given layers with such a need on a device; None when it can.
Trial = Callable[[VarlenLibrary, Need, torch.device], str | None]

_QUERY_LENS, _SEQ_LENS = (5, 130, 1), (5, 130, 300)
_HEADS, _KV_HEADS = 8, 2
# Largest difference as a share of the largest result, which 16-bit weights and sums explain.
_TOLERANCE = 2e-2


@torch.inference_mode()
def try_library(library: VarlenLibrary, need: Need, device: torch.device) -> str | None:
    """A chunk from its text's begin, a longer one, and a decode: with keys behind one another, and in the paged cache
    where the library reads it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, need.dtype)

    query = random(sum(_QUERY_LENS), _HEADS, need.head_dim)
    keys, values = (random(sum(_SEQ_LENS), _KV_HEADS, dim) for dim in (need.head_dim, need.value_dim))
    scoring = _scoring(need, device)
    expected = _dense(query, keys, values, scoring)
    spans = Spans(
        _from_zero(_QUERY_LENS, device),
        _from_zero(_SEQ_LENS, device),
        torch.tensor(_SEQ_LENS, dtype=torch.int32, device=device),
        max(_QUERY_LENS),
        max(_SEQ_LENS),
    )
    ways = [(keys, values, spans)]
    if library.lacks_pages(need) is None:
        ways.append(_paged(keys, values, spans, need.block_size))
    for keys, values, spans in ways:
        try:
            output, log_sums = library.attend(query, keys, values, spans, scoring)
            if scoring.sinks is not None:
                output = output * torch.sigmoid(log_sums - scoring.sinks[:, None]).t()[..., None]
            error = float((output.float() - expected).abs().max() / expected.abs().max())
        except Exception as failure:  # whatever a library raises that was not made for this device or these calls
            if isinstance(failure, getattr(torch, "AcceleratorError", ())):
                raise  # nothing works on the device from now on
            return f"failed its trial ({type(failure).__name__}: {' '.join(str(failure).split())[:120]})"
        if not error <= _TOLERANCE:
            return f"its results on a trial differ by {error:.2g} of their size"
    return None


def _scoring(need: Need, device: torch.device) -> Scoring:
    features = need.features
    slopes = torch.linspace(0.01, 0.1, _HEADS, device=device)
    return Scoring(
        need.head_dim**-0.5,
        sliding_window=40 if features.sliding_window else None,
        chunk_size=64 if features.chunks else None,
        soft_cap=20.0 if features.soft_cap else None,
        sinks=torch.linspace(-1, 1, _HEADS, device=device) if features.sinks else None,
        alibi_slopes=slopes if features.alibi else None,
    )


def _dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """float32 [num_rows, num_heads, value_dim], one sequence after the other."""
    outputs = []
    queries = query.float().split(_QUERY_LENS)
    for rows, k, v in zip(queries, keys.float().split(_SEQ_LENS), values.float().split(_SEQ_LENS), strict=True):
        places = torch.arange(len(k), device=query.device)
        positions = places[len(k) - len(rows) :, None]
        grouped = rows.view(len(rows), _KV_HEADS, -1, rows.shape[2]).permute(1, 2, 0, 3)
        scores = grouped @ k.permute(1, 2, 0)[:, None] * scoring.scale  # [kv_heads, heads per kv head, rows, keys]
        slopes = per_head(scoring.alibi_slopes, scores)
        scores = adjusted(scores, positions, places, scoring.soft_cap, slopes)
        attended = weights_of(scores, hidden_keys(positions, places, scoring), scoring) @ v.permute(1, 0, 2)[:, None]
        outputs.append(attended.permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outputs)


def _paged(
    keys: torch.Tensor, values: torch.Tensor, spans: Spans, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, Spans]:
    """The same in blocks in another order, laid out as the cache has them."""
    counts = [-(-length // block_size) for length in _SEQ_LENS]
    order = torch.arange(sum(counts)).flip(0).split(counts)
    tables = torch.nn.utils.rnn.pad_sequence(order, batch_first=True).to(keys.device, torch.int32)

    def spread(rows: torch.Tensor) -> torch.Tensor:
        cache = rows.new_zeros(sum(counts), rows.shape[1], block_size, rows.shape[2]).transpose(1, 2)
        for part, blocks in zip(rows.split(_SEQ_LENS), order, strict=True):
            for index, block in enumerate(blocks.tolist()):
                piece = part[index * block_size : (index + 1) * block_size]
                cache[block, : len(piece)] = piece
        return cache

    paged = Spans(
        *(spans.cu_seqlens_q, spans.cu_seqlens_k, spans.seq_lens, spans.max_query_len, spans.max_seq_len),
        block_tables=tables,
    )
    return spread(keys), spread(values), paged


def _from_zero(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Running sums, int32 [n + 1]."""
    sums = torch.tensor((0, *lengths)).cumsum(0)
    return sums.to(device, torch.int32)
