"""cuda_graphs.py on the CPU: the padded path with a double that repeats the captured work in place of a graph.

The double does what a graph does as far as rows can tell: the same work on the same buffers, into the same output. So
padding, buffers that keep old steps' rows, and the scratch block are tested here; that CUDA replays what it captured is
for scripts/gpu_check.py.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from textgen_engine.attention.base import AttentionMetadata
from textgen_engine.attention.flash import FlashBackend, GpuTraits, PagedKernel
from textgen_engine.batch import BatchInputs
from textgen_engine.cuda_graphs import DecodeGraphs, Replay
from textgen_engine.engine import Engine
from textgen_engine.kv_cache import KVCache
from textgen_engine.model_runner import ModelRunner
from textgen_engine.parallel.group import Collectives

from .test_engine_equalities import ids_of, requests_of
from .test_overlap import everything, told
from .tiny import Harness

NewEngine = Callable[..., Harness]


class Repeater:
    """Stands in for CudaCapturer. `replayed`: how often each captured size ran."""

    def __init__(self) -> None:
        self.replayed: list[int] = []

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        output = work().clone()

        def replay() -> None:
            self.replayed.append(len(output))
            output.copy_(work())

        return replay, output


def flash() -> FlashBackend:
    from textgen_engine.kernels.paged_decode import choose_num_runs, paged_decode_reference

    return FlashBackend(GpuTraits((9, 0), 132), [], PagedKernel(paged_decode_reference, choose_num_runs))


def use_flash(engine: Engine, collectives: Collectives | None = None) -> None:
    """Give an engine attention that fits graphs, and a cache with a scratch block."""
    loaded, old = engine._runner._loaded, engine._runner.cache
    cache = KVCache(
        loaded.layers,
        num_blocks=old.num_blocks,
        block_size=old.block_size,
        dtype=loaded.dtype,
        device=loaded.device,
        has_scratch=True,
    )
    # What layers leave out, they leave out in the CPU's attention alone.
    loaded = dataclasses.replace(loaded, leaves_out_rows=False)
    engine._runner = engine._steps._runner = ModelRunner(loaded, flash(), cache, None, collectives)


def give_graphs(harness: Harness, sizes: tuple[int, ...]) -> Repeater:
    """Let the engine's decodes run in graphs; without sizes, through the same attention as they are."""
    engine = harness.engine
    use_flash(engine)
    repeater = Repeater()
    if sizes:
        engine._runner.capture_graphs(sizes, engine.info.max_total_tokens, repeater)
    repeater.replayed.clear()
    return repeater


@pytest.mark.parametrize("overlap", [False, True])
def test_in_graphs_equals_as_they_are(new_engine: NewEngine, overlap: bool) -> None:
    """Batches grow and shrink through all sizes, and above the largest one."""
    answers = []
    for sizes in ((), (1, 4, 6)):
        harness = new_engine(overlap=overlap, max_total_tokens=150)
        repeater = give_graphs(harness, sizes)
        answers.append(harness.run(everything()))
    assert set(repeater.replayed) == {1, 4, 6}
    for expected, found in zip(*(one.values() for one in answers), strict=True):
        assert told(found) == told(expected)


def test_preempted_and_shared_in_graphs(new_engine: NewEngine) -> None:
    rng = random.Random(3)
    common = [rng.randrange(2, 500) for _ in range(33)]
    prompts = [common + [rng.randrange(2, 500) for _ in range(length)] for length in (1, 5, 9, 14, 2)]
    found = []
    for sizes in ((), (3, 8)):
        harness = new_engine(block_size=4, num_blocks=40, max_total_tokens=100)
        give_graphs(harness, sizes)
        found.append(ids_of(harness.run(requests_of(prompts, 40))))
        assert harness.num_preemptions > 0
    assert found[0] == found[1]


def step(cache: KVCache, lengths: list[int], tables: torch.Tensor, seed: int) -> BatchInputs:
    """One decode of each sequence whose length is given, its new token included."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.tensor(lengths) - 1
    rows = torch.arange(len(lengths))
    return BatchInputs(
        input_ids=torch.randint(2, 500, (len(lengths),), generator=generator),
        positions=positions,
        attention=AttentionMetadata(
            num_decodes=len(lengths),
            query_lens=[1] * len(lengths),
            seq_lens=lengths,
            block_tables=tables[: len(lengths)],
            slot_blocks=tables[rows, positions // cache.block_size],
            slot_offsets=positions % cache.block_size,
            keys=cache.keys,
            values=cache.values,
        ),
        logits_rows=rows,
        sampled=[],
        prompt_scored=[],
    )


def test_padding_writes_to_the_scratch_block_alone(new_engine: NewEngine) -> None:
    """Steps of fewer and fewer rows: what the buffers keep of earlier ones must not be written again."""
    loaded = new_engine().engine._runner._loaded
    tables = torch.randperm(20, generator=torch.Generator().manual_seed(1)).view(5, 4)
    results: list[tuple[list[torch.Tensor], KVCache]] = []
    for sizes in ((), (5,)):
        cache = KVCache(
            loaded.layers, num_blocks=20, block_size=4, dtype=loaded.dtype, device=loaded.device, has_scratch=True
        )
        generator = torch.Generator().manual_seed(2)
        for tensor in (*cache.keys, *cache.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            tensor[20] = float("nan")  # nothing but padding reads it
        runner = ModelRunner(loaded, flash(), cache)
        if sizes:
            runner.capture_graphs(sizes, 16, Repeater())
        lengths = [[9, 1, 16, 5, 12], [10, 2, 13, 6], [11, 3], [12]]
        results.append(
            ([runner.forward(step(cache, one, tables, i), ()).clone() for i, one in enumerate(lengths)], cache)
        )
    (expected, plain), (found, padded) = results
    for right, given in zip(expected, found, strict=True):
        torch.testing.assert_close(given, right, atol=1e-4, rtol=0)
    for right, given in zip((*plain.keys, *plain.values), (*padded.keys, *padded.values), strict=True):
        torch.testing.assert_close(given[:20], right[:20], atol=1e-4, rtol=0)


def test_what_does_not_fit_runs_as_it_is(new_engine: NewEngine) -> None:
    loaded = new_engine().engine._runner._loaded
    cache = KVCache(
        loaded.layers, num_blocks=20, block_size=4, dtype=loaded.dtype, device=loaded.device, has_scratch=True
    )
    runner = ModelRunner(loaded, flash(), cache)
    graphs = DecodeGraphs(runner._decode_all, cache, (1, 3), 16, loaded.device, Repeater())
    tables = torch.arange(20).view(5, 4)
    assert graphs.size_for(step(cache, [4, 5], tables, 0)) == 3
    assert graphs.size_for(step(cache, [4], tables, 0)) == 1
    assert graphs.size_for(step(cache, [4, 5, 6, 7], tables, 0)) is None, "more rows than were captured"
    chunk = step(cache, [4, 5], tables, 0)
    chunk.attention.num_decodes = 1
    assert graphs.size_for(chunk) is None, "not all decodes"
    longer = step(cache, [4], torch.arange(5)[None], 0)
    assert graphs.size_for(longer) is None, "a longer table than the buffers hold"


def test_a_model_that_cannot_be_captured_runs_as_it_is(new_engine: NewEngine, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: Callable[[], torch.Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    harness = new_engine()
    expected = ids_of(harness.run(requests_of([[5, 6, 7]], 8)))
    harness = new_engine()
    give_graphs(harness, ())
    harness.engine._runner.capture_graphs((1,), 64, refuse)
    assert "no decode graphs" in caplog.text
    assert ids_of(harness.run(requests_of([[5, 6, 7]], 8))) == expected
