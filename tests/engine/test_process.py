"""`process.py`: a real engine process, and what its client makes of its death, its silence, and its own end.

Starting an engine costs seconds of imports, so one engine's whole life is told in the order of the tests of a class.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import textgen_engine
from textgen_engine.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    ModelLoadError,
    NotReady,
)
from textgen_engine.messages import EngineInfo, StepReport
from textgen_engine.process import EngineClient, EngineState
from textgen_engine.request import GenerationRequest

from .tiny import VOCAB_SIZE, Answer, Harness, make_config, make_request, save_checkpoint

PROMPT = list(range(10, 30))
LONG = 8192  # tokens; a request of that length outlives every test
HANG_S = 4.0
START_S = 120.0


class Mailbox:
    """Collects what an EngineClient reports, and waits for it."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.started: set[str] = set()
        self._changed = threading.Condition()

    def on_report(self, report: StepReport) -> None:
        with self._changed:
            self.started.update(report.started)
            for output in report.outputs:
                self.answers.setdefault(output.request_id, Answer()).add(output)
            self._changed.notify_all()

    def wait(self, done: Callable[[], bool], timeout_s: float = START_S) -> None:
        with self._changed:
            assert self._changed.wait_for(done, timeout_s), "it did not come"

    def answer(self, request_id: str, timeout_s: float = START_S) -> Answer:
        """The whole answer, once its last output has come."""
        self.wait(lambda: request_id in self.answers and bool(self.answers[request_id].num_last), timeout_s)
        return self.answers[request_id]


def long_request(name: str, **fields: object) -> GenerationRequest:
    return make_request(name, PROMPT, None, ignore_eos_token=True, arrival_s=time.monotonic(), **fields)  # type: ignore[arg-type]


def wait_until(done: Callable[[], bool], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def exists(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("long"), num_hidden_layers=2, max_position_embeddings=LONG)


@pytest.fixture(scope="class")
def mailbox() -> Mailbox:
    return Mailbox()


@pytest.fixture(scope="class")
def client(long_model: Path, mailbox: Mailbox) -> Iterator[EngineClient]:
    config = make_config(long_model, num_blocks=9 * LONG // 16, max_sequences=8, max_restarts=2, hang_timeout_s=HANG_S)
    made = EngineClient(config, mailbox.on_report)
    assert made.state is EngineState.STARTING and made.pid is None
    info = made.start()
    assert isinstance(info, EngineInfo) and (info.vocab_size, info.max_total_tokens) == (VOCAB_SIZE, LONG)
    yield made
    made.stop()


class TestOneLife:
    """Serves; is killed; hangs; is killed once more than allowed."""

    def test_it_answers_as_an_engine_in_process_does(
        self, client: EngineClient, mailbox: Mailbox, long_model: Path
    ) -> None:
        assert client.state is EngineState.READY and client.pid is not None and exists(client.pid)
        requests = [make_request(f"r{index}", PROMPT[index:], 12) for index in range(4)]
        for request in requests:
            client.submit(request)
        found = [mailbox.answer(request.request_id) for request in requests]
        harness = Harness(make_config(long_model))
        expected = harness.run(requests)
        harness.close()
        assert [answer.ids() for answer in found] == [answer.ids() for answer in expected.values()]
        assert [answer.text() for answer in found] == [answer.text() for answer in expected.values()]
        assert mailbox.started == {"r0", "r1", "r2", "r3"}

    def test_errors_arrive_as_what_they_are(self, client: EngineClient, mailbox: Mailbox) -> None:
        client.submit(long_request("cancelled"))
        client.submit(long_request("late", deadline_s=time.monotonic() + 0.2))
        mailbox.wait(lambda: "cancelled" in mailbox.started)
        client.cancel("cancelled")
        client.cancel("nobody")
        assert isinstance(mailbox.answer("cancelled").error, Cancelled)
        assert isinstance(mailbox.answer("late").error, DeadlineExceeded)

    def test_killed_under_load(self, client: EngineClient, mailbox: Mailbox) -> None:
        """Eight that had started fail at once, two that had not are run by the next engine."""
        running = [f"running {index}" for index in range(8)]
        for name in running:
            client.submit(long_request(name))
        mailbox.wait(lambda: all(name in mailbox.answers for name in running))
        for name in ("waiting", "given up"):
            client.submit(make_request(name, PROMPT, 12, arrival_s=time.monotonic()))
        client.submit(make_request("out of time", PROMPT, 12, deadline_s=time.monotonic() + 1.5))
        assert client.pid is not None
        old_pid, killed_s = client.pid, time.monotonic()
        os.kill(old_pid, signal.SIGKILL)
        errors = [mailbox.answer(name, 2).error for name in running]
        assert time.monotonic() - killed_s < 2
        assert all(isinstance(error, EngineFailure) and "was killed" in str(error) for error in errors)
        assert client.state is EngineState.RESTARTING
        client.cancel("given up")
        assert isinstance(mailbox.answer("given up", 1).error, Cancelled)
        client.submit(make_request("while restarting", PROMPT, 12))
        assert isinstance(mailbox.answer("out of time").error, DeadlineExceeded)
        assert client.state is EngineState.RESTARTING

        assert (
            mailbox.answer("waiting").ids() == mailbox.answer("while restarting").ids() == mailbox.answers["r0"].ids()
        )
        assert client.state is EngineState.READY and client.num_restarts == 1
        assert client.pid != old_pid and not exists(old_pid)

    def test_a_hang_is_an_end_too(self, client: EngineClient, mailbox: Mailbox) -> None:
        for index in range(8):
            client.submit(long_request(f"hung {index}"))
        mailbox.wait(lambda: all(f"hung {index}" in mailbox.answers for index in range(8)))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        client.submit(make_request("twice unlucky", PROMPT, 12, arrival_s=time.monotonic()))
        client.submit(make_request("cancelled to nobody", PROMPT, 12))
        client.cancel("cancelled to nobody")  # the message is lost with the process it was for
        client.submit(make_request("short of time", PROMPT, 12, deadline_s=time.monotonic() + 0.1))
        assert isinstance(mailbox.answer("short of time").error, DeadlineExceeded)
        assert client.state is EngineState.READY, "answered before the silence counts as a hang"
        errors = [mailbox.answer(f"hung {index}").error for index in range(8)]
        assert HANG_S <= time.monotonic() - stopped_s < HANG_S + 3
        assert all(
            isinstance(error, EngineFailure) and "did not answer for 4 seconds" in str(error) for error in errors
        )
        assert isinstance(mailbox.answer("cancelled to nobody", 1).error, Cancelled)
        for index in range(8):
            client.submit(long_request(f"filler {index}", priority=1000))
        mailbox.wait(lambda: all(f"filler {index}" in mailbox.answers for index in range(8)))
        assert client.state is EngineState.READY and client.num_restarts == 2
        assert "twice unlucky" not in mailbox.started

    def test_too_many_restarts(self, client: EngineClient, mailbox: Mailbox) -> None:
        client.submit(make_request("fresh", PROMPT, 12, arrival_s=time.monotonic()))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        assert isinstance(mailbox.answer("filler 0", 2).error, EngineFailure)
        error = mailbox.answer("twice unlucky", 2).error
        assert isinstance(error, EngineFailure), "it saw two engines die, and may be why"
        assert isinstance(mailbox.answer("fresh", 2).error, NotReady)
        wait_until(lambda: client.state is EngineState.FAILED, 2)
        with pytest.raises(NotReady, match="failed"):
            client.submit(make_request("too late", PROMPT))
        client.stop()
        client.stop()
        assert client.state is EngineState.STOPPED

    def test_no_thread_is_left(self, client: EngineClient) -> None:
        wait_until(lambda: not any(thread.name.startswith("engine-") for thread in threading.enumerate()), 5)


def test_stop_answers_what_is_pending_and_leaves_no_process(long_model: Path) -> None:
    mailbox = Mailbox()
    client = EngineClient(make_config(long_model, num_blocks=600, max_sequences=1), mailbox.on_report)
    client.start()
    pid = client.pid
    assert pid is not None
    for name in ("running", "waiting"):
        client.submit(long_request(name))
    mailbox.wait(lambda: "running" in mailbox.answers)
    os.kill(pid, signal.SIGTERM)  # reaches the whole group when a server is stopped; streams go on
    os.kill(pid, signal.SIGINT)
    num_outputs = len(mailbox.answers["running"].outputs)
    mailbox.wait(lambda: len(mailbox.answers["running"].outputs) > num_outputs + 5)
    client.stop()
    assert isinstance(mailbox.answer("running", 0).error, NotReady)
    assert isinstance(mailbox.answer("waiting", 0).error, NotReady)
    assert not exists(pid)
    with pytest.raises(NotReady):
        client.submit(make_request("late", PROMPT))


def test_a_model_that_cannot_be_loaded_is_an_error_of_its_class(tmp_path: Path) -> None:
    client = EngineClient(make_config(tmp_path / "nothing"), Mailbox().on_report)
    with pytest.raises(ModelLoadError, match="nothing does not exist"):
        client.start()
    client.stop()
    assert client.pid is not None and not exists(client.pid)


def test_an_engine_that_cannot_even_start_is_an_error_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textgen_engine.process._python", lambda: "/nowhere/python")
    client = EngineClient(make_config(llama), Mailbox().on_report)
    with pytest.raises(ModelLoadError, match="cannot start the engine process"):
        client.start()
    client.stop()


def test_the_engine_ends_when_its_caller_is_killed(llama: Path) -> None:
    """Nobody is left to say stop; the closed connection says it."""
    script = textwrap.dedent(
        f"""
        import time
        from textgen_engine.config import CacheConfig, EngineConfig, ModelConfig
        from textgen_engine.process import EngineClient
        model = ModelConfig({str(llama)!r}, num_threads=1)
        client = EngineClient(EngineConfig(model, cache=CacheConfig(num_blocks=64)), lambda report: None)
        client.start()
        print(client.pid, flush=True)
        time.sleep(600)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(textgen_engine.__file__).resolve().parent.parent)}
    caller = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert caller.stdout is not None
        engine_pid = int(caller.stdout.readline())
        assert exists(engine_pid)
    finally:
        caller.kill()
        caller.wait()
    wait_until(lambda: not exists(engine_pid), 5)
