"""Every attention library that is installed, and the paged kernel, inside the backend against PyTorch's operations."""

from __future__ import annotations

from typing import Any

import torch

from textgen_engine.attention.base import AttentionMetadata, Scoring
from textgen_engine.attention.flash import make_backend
from textgen_engine.attention.libraries import find_libraries
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_gpu.checks import Check, Run

# (query rows, tokens) of each sequence: decodes, a chunk with a prefix, a whole prompt.
_MIXED = [(1, 1), (1, 700), (1, 4000), (100, 700), (300, 300)]
_FRESH = [(1, 33), (64, 64), (500, 500)]


def check_attention(run: Run, device: torch.device) -> None:
    """One check per library, block size, kind of step and scoring, in bfloat16."""
    libraries, absent = find_libraries()
    for reason in absent:
        run.add(Check("attention library", None, reason))
    sinks = torch.linspace(-1, 2, 8, device=device)
    scorings: list[dict[str, Any]] = [{}, {"sliding_window": 128}, {"sinks": sinks}]
    for forced in [*(library.name for library in libraries), "paged"]:
        backend = make_backend(device, forced)
        for block_size in (16, 256):
            for lengths in (_MIXED, _FRESH):
                for options in scorings:
                    scoring = Scoring(128**-0.5, **options)
                    results = []
                    for one in (backend, SdpaBackend()):
                        metadata, query, key, value = _step(lengths, block_size, device)
                        one.prepare(metadata)
                        results.append(one.run(0, query, key, value, metadata, scoring))
                    name = f"attention {forced} block {block_size} {'mixed' if lengths is _MIXED else 'fresh'}"
                    run.compare(f"{name} {' '.join(options)}".rstrip(), results[0], results[1], 2e-2)
        if forced != "paged":
            # PyTorch's operations took its place, wherever it did not pass its trial.
            reasons = [reason for choice in backend.choices if choice.prefill is None for reason in choice.reasons]
            unused = [reason for reason in reasons if reason.startswith(forced)]
            run.add(Check(f"attention {forced}: it serves all that it says it can", not unused, "; ".join(unused)))


def _step(
    lengths: list[tuple[int, int]], block_size: int, device: torch.device
) -> tuple[AttentionMetadata, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A step of random content with the metadata of one layer; queries, keys and values of its rows."""
    heads, kv_heads, dim, dtype = 8, 2, 128, torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    most = -(-max(seq_len for _, seq_len in lengths) // block_size)
    tables = torch.randperm(most * len(lengths), generator=generator).view(len(lengths), most)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    keys, values = (random(most * len(lengths), kv_heads, block_size, dim) for _ in range(2))
    spans = [torch.arange(seq_len - query_len, seq_len) for query_len, seq_len in lengths]
    blocks = torch.cat([tables[row, span // block_size] for row, span in enumerate(spans)])
    offsets = torch.cat([span % block_size for span in spans])
    metadata = AttentionMetadata(
        num_decodes=sum(query_len == 1 for query_len, _ in lengths),
        query_lens=[query_len for query_len, _ in lengths],
        seq_lens=[seq_len for _, seq_len in lengths],
        block_tables=tables.to(device),
        slot_blocks=blocks.to(device),
        slot_offsets=offsets.to(device),
        keys=[keys],
        values=[values],
    )
    num_rows = len(blocks)
    return metadata, random(num_rows, heads, dim), random(num_rows, kv_heads, dim), random(num_rows, kv_heads, dim)
