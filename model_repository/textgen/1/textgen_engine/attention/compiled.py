"""Attention for the CPU with compiled kernels: each block of the paged cache is read where it lies.

Where the kernels do not apply (a cache of another type than CACHE_DTYPES, heads whose size is no multiple of 16)
everything runs as in sdpa.py.
"""

from __future__ import annotations

import torch

from textgen_engine.attention.base import AttentionBackend, AttentionFeatures, AttentionMetadata, Scoring
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.kernels.cpu_records import CACHE_DTYPES, HEAD_DIM_MULTIPLE, StepTables


class CompiledBackend(AttentionBackend):
    """See the module's docstring. A step's plan is its StepTables where the kernels apply; elsewhere all of
    its rows are computed."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels
        self._other = SdpaBackend()

    def check(self, features: AttentionFeatures) -> None:
        self._other.check(features)

    def prepare(self, metadata: AttentionMetadata) -> None:
        if all(_is_served(cache) for cache in (*metadata.keys, *metadata.values)):
            metadata.plan = StepTables(metadata)
        else:
            metadata.wanted_rows = None
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
        if not isinstance(plan, StepTables):
            return self._other.run(layer, query, key, value, metadata, scoring)
        rows = [_dense(tensor.float()) for tensor in (query, key, value)]
        cache = metadata.keys[layer], metadata.values[layer]
        in_bfloat16 = query.dtype is torch.bfloat16
        output = self._kernels.attend(rows[0], rows[1], rows[2], *cache, plan, scoring, in_bfloat16=in_bfloat16)
        return output.to(query.dtype)


def _is_served(cache: torch.Tensor) -> bool:
    return (
        cache.dtype in CACHE_DTYPES
        and cache.device.type == "cpu"
        and cache.is_contiguous()
        and cache.shape[3] % HEAD_DIM_MULTIPLE == 0
    )


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
