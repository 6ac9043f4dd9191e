"""Ranks as processes: they start and answer together, and when one is lost the group comes back as a whole.

A rank that hangs, between steps and in one, is test_group.py's and test_costs.py's; one that is lost while nobody asks
test_nodes.py's; and tests/server/test_faults_ranks.py does all this to a real server.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest

from textgen_engine.config import ParallelConfig
from textgen_engine.errors import EngineFailure, ModelLoadError, RankFailure
from textgen_engine.messages import EngineEnd
from textgen_engine.parallel import group
from textgen_engine.parallel.launch import RankProcesses
from textgen_engine.process import EngineClient, EngineState

from ..test_process import LONG, Mailbox, exists, long_request, wait_until
from ..tiny import Harness, make_config, make_request, save_checkpoint

PROMPT = list(range(10, 30))


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("long"), num_hidden_layers=2, max_position_embeddings=LONG)


@pytest.fixture(scope="module")
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture(scope="module")
def client(long_model: Path, mailbox: Mailbox) -> Iterator[EngineClient]:
    parallel = ParallelConfig(2)
    config = make_config(long_model, num_blocks=9 * LONG // 16, max_sequences=8, max_restarts=5, parallel=parallel)
    made = EngineClient(config, mailbox.on_report)
    made.start()
    yield made
    made.stop()


def rank_pid(client: EngineClient) -> int:
    """The process of rank 1."""
    assert client.pid is not None
    [pid] = [child.pid for child in psutil.Process(client.pid).children() if "parallel.worker" in str(child.cmdline())]
    return pid


def answers(client: EngineClient, mailbox: Mailbox, name: str) -> list[int]:
    client.submit(make_request(name, PROMPT, 12, arrival_s=time.monotonic()))
    answer = mailbox.answer(name)
    assert answer.error is None
    return answer.ids()


def test_two_processes_answer_as_one(client: EngineClient, mailbox: Mailbox, long_model: Path) -> None:
    found = answers(client, mailbox, "first")
    harness = Harness(make_config(long_model))
    assert found == harness.run_alone(make_request("first", PROMPT, 12)).ids()
    harness.close()


def test_a_killed_rank_fails_what_runs_and_all_come_back(client: EngineClient, mailbox: Mailbox) -> None:
    running = [f"running {index}" for index in range(8)]
    for name in running:
        client.submit(long_request(name))
    mailbox.wait(lambda: all(name in mailbox.answers for name in running))
    client.submit(make_request("queued", PROMPT, 12, arrival_s=time.monotonic()))
    old = [client.pid, rank_pid(client)]
    os.kill(rank_pid(client), signal.SIGKILL)
    errors = [mailbox.answer(name).error for name in running]
    for error in errors:
        assert isinstance(error, EngineFailure)
        assert "lost rank 1 of 2, which was killed by SIGKILL" in str(error)
    assert mailbox.answer("queued").ids() == mailbox.answers["first"].ids(), "kept, and run by the next group"
    assert client.state is EngineState.READY
    wait_until(lambda: not any(exists(pid) for pid in old if pid is not None), 30)


def test_no_rank_outlives_a_killed_engine(client: EngineClient, mailbox: Mailbox) -> None:
    old = rank_pid(client)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    wait_until(lambda: not exists(old), 30)
    assert answers(client, mailbox, "after kill") == mailbox.answers["first"].ids()


def test_stopping_ends_every_rank(client: EngineClient) -> None:
    pids = [client.pid, rank_pid(client)]
    client.stop()
    assert not any(exists(pid) for pid in pids if pid is not None)


def test_a_rank_that_is_lost_when_all_are_ready_fails_the_start(
    long_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its part is loaded, the groups are not formed: rank 0 would wait for its address, and notices its end instead."""
    monkeypatch.setattr(group, "_FORM_S", 2.0)
    losses: list[str] = []
    ranks = RankProcesses(make_config(long_model, parallel=ParallelConfig(2, 1, 1.0)), on_loss=losses.append)
    try:
        wait_until(lambda: ranks._store.check(["status 1"]), 120)
        [child] = ranks._children.values()
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RankFailure):
            ranks.join()
        wait_until(lambda: losses == ["rank 1 of 2, which was killed by SIGKILL"], 10)
    finally:
        ranks.close()


def test_last_words_of_an_engine_that_was_starting_are_an_error_as_others(long_model: Path) -> None:
    client = EngineClient(make_config(long_model), lambda report: None)
    ours, theirs = Pipe()
    theirs.send(EngineEnd("lost rank 1 of 2, which was killed by SIGKILL"))
    with pytest.raises(ModelLoadError, match=r"^the engine lost rank 1 of 2, which was killed by SIGKILL$"):
        client._wait_ready(ours)
