"""Runs the model: `BatchInputs` in, logits out. Owns device, threads and the KV cache; knows no requests, no queues."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from textgen_engine.adapters.layers import AdapterLayers
from textgen_engine.attention.base import AttentionBackend
from textgen_engine.batch import BatchInputs
from textgen_engine.config import CacheConfig
from textgen_engine.errors import ModelLoadError
from textgen_engine.host_memory import available_bytes
from textgen_engine.kv_cache import KVCache
from textgen_engine.models.loader import LoadedModel


class ModelRunner:
    """One model on one device with its cache."""

    def __init__(
        self, loaded: LoadedModel, backend: AttentionBackend, cache: KVCache, adapters: AdapterLayers | None = None
    ) -> None:
        self._loaded = loaded
        self._backend = backend
        self._adapters = adapters
        self.cache = cache
        self.device = loaded.device

    @torch.inference_mode()
    def forward(self, inputs: BatchInputs, copies: Iterable[tuple[int, int]]) -> torch.Tensor:
        """One step: copy blocks, store K and V, return float32 logits [num_rows, vocab] of inputs.logits_rows."""
        self.cache.copy_blocks(copies)
        self._backend.prepare(inputs.attention)
        takes_rows = self._loaded.takes_logits_rows
        if self._adapters is not None:
            self._adapters.begin_step(inputs.adapters, head_takes_logits_rows=takes_rows)
        output = self._loaded.model(
            input_ids=inputs.input_ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            attention_metadata=inputs.attention,
            attention_backend=self._backend,
            # A step without rows to sample still asks for one: an empty matrix product is an error in some kernels.
            **({"logits_to_keep": inputs.logits_rows if len(inputs.logits_rows) else 1} if takes_rows else {}),
        )
        logits: torch.Tensor = output.logits[0]
        if not takes_rows:
            logits = logits[inputs.logits_rows]
        return logits[: len(inputs.logits_rows)].float()

    def release_unused_memory(self) -> None:
        """Give the device what its allocator keeps for later; for use after a step that ran out of memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def num_cache_blocks(config: CacheConfig, loaded: LoadedModel, *, max_useful_tokens: int, step_bytes: int) -> int:
    """Blocks of the KV cache where config.num_blocks does not say: what memory_fraction of the free memory holds beside
    a step's own step_bytes (and, on the CPU, max_cache_bytes), but no more than all sequences at their longest fill."""
    bytes_per_block = config.block_size * sum(layer.bytes_per_token(loaded.dtype) for layer in loaded.layers)
    if loaded.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(loaded.device)
        budget = int(free - total * (1 - config.memory_fraction)) - step_bytes
    else:
        available = int(available_bytes() * config.memory_fraction) - step_bytes
        # A step of long sequences gathers up to twice the K and V of one layer (attention/sdpa.py pads by less than 2).
        budget = min(int(available / (1 + 2 / len(loaded.layers))), config.max_cache_bytes)
    num_blocks = min(budget // bytes_per_block, -(-max_useful_tokens // config.block_size))
    if num_blocks < 2:
        raise ModelLoadError(
            f"not enough memory for a KV cache: {max(budget, 0) / 2**20:.0f} MiB are left, "
            f"one block of {config.block_size} tokens takes {bytes_per_block / 2**20:.1f} MiB"
        )
    return num_blocks
