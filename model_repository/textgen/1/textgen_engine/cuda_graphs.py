"""Decode steps as CUDA graphs: captured once per batch size at start-up, replayed with one call per step.

A step of few rows takes the host longer to launch, kernel by kernel, than the device to run. A graph launches all of it
at once, but always the same: the same addresses and the same number of rows. So a step's inputs are copied into buffers
that stay, and a step of n rows is filled up to the next captured size:

    rows     |---- n sequences ----|---- padding ----|      of the next captured size
    padding  token 0 at position 0 of a text of length 1, whose block is the cache's scratch block

Padded rows write keys and values to the scratch block, which no sequence owns, and their logits are never read. Rows do
not look at one another, so padding changes nothing in the others. All graphs share one memory pool, which the largest
one, captured first, sizes.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from textgen_engine.attention.base import AttentionMetadata
from textgen_engine.batch import BatchInputs
from textgen_engine.kv_cache import KVCache

logger = logging.getLogger(__name__)


class Replay(Protocol):
    """Does the captured work again, on the same buffers, into the same output."""

    def __call__(self) -> None: ...


class Capturer(Protocol):
    """Captures work that touches buffers alone: returns what repeats it, and the output that each repetition fills."""

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]: ...


class CudaCapturer:
    """Graphs of one device, in one pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        # Once outside the capture: kernels are compiled and libraries initialized, neither of which can be captured.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads' calls, a pinned allocation say, are none of the capture's business.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = work()
        return graph.replay, output


@dataclass(frozen=True, eq=False)
class _Buffers:
    """The inputs of the largest captured step; a smaller one has their first rows."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    slot_blocks: torch.Tensor
    slot_offsets: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    logits_rows: torch.Tensor

    @classmethod
    def allocate(cls, num_rows: int, max_blocks: int, scratch_block: int, device: torch.device) -> _Buffers:
        def filled(value: int) -> torch.Tensor:
            return torch.full((num_rows,), value, dtype=torch.int64, device=device)

        return cls(
            input_ids=filled(0),
            positions=filled(0),
            slot_blocks=filled(scratch_block),
            slot_offsets=filled(0),
            seq_lens=torch.ones(num_rows, dtype=torch.int32, device=device),
            block_tables=torch.full((num_rows, max_blocks), scratch_block, dtype=torch.int32, device=device),
            logits_rows=torch.arange(num_rows, device=device),
        )


class DecodeGraphs:
    """The captured steps of one model on one cache."""

    def __init__(
        self,
        forward: Callable[[BatchInputs], torch.Tensor],
        cache: KVCache,
        sizes: tuple[int, ...],
        max_seq_len: int,
        device: torch.device,
        capturer: Capturer,
    ) -> None:
        """forward: logits float32 [num_rows, vocab] of a step, everything in it on the device. Raises what `forward`
        raises where a step cannot be captured."""
        assert sizes and cache.scratch_block is not None
        self._sizes = sorted(sizes)
        self._scratch = cache.scratch_block
        self._block_size = cache.block_size
        num_rows, max_blocks = self._sizes[-1], -(-max_seq_len // cache.block_size)
        self._buffers = _Buffers.allocate(num_rows, max_blocks, self._scratch, device)
        self._graphs: dict[int, tuple[Replay, torch.Tensor]] = {}
        started_s = time.monotonic()
        # One row of a short text first: what cannot be captured says so before anything is run at its largest.
        forward(self._inputs(1, 1, cache))
        for size in reversed(self._sizes):
            inputs = self._inputs(size, max_seq_len, cache)
            self._graphs[size] = capturer(lambda inputs=inputs: forward(inputs))  # type: ignore[misc]
        logger.info("%d decode graphs captured in %.1f s", len(self._graphs), time.monotonic() - started_s)

    def size_for(self, inputs: BatchInputs) -> int | None:
        """The captured size that serves the step; None for one that has to run as it is."""
        attention = inputs.attention
        num_rows = len(attention.seq_lens)
        if num_rows != attention.num_decodes or num_rows > self._sizes[-1] or len(inputs.logits_rows) != num_rows:
            return None
        if inputs.adapters is not None or attention.block_tables.shape[1] > self._buffers.block_tables.shape[1]:
            return None
        return self._sizes[bisect.bisect_left(self._sizes, num_rows)]

    def run(self, inputs: BatchInputs, size: int) -> torch.Tensor:
        """Logits float32 [num_rows, vocab] of all rows in their order; valid until the next call."""
        attention, buffers, num_rows = inputs.attention, self._buffers, len(inputs.attention.seq_lens)
        buffers.input_ids[:num_rows].copy_(inputs.input_ids)
        buffers.positions[:num_rows].copy_(inputs.positions)
        buffers.slot_blocks[:num_rows].copy_(attention.slot_blocks)
        buffers.slot_offsets[:num_rows].copy_(attention.slot_offsets)
        # A decode is the last token of its text; behind its length nothing of its table is read.
        torch.add(inputs.positions, 1, out=buffers.seq_lens[:num_rows])
        buffers.block_tables[:num_rows, : attention.block_tables.shape[1]].copy_(attention.block_tables)
        if size > num_rows:
            buffers.input_ids[num_rows:size].zero_()
            buffers.positions[num_rows:size].zero_()
            buffers.slot_blocks[num_rows:size].fill_(self._scratch)
            buffers.slot_offsets[num_rows:size].zero_()
            buffers.seq_lens[num_rows:size].fill_(1)
            buffers.block_tables[num_rows:size, :1].fill_(self._scratch)
        replay, output = self._graphs[size]
        replay()
        return output[:num_rows]

    def _inputs(self, size: int, max_seq_len: int, cache: KVCache) -> BatchInputs:
        buffers = self._buffers
        return BatchInputs(
            input_ids=buffers.input_ids[:size],
            positions=buffers.positions[:size],
            attention=AttentionMetadata(
                num_decodes=size,
                query_lens=[1] * size,
                seq_lens=[max_seq_len] * size,  # what kernels have to be launched for
                block_tables=buffers.block_tables[:size],
                slot_blocks=buffers.slot_blocks[:size],
                slot_offsets=buffers.slot_offsets[:size],
                keys=cache.keys,
                values=cache.values,
                device_seq_lens=buffers.seq_lens[:size],
            ),
            logits_rows=buffers.logits_rows[:size],
            sampled=[],
            prompt_scored=[],
        )
