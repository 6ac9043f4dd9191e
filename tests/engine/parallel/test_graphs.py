"""Decode steps in graphs over several ranks, with test_cuda_graphs.py's double in place of CUDA's.

The same padded sizes are replayed on every rank, sums included, or none on any. That NCCL's calls can be captured takes
several GPUs to show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from textgen_engine.config import ModelConfig
from textgen_engine.cuda_graphs import Replay
from textgen_engine.parallel import worker
from textgen_engine.parallel.split import Shard

from ..test_cuda_graphs import Repeater, flash, give_graphs, use_flash
from ..test_engine_equalities import ids_of, requests_of
from ..tiny import Harness, make_config
from .threads import PROMPTS, NewRanks, RankThreads, assert_alike

SIZES = (1, 4)


class Refusing(Repeater):
    """Fails behind the work of its last capture."""

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        captured = super().__call__(work)
        if len(captured[1]) == min(SIZES):
            raise RuntimeError("operation not permitted when stream is capturing")
        return captured


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[Repeater]:
    """What the other ranks capture with, as they come."""
    made: list[Repeater] = []

    def make(_: torch.device) -> Repeater:
        made.append(Repeater())
        return made[-1]

    monkeypatch.setattr(worker, "CudaCapturer", make)
    return made


@pytest.fixture
def split(llama: Path) -> Iterator[Harness]:
    """Rank 0 of two whose attention fits graphs, with a scratch block on each."""
    config = make_config(llama)
    ranks = RankThreads(config, 2)
    ranks._parts = [(loaded, flash()) for loaded, _ in ranks._parts]
    harness = Harness(config, ranks)
    use_flash(harness.engine, ranks.collectives)
    yield harness
    harness.close()


def test_all_ranks_replay_the_same(split: Harness, new_ranks: NewRanks, llama: Path, others: list[Repeater]) -> None:
    """Batches shrink from six rows, which no graph has, over four, padded and not, to one."""
    ours = Repeater()
    split.engine._runner.capture_graphs(SIZES, split.engine.info.max_total_tokens, ours)
    alone = new_ranks(llama, 1)
    give_graphs(alone, ())
    [theirs] = others
    for repeater in (ours, theirs):
        repeater.replayed.clear()
    assert_alike(split, alone)
    prompts = [PROMPTS[0]] * 6
    requests = [
        request for length, prompt in enumerate(prompts, 3) for request in requests_of([prompt], length, f"{length} ")
    ]
    assert ids_of(split.run(requests)) == ids_of(alone.run(requests))
    assert ours.replayed == theirs.replayed
    assert set(ours.replayed) == set(SIZES)


def test_a_rank_computes_on_its_own_gpu_with_a_gpus_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(device))
    monkeypatch.setattr(worker, "make_backend", lambda *given: made.append(given))
    monkeypatch.setattr(worker, "load_model", lambda *given, **more: None)
    worker.prepare(ModelConfig("model", device="cuda:1"), Shard(1, 2))
    device = torch.device("cuda:1")
    assert made == [device, (device, ModelConfig("model").attention)]


def test_all_ranks_capture_or_none(
    split: Harness, new_ranks: NewRanks, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank cannot, as it finds at the end: the others forget what they have."""
    monkeypatch.setattr(worker, "CudaCapturer", lambda _: Refusing())
    ours = Repeater()
    split.engine._runner.capture_graphs(SIZES, split.engine.info.max_total_tokens, ours)
    ours.replayed.clear()
    assert_alike(split, new_ranks(llama, 1), PROMPTS[:2], num_tokens=4)
    assert not ours.replayed
