"""The ranks of one model as threads of the test's process: the real groups over the real loopback, without the seconds
that starting processes costs. Rank 0 is a `tiny.Harness`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from textgen_engine.batch import BatchInputs
from textgen_engine.config import EngineConfig, ModelConfig
from textgen_engine.errors import RankFailure
from textgen_engine.parallel.group import Collectives, Stop
from textgen_engine.parallel.launch import LOOPBACK, Ranks
from textgen_engine.parallel.split import Shard
from textgen_engine.parallel.worker import prepare, serve

from ..test_engine_equalities import ids_of, prompts_of, requests_of
from ..tiny import Harness

NewRanks = Callable[..., Harness]
PROMPTS = prompts_of([5, 1, 33, 64, 17, 100])
# Of the largest logit of the model: partial sums over two to four ranks, of 64 to 512 terms each, through two or three
# layers.
RELATIVE_TOLERANCE = 2e-5


class RankThreads(Ranks):
    """Loads the parts of all other ranks at once (transformers' loader is not thread safe), then runs each on its own
    thread."""

    def __init__(self, config: EngineConfig, world_size: int, timeout_s: float = 60.0) -> None:
        self._world_size, self._timeout_s = world_size, timeout_s
        self._store = dist.HashStore()
        self._model = config.model
        self._has_adapters = config.lora.is_enabled
        self._parts = [
            prepare(config.model, Shard(rank, world_size), fused=not self._has_adapters)
            for rank in range(1, world_size)
        ]
        self._threads: list[threading.Thread] = []
        self.collectives: Collectives | None = None
        self.others: list[Collectives] = []
        self.failures: list[RankFailure] = []
        self._may_go_on = threading.Event()
        self._may_go_on.set()

    @property
    def shard(self) -> Shard:
        return Shard(0, self._world_size)

    @property
    def model(self) -> ModelConfig:
        return self._model

    def whose_loss(self) -> str | None:
        return None

    @property
    def parts(self) -> list[Any]:
        """The models of ranks 1 and up."""
        return [loaded for loaded, _ in self._parts]

    def join(self) -> Collectives:
        for rank in range(1, self._world_size):
            self._threads.append(threading.Thread(target=self._run, args=(rank,), daemon=True))
            self._threads[-1].start()
        self.collectives = self._join(0)
        return self.collectives

    def close(self) -> None:
        if self.collectives is not None:
            self.collectives.send(Stop())
            for thread in self._threads:
                thread.join(10)
                assert not thread.is_alive()
            self.collectives = None
            assert not self.failures, self.failures

    def pause(self) -> None:
        """From now on the other ranks hang in their next sum."""
        self._may_go_on.clear()

    def abandon(self) -> None:
        """After a loss: let the threads end, each with its own failure."""
        assert self.collectives is not None
        self._may_go_on.set()
        self.collectives.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self.collectives = None

    def _run(self, rank: int) -> None:
        try:
            collectives = self._join(rank)
            self.others.append(collectives)
            all_reduce = collectives.all_reduce

            def pausing_all_reduce(tensor: torch.Tensor) -> torch.Tensor:
                self._may_go_on.wait()
                return all_reduce(tensor)

            collectives.all_reduce = pausing_all_reduce  # type: ignore[method-assign]
            serve(*self._parts[rank - 1], collectives, has_adapters=self._has_adapters)
        except RankFailure as failure:
            self.failures.append(failure)

    def _join(self, rank: int) -> Collectives:
        return Collectives(self._store, rank, self._world_size, address=LOOPBACK, timeout_s=self._timeout_s)


@dataclass
class Recorded:
    """Every step's logits of one engine, as they came."""

    logits: list[torch.Tensor] = field(default_factory=list)


def record_logits(harness: Harness) -> Recorded:
    """From now on."""
    recorded = Recorded()
    forward: Callable[..., torch.Tensor] = harness.engine._runner.forward

    def recording(inputs: BatchInputs, copies: Iterable[tuple[int, int]]) -> torch.Tensor:
        logits = forward(inputs, copies)
        recorded.logits.append(logits.clone())
        return logits

    harness.engine._runner.forward = recording  # type: ignore[method-assign]
    return recorded


def assert_alike(found: Harness, expected: Harness, prompts: list[list[int]] = PROMPTS, num_tokens: int = 12) -> None:
    """The same requests give the same tokens in the same steps, and each step's logits within the tolerance."""
    ours, theirs = record_logits(found), record_logits(expected)
    ids = ids_of(found.run(requests_of(prompts, num_tokens)))
    assert ids == ids_of(expected.run(requests_of(prompts, num_tokens)))
    assert len({tuple(text) for text in ids}) > len(prompts) // 2, "a model that always says the same proves nothing"
    assert len(ours.logits) == len(theirs.logits)
    for given, right in zip(ours.logits, theirs.logits, strict=True):
        if not right.numel():
            continue  # a step of nothing but a chunk
        torch.testing.assert_close(given, right, rtol=0, atol=RELATIVE_TOLERANCE * float(right.abs().max()))
