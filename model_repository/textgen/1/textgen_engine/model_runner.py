"""Runs the model: `BatchInputs` in, logits out. Owns device, threads and the KV cache; knows no requests, no queues."""

from __future__ import annotations

import bisect
import logging
import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from textgen_engine.adapters.layers import AdapterLayers
from textgen_engine.attention.base import AttentionBackend
from textgen_engine.attention.flash import FlashBackend
from textgen_engine.batch import BatchInputs
from textgen_engine.config import CacheConfig
from textgen_engine.cuda_graphs import Capturer, DecodeGraphs
from textgen_engine.errors import ModelLoadError, RankFailure
from textgen_engine.host_memory import available_bytes, return_freed
from textgen_engine.kv_cache import KVCache, cache_dtype
from textgen_engine.models.dense import DenseFallback
from textgen_engine.models.loader import LoadedModel
from textgen_engine.parallel.group import Collectives
from textgen_engine.parallel.steps import CaptureGraphs, NewCache, encode_step

logger = logging.getLogger(__name__)


class ModelRunner:
    """One model on one device with its cache; with `ranks`, this rank's part of both, and on rank 0 the one that tells
    the others of its cache and of every step."""

    def __init__(
        self,
        loaded: LoadedModel,
        backend: AttentionBackend,
        cache: KVCache,
        adapters: AdapterLayers | None = None,
        ranks: Collectives | None = None,
    ) -> None:
        self._loaded = loaded
        self._backend = backend
        self._adapters = adapters
        self._ranks = ranks
        self._graphs: DecodeGraphs | None = None
        # transformers takes a mask of four dimensions for a finished one. Without any it makes one, and first asks the
        # device whether there are several texts, for which the host has to wait.
        self._no_mask = None if loaded.reads_masks else torch.zeros(1, 1, 1, 1, device=loaded.device)
        self.cache = cache
        self.device = loaded.device
        if ranks is not None and ranks.rank == 0:
            has_scratch = cache.scratch_block is not None
            ranks.send(NewCache(cache.num_blocks, cache.block_size, cache.keys[0].dtype, has_scratch))

    def capture_graphs(self, sizes: tuple[int, ...], max_seq_len: int, capturer: Capturer) -> None:
        """Let decode steps of up to so many rows be replayed. A model that cannot be captured (its forward looks at
        values on the host, say) runs step by step as before. All ranks capture, on rank 0's word, or none does, since
        sums are part of the graphs. Raises RankFailure when one is lost meanwhile."""
        if isinstance(self._loaded.model, DenseFallback):
            logger.info("no decode graphs: steps of a model without a cache are not captured")
            return
        if self._ranks is not None and self._ranks.rank == 0:
            self._ranks.send(CaptureGraphs(sizes, max_seq_len))
        graphs: DecodeGraphs | None = None
        try:
            graphs = DecodeGraphs(self._decode_all, self.cache, sizes, max_seq_len, self.device, capturer)
        except (RuntimeError, NotImplementedError, RankFailure) as error:
            # RankFailure, too: a sum that cannot be captured is one. Whether all are still there shows below.
            logger.warning("no decode graphs, every step is launched kernel by kernel: %s", error)
        if self._ranks is not None and not self._ranks.agree(graphs is not None):
            graphs = None
        self._graphs = graphs
        if graphs is None:
            self.release_unused_memory()

    def forward(
        self, inputs: BatchInputs, copies: Iterable[tuple[int, int]], graph_size: int | None = None
    ) -> torch.Tensor:
        """One step: copy blocks, store K and V, return float32 logits [num_rows, vocab] of inputs.logits_rows (on rank
        0; what the others return is only their part). graph_size: on the other ranks, which captured step rank 0 said
        that all replay. Raises RankFailure when the ranks can no longer work together, which is so after any error
        inside a step."""
        copies = list(copies)
        if self._graphs is not None and (self._ranks is None or self._ranks.rank == 0):
            graph_size = self._graphs.size_for(inputs)
        if self._ranks is None:
            return self._forward(inputs, copies, graph_size)
        try:
            if self._ranks.rank == 0:
                self._ranks.send(encode_step(inputs, copies, graph_size))
            return self._forward(inputs, copies, graph_size)
        except RankFailure:
            raise
        except Exception as error:  # the other ranks are in the midst of the step, and nobody can call them back
            raise RankFailure(f"rank {self._ranks.rank} failed in a step ({type(error).__name__}: {error})") from error

    @torch.inference_mode()
    def _forward(self, inputs: BatchInputs, copies: list[tuple[int, int]], graph_size: int | None) -> torch.Tensor:
        self.cache.copy_blocks(copies)
        if graph_size is not None:
            assert self._graphs is not None
            logits = self._graphs.run(inputs, graph_size)
            in_order = inputs.lists is not None and inputs.lists.logits_rows == list(range(len(logits)))
            return logits if in_order else logits[inputs.logits_rows]
        return self._run_model(inputs)

    @torch.inference_mode()
    def _decode_all(self, inputs: BatchInputs) -> torch.Tensor:
        """What a graph is captured of."""
        logits = self._run_model(inputs)
        if not (isinstance(self._backend, FlashBackend) and self._backend.fits_graphs):
            raise NotImplementedError("some of its layers attend in PyTorch's operations")
        return logits

    def _run_model(self, inputs: BatchInputs) -> torch.Tensor:
        num_rows, metadata = len(inputs.logits_rows), inputs.attention
        rows: list[int] = []
        if self._loaded.leaves_out_rows and inputs.lists is not None:
            rows = inputs.lists.logits_rows
            wanted = sorted(set(rows)) or [0]  # an empty matrix product is an error in some kernels
            # Each attends by itself, which costs more than a chunk's rows do together.
            metadata.wanted_rows = wanted if 2 * len(wanted) <= len(inputs.input_ids) else None
        self._backend.prepare(metadata)
        if metadata.wanted_rows is not None:
            logits = self._logits(inputs, 0)
            return logits if rows == wanted else logits[[bisect.bisect_left(wanted, row) for row in rows]]
        if self._loaded.takes_logits_rows:
            # A step without rows to sample still asks for one, for the same reason.
            return self._logits(inputs, inputs.logits_rows if num_rows else 1)[:num_rows]
        return self._logits(inputs, None)[inputs.logits_rows]

    def _logits(self, inputs: BatchInputs, to_keep: torch.Tensor | int | None) -> torch.Tensor:
        """Float32 logits of the rows `to_keep` of what the last layer gives: 0 all of them, 1 the last one; None: the
        model does not take it, and gives all."""
        takes_rows = self._loaded.takes_logits_rows
        if self._adapters is not None:
            self._adapters.begin_step(inputs.adapters, head_takes_logits_rows=takes_rows)
        output = self._loaded.model(
            input_ids=inputs.input_ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            attention_mask=self._no_mask,
            attention_metadata=inputs.attention,
            attention_backend=self._backend,
            **({} if to_keep is None else {"logits_to_keep": to_keep}),
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def release_unused_memory(self) -> None:
        """Give the device what its allocator keeps for later; for use after a step that ran out of memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class RankMemory:
    """What one rank can give to the cache, and what a block takes of it.

    place: ranks with the same place share one memory (the CPU's). budget_bytes: what is left beside the rank's own
    largest step, by memory_fraction.
    """

    place: str
    budget_bytes: int
    step_bytes: int
    bytes_per_block: int


def rank_memory(config: CacheConfig, loaded: LoadedModel, step_bytes: int) -> RankMemory:
    """This rank's memory, now, beside a step's own step_bytes."""
    dtype = cache_dtype(config, loaded.dtype)
    bytes_per_block = config.block_size * sum(layer.bytes_per_token(dtype) for layer in loaded.layers)
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()  # the measured step's memory, which would count as taken and as needed
        free, total = torch.cuda.mem_get_info(loaded.device)
        budget = int(free - total * (1 - config.memory_fraction)) - step_bytes
        return RankMemory(f"{socket.gethostname()} {loaded.device}", budget, step_bytes, bytes_per_block)
    return_freed()  # the largest step's
    available = int(available_bytes() * config.memory_fraction) - step_bytes
    # A step of long sequences gathers up to twice the K and V of one layer (attention/sdpa.py pads by less than 2).
    budget = int(available / (1 + 2 / len(loaded.layers)))
    return RankMemory(socket.gethostname(), budget, step_bytes, bytes_per_block)


def num_cache_blocks(config: CacheConfig, ranks: list[RankMemory], *, is_cpu: bool, max_useful_tokens: int) -> int:
    """Blocks of the KV cache where config.num_blocks does not say: what the free memory holds on each rank (on the CPU
    in all, and at most max_cache_bytes), but no more than all sequences at their longest fill."""
    sharing = Counter(rank.place for rank in ranks)
    num_blocks = -(-max_useful_tokens // config.block_size)
    for rank in ranks:
        together = [other for other in ranks if other.place == rank.place]
        budget = rank.budget_bytes - (sharing[rank.place] - 1) * rank.step_bytes
        if is_cpu:
            budget = min(budget, config.max_cache_bytes)
        bytes_per_block = sum(other.bytes_per_block for other in together)
        num_blocks = min(num_blocks, budget // bytes_per_block)
        if num_blocks < 2:
            raise ModelLoadError(
                f"not enough memory for a KV cache: {max(budget, 0) / 2**20:.0f} MiB are left, "
                f"one block of {config.block_size} tokens takes {bytes_per_block / 2**20:.1f} MiB"
            )
    return num_blocks
