"""Workers that can be killed: late, dead and greedy ones, and that none outlives its sandbox."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import textgen_engine
from textgen_engine.errors import EngineFailure, GrammarError
from textgen_engine.grammar.sandbox import Sandbox, WorkerDied, WorkerLate


class Served:
    """What runs in the worker of these tests."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def add(self, number: int) -> int:
        return number + self._offset

    def process_id(self) -> int:
        return os.getpid()

    def hang(self) -> None:
        while True:
            pass

    def refuse(self) -> None:
        raise GrammarError("no")

    def fault(self) -> None:
        raise KeyError("x")

    def die(self) -> None:
        os._exit(3)

    def eat(self, num_bytes: int) -> int:
        return len(bytearray(num_bytes))


def prepare(offset: int) -> Callable[[], Served]:
    if offset < 0:
        raise ValueError("no such offset")
    return lambda: Served(offset)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    # The template imports this file by its bare name, from the folder it lies in.
    sys.path.insert(0, os.path.dirname(__file__))
    made = Sandbox("test_sandbox:prepare", 40, memory_bytes=256 * 1024**2)
    yield made
    made.close()
    sys.path.remove(os.path.dirname(__file__))


def is_gone(process_id: int) -> bool:
    end = time.monotonic() + 10.0
    while time.monotonic() < end:
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_calls_and_refusals(sandbox: Sandbox) -> None:
    worker = sandbox.open()
    assert worker.call("add", 2, timeout_s=10.0) == 42
    with pytest.raises(GrammarError, match="no"):
        worker.call("refuse", timeout_s=10.0)
    with pytest.raises(RuntimeError, match="KeyError"):
        worker.call("fault", timeout_s=10.0)
    assert worker.call("add", 3, timeout_s=10.0) == 43, "a refusal does not end the worker"
    process_id = worker.call("process_id", timeout_s=10.0)
    worker.close()
    worker.close()
    assert is_gone(process_id)
    with pytest.raises(WorkerDied):
        worker.receive(1.0)


def test_late_worker_is_killed_and_others_go_on(sandbox: Sandbox) -> None:
    late, other = sandbox.open(), sandbox.open()
    process_id = late.call("process_id", timeout_s=10.0)
    start = time.monotonic()
    with pytest.raises(WorkerLate):
        late.call("hang", timeout_s=0.2)
    assert time.monotonic() - start < 5.0
    assert is_gone(process_id)
    assert other.call("add", 0, timeout_s=10.0) == 40
    other.close()


def test_dead_and_greedy_workers(sandbox: Sandbox) -> None:
    worker = sandbox.open()
    with pytest.raises(WorkerDied):
        worker.call("die", timeout_s=10.0)
    worker = sandbox.open()
    assert worker.call("eat", 1024, timeout_s=10.0) == 1024
    with pytest.raises(RuntimeError, match="MemoryError"):
        worker.call("eat", 1024**3, timeout_s=20.0)
    worker.close()


def test_template_that_cannot_start() -> None:
    broken = Sandbox("textgen_engine.grammar.sandbox:nothing", None, memory_bytes=1)
    with pytest.raises(EngineFailure, match="nothing"):
        broken.open()
    broken.close()
    with pytest.raises(EngineFailure, match="stopping"):
        broken.open()


def test_close_ends_everything(sandbox: Sandbox) -> None:
    other = Sandbox("test_sandbox:prepare", 1, memory_bytes=256 * 1024**2)
    worker = other.open()
    process_id = worker.call("process_id", timeout_s=10.0)
    worker.send("hang")
    other.close()
    assert is_gone(process_id)


def test_an_engine_that_ends_at_once_leaves_no_traceback() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    command = [sys.executable, "-m", "textgen_engine.grammar.sandbox", str(theirs.fileno())]
    done = subprocess.run(
        command,
        input=pickle.dumps(("textgen_engine.grammar.sandbox:deadline_in", 1.0, 1, 0)),
        pass_fds=[theirs.fileno()],
        env=os.environ | {"PYTHONPATH": str(Path(textgen_engine.__file__).parents[1])},
        capture_output=True,
        timeout=60,
    )
    theirs.close()
    assert (done.returncode, done.stderr) == (0, b"")
