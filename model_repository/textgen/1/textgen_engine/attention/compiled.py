"""Attention for the CPU with compiled kernels: decodes read each block of the paged cache once, in its place.

Chunks of prompts run as in sdpa.py. So does everything where the kernels do not apply: other types than float32, and
heads whose size is no multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textgen_engine.attention.base import AttentionBackend, AttentionFeatures, AttentionMetadata, Scoring
from textgen_engine.attention.sdpa import Chunk, SdpaBackend, attend_chunks, plan_chunks
from textgen_engine.kernels.cpu import HEAD_DIM_MULTIPLE, CpuKernels


@dataclass
class _CompiledPlan:
    """lengths: int64 [num_decodes], tokens of each decoding sequence."""

    lengths: torch.Tensor
    chunks: list[Chunk]


class CompiledBackend(AttentionBackend):
    """See the module's docstring."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels
        self._other = SdpaBackend()

    def check(self, features: AttentionFeatures) -> None:
        self._other.check(features)

    def prepare(self, metadata: AttentionMetadata) -> None:
        if all(_is_served(cache) for cache in (*metadata.keys, *metadata.values)):
            lengths = torch.tensor(metadata.seq_lens[: metadata.num_decodes], dtype=torch.int64)
            metadata.plan = _CompiledPlan(lengths, plan_chunks(metadata))
        else:
            self._other.prepare(metadata)

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring,
    ) -> torch.Tensor:
        plan = metadata.plan
        if not isinstance(plan, _CompiledPlan):
            return self._other.run(layer, query, key, value, metadata, scoring)
        keys, values = metadata.keys[layer], metadata.values[layer]
        query, key, value = (_dense(tensor) for tensor in (query, key, value))
        self._kernels.store(key, keys, metadata.slot_blocks, metadata.slot_offsets, finite=False)
        self._kernels.store(value, values, metadata.slot_blocks, metadata.slot_offsets, finite=True)
        output = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        if len(plan.lengths):
            self._kernels.decode(
                query,
                keys,
                values,
                metadata.block_tables,
                plan.lengths,
                output,
                scale=scoring.scale,
                sliding_window=scoring.sliding_window,
                chunk_size=scoring.chunk_size,
                soft_cap=scoring.soft_cap,
                sinks=scoring.sinks,
                alibi_slopes=scoring.alibi_slopes,
            )
        attend_chunks(output, query, key, value, keys, values, plan.chunks, scoring)
        return output


def _is_served(cache: torch.Tensor) -> bool:
    return (
        cache.dtype is torch.float32
        and cache.device.type == "cpu"
        and cache.is_contiguous()
        and cache.shape[3] % HEAD_DIM_MULTIPLE == 0
    )


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
