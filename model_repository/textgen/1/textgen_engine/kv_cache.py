"""The K and V tensors of the paged cache, one pair per layer, and nothing else.

Block ids and who owns them belong to block_manager.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from textgen_engine.config import CacheConfig
from textgen_engine.errors import ModelLoadError
from textgen_engine.mapped_memory import WeightMemory, populate

_POPULATING_NICENESS = 10


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores per token: `num_kv_heads` vectors of `head_dim` (K) and `value_dim` (V)."""

    num_kv_heads: int
    head_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.head_dim + self.value_dim) * dtype.itemsize


def cache_dtype(config: CacheConfig, dtype: torch.dtype) -> torch.dtype:
    """What the cache of a model of type `dtype` keeps."""
    return {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}.get(config.dtype, dtype)


class KVCache:
    """`keys[layer]` and `values[layer]`: [num_blocks, num_kv_heads, block_size, head_dim or value_dim].

    The tensors are zeros. On a CPU they lie in huge pages: attention reads blocks here and there, and would wait for
    addresses more than for what is there. Their memory comes with its first use, or by populate().

    has_scratch: they have one block more, scratch_block, for what is written and never read; no sequence owns it.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        has_scratch: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.scratch_block = num_blocks if has_scratch else None
        total = num_blocks + has_scratch
        shapes: list[tuple[int, ...]] = [
            (total, shape.num_kv_heads, block_size, dim)
            for shape in layers
            for dim in (shape.head_dim, shape.value_dim)
        ]
        try:
            tensors = _zeros(shapes, dtype, device)
        except (RuntimeError, MemoryError, OSError) as error:
            size = num_blocks * block_size * sum(s.bytes_per_token(dtype) for s in layers)
            raise ModelLoadError(
                f"not enough memory for a KV cache of {num_blocks * block_size} tokens ({size / 2**30:.1f} GiB); "
                f"lower MAX_BATCH_TOTAL_TOKENS"
            ) from error
        self.keys, self.values = tensors[::2], tensors[1::2]

    def populate(self) -> None:
        """Have the system give the whole cache its memory, which takes a second per GiB or more. Others may use the
        cache meanwhile."""
        for tensor in (*self.keys, *self.values):
            if tensor.device.type == "cpu":
                populate(tensor)

    def populate_aside(self) -> None:
        """The same on a thread that gives way to whatever else wants the processor. (On Linux a thread has a priority
        of its own.)"""

        def run() -> None:
            with contextlib.suppress(OSError, AttributeError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _POPULATING_NICENESS)
            self.populate()

        threading.Thread(target=run, name="kv-cache-memory", daemon=True).start()

    def copy_blocks(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination), in the order given."""
        for source, destination in copies:
            for tensor in (*self.keys, *self.values):
                tensor[destination].copy_(tensor[source])


def _zeros(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    if device.type != "cpu":
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    memory = WeightMemory()
    return [memory.zeros(shape, dtype) for shape in shapes]
