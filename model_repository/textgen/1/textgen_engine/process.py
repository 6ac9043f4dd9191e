"""The engine in a process of its own: start, one message per step each way, supervision, restart.

Knows messages, not their meaning. `EngineClient` is the caller's side; `main` is the child's. The two talk over a
socket pair: the child ends when its end of the pair does, so a killed caller leaves no engine behind.

When the engine dies (killed, crashed, out of memory, hung): requests that had started get one EngineFailure each,
those that had not are kept, a new engine is started in place, and the kept ones are submitted to it (but not to a
third one). A request that comes again and again and was running each time is dealt with in suspects.py.

The child says every second that it is alive. Silence is measured on a clock of the supervisor's own turns, which stands
still while this process does: a machine that was suspended or a container that was paused costs no engine its life.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from textgen_engine.config import EngineConfig
from textgen_engine.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    EngineFailure,
    InvalidParameter,
    ModelLoadError,
    NotReady,
    RankFailure,
)
from textgen_engine.late_compiler import without_compiler
from textgen_engine.logs import configure_logging
from textgen_engine.messages import EngineEnd, EngineInfo, StepReport
from textgen_engine.request import GenerationRequest, TokenOutput
from textgen_engine.suspects import Standing, Suspects

logger = logging.getLogger(__name__)

_RESTART_WINDOW_S = 600.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.1
_HEARTBEAT_S = 1.0
# One turn of the supervisor counts for no more than this on its clock; an undisturbed turn takes a heartbeat at most.
_LONGEST_TURN_S = 2.0
# The engine itself ends a request at its deadline; the supervisor does so much later, when the engine does not answer.
_DEADLINE_GRACE_S = 2.0
# A queued request that was there when so many engines died may be what kills them: it is not given to another one.
_MAX_DEATHS = 2


class EngineState(Enum):
    """STARTING and RESTARTING keep requests until the engine is there; FAILED and STOPPED refuse them."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(slots=True)
class _Pending:
    request: GenerationRequest
    started: bool = False
    cancelled: bool = False
    num_deaths: int = 0  # engines that died while it was in their queue
    is_quarantined: bool = False  # runs while no other quarantined request does
    submitted: bool = False  # to the present engine


class EngineClient:
    """The caller's side. Thread safe. `on_report` is called from one thread at a time, never with a lock held.

    Every submitted request gets its last output through `on_report` exactly once, whatever happens to the process.
    """

    def __init__(self, config: EngineConfig, on_report: Callable[[StepReport], None]) -> None:
        self._config = config
        self._on_report = on_report
        self._lock = threading.Lock()
        self._state = EngineState.STARTING
        self._pending: dict[str, _Pending] = {}  # in order of submission
        self._restarts: deque[float] = deque()
        self._suspects = Suspects()
        self._quarantined: str | None = None  # the one quarantined request that the engine has
        self._quarantine: deque[str] = deque()  # those that wait for their turn
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._supervisor = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)
        self.num_restarts = 0

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def pid(self) -> int | None:
        """Process id of the engine, None while there is none."""
        return self._process.pid if self._process is not None else None

    def start(self) -> EngineInfo:
        """Start the process and wait until the model is loaded. Raises ModelLoadError or ConfigError."""
        info = self._spawn()
        self._supervisor.start()
        return info

    def submit(self, request: GenerationRequest) -> None:
        """Hand over a request. Raises NotReady when there is no engine and none is coming, and InvalidParameter for a
        request that has killed engines before."""
        with self._lock:
            if self._state in (EngineState.FAILED, EngineState.STOPPED):
                raise NotReady(f"the engine has {self._state.value}")
            standing = self._suspects.standing(request, time.monotonic())
            if standing is Standing.REFUSED:
                raise InvalidParameter(
                    f"the engine died each of the {self._suspects.max_deaths} times that this request was running; "
                    f"it is refused for {self._suspects.memory_s / 60:g} minutes"
                )
            pending = _Pending(request, is_quarantined=standing is Standing.QUARANTINED)
            self._pending[request.request_id] = pending
            if self._state is EngineState.READY:
                self._pass_on(pending)

    def cancel(self, request_id: str) -> None:
        """End a request; its last output is a Cancelled error. Unknown or ended: nothing."""
        with self._lock:
            pending = self._pending.get(request_id)
            if pending is None:
                return
            if self._state is EngineState.READY and pending.submitted:
                pending.cancelled = True  # remembered, for the message is lost if the engine has just died
                self._outbox.put(_Cancel(request_id))
                return
            self._forget(request_id)
        self._report_errors([request_id], Cancelled("ended before it was complete"))

    def stop(self) -> None:
        """End the process; requests still pending get a NotReady error. Idempotent."""
        with self._lock:
            if self._state is EngineState.STOPPED:
                return
            self._state = EngineState.STOPPED
            self._outbox.put(None)
        process = self._process
        if process is not None:
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._supervisor.is_alive():
            self._supervisor.join(_STOP_TIMEOUT_S)
        self._take_out(lambda _: True, NotReady("the server is stopping"))

    # ---- the supervisor's thread -------------------------------------------------------------------------------

    def _supervise(self) -> None:
        while True:
            reason = self._receive_until_end()
            with self._lock:
                if self._state is EngineState.STOPPED:
                    return
                self._state = EngineState.RESTARTING
            logger.error("the engine %s; live requests fail, a new engine is started", reason)
            self._end_process()
            self._take_out(lambda pending: pending.cancelled, Cancelled("ended before it was complete"))
            with self._lock:
                running = [pending.request for pending in self._pending.values() if pending.started]
                self._suspects.note_death(running, time.monotonic())
                for pending in self._pending.values():
                    pending.num_deaths += 1
            self._take_out(
                lambda pending: pending.started or pending.num_deaths >= _MAX_DEATHS,
                EngineFailure(f"the engine {reason}"),
            )
            if not self._restart():
                return

    def _receive_until_end(self) -> str:
        """Pass reports on until the engine is gone; says how it went."""
        connection, process = self._connection, self._process
        assert connection is not None and process is not None
        limits = self._config.supervision
        turn_s = time.monotonic()
        last_words: str | None = None
        silent_s = stuck_s = unchecked_s = 0.0  # since the last message, the last report, the last look at deadlines
        while True:
            try:
                message = connection.recv_bytes() if connection.poll(_HEARTBEAT_S) else None
            except (EOFError, OSError):
                how = _how_it_ended(_wait(process))
                return last_words or how
            now_s = time.monotonic()
            elapsed_s, turn_s = min(now_s - turn_s, _LONGEST_TURN_S), now_s
            silent_s, stuck_s, unchecked_s = silent_s + elapsed_s, stuck_s + elapsed_s, unchecked_s + elapsed_s
            if message is not None:
                silent_s = 0.0
                if message != _HEARTBEAT:
                    said = pickle.loads(message)
                    if isinstance(said, EngineEnd):
                        last_words = said.reason
                    else:
                        self._note(said)
                    stuck_s = 0.0
            if unchecked_s < _HEARTBEAT_S:
                continue
            unchecked_s = 0.0
            with self._lock:
                is_busy = any(pending.submitted for pending in self._pending.values())
            if not is_busy:
                stuck_s = 0.0
            if stuck_s > limits.hang_timeout_s:
                return f"did not answer for {limits.hang_timeout_s:g} seconds"
            if silent_s > limits.heartbeat_timeout_s:
                return f"showed no sign of life for {limits.heartbeat_timeout_s:g} seconds"
            self._expire_pending(now_s - _DEADLINE_GRACE_S, "the engine did not answer in time")

    def _note(self, report: StepReport) -> None:
        with self._lock:
            if report.adapters is not None:  # the next engine begins with what this one has
                self._config = replace(self._config, lora=replace(self._config.lora, adapters=report.adapters))
            for request_id in report.started:
                if request_id in self._pending:
                    self._pending[request_id].started = True
            outputs = []
            for output in report.outputs:
                pending = self._pending.get(output.request_id)
                if pending is None:
                    continue
                if output.is_last:
                    self._forget(output.request_id)
                    if output.error is None:
                        self._suspects.clear(pending.request)
                outputs.append(output)
            report.outputs = outputs
        self._hand_over(report)

    def _restart(self) -> bool:
        """A new engine for the kept requests; False when it is given up."""
        while True:
            now_s = time.monotonic()
            while self._restarts and now_s - self._restarts[0] > _RESTART_WINDOW_S:
                self._restarts.popleft()
            if len(self._restarts) >= self._config.supervision.max_restarts:
                with self._lock:
                    self._state = EngineState.FAILED
                logger.error("the engine was restarted %d times within ten minutes: given up", len(self._restarts))
                self._take_out(lambda _: True, NotReady("the engine keeps failing and is not restarted"))
                return False
            self._restarts.append(now_s)
            self.num_restarts += 1
            try:
                self._spawn()
                return True
            except (ModelLoadError, ConfigError) as error:
                with self._lock:
                    if self._state is EngineState.STOPPED:
                        return False
                logger.error("the new engine did not start: %s", error)

    # ---- process and connection --------------------------------------------------------------------------------

    def _spawn(self) -> EngineInfo:
        """Start a process, wait until it is ready, and submit what is pending to it."""
        ours, theirs = socket.socketpair()
        package_folder = str(Path(__file__).resolve().parent.parent)
        # Threads of the engine's matrix products that spin while they wait for each other stall as soon as another
        # process wants the cores (the server, the stub): measured, up to ten times slower on a busy machine.
        # Huge pages for what malloc gives: the first touch of a step's large tensors is a part of its time otherwise.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_folder, environment.get("PYTHONPATH")]))
        self._connection = connection = Connection(ours.detach())
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [_python(), "-m", "textgen_engine.process", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                )
            connection.send(self._config)
        except OSError as error:  # no memory for a process, or it died at once
            self._end_process()
            raise ModelLoadError(f"cannot start the engine process: {error}") from error
        info = self._wait_ready(connection)
        with self._lock:
            self._outbox = queue.SimpleQueue()
            self._quarantined = None
            self._quarantine.clear()
            for pending in self._pending.values():
                pending.submitted = False
                self._pass_on(pending)
            if self._state is EngineState.STOPPED:
                self._outbox.put(None)
            else:
                self._state = EngineState.READY
        threading.Thread(target=_write, args=(connection, self._outbox), name="engine-writer", daemon=True).start()
        return info

    def _wait_ready(self, connection: Connection) -> EngineInfo:
        problem: Exception
        try:
            while not connection.poll(_POLL_S):
                self._expire_pending(time.monotonic(), "the engine was restarting when the request's time was up")
                if self._state is EngineState.STOPPED:
                    self._end_process()
                    raise ModelLoadError("stopped while loading")
            answer = connection.recv()
            if isinstance(answer, EngineInfo):
                return answer
            problem = ModelLoadError(f"the engine {answer.reason}") if isinstance(answer, EngineEnd) else answer
        except (EOFError, OSError):
            assert self._process is not None
            code = _wait(self._process)
            problem = ModelLoadError(f"the engine process ended while loading (exit code {code})")
        self._end_process()
        raise problem

    def _end_process(self) -> None:
        self._outbox.put(None)  # ends the writer's thread
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()

    # ---- who is with the engine; called with the lock held ------------------------------------------------------

    def _pass_on(self, pending: _Pending) -> None:
        """Put the request into the outbox, or into the row of those that run one at a time."""
        if pending.is_quarantined:
            if self._quarantined is not None:
                self._quarantine.append(pending.request.request_id)
                return
            self._quarantined = pending.request.request_id
        pending.submitted = True
        self._outbox.put(pending.request)

    def _forget(self, request_id: str) -> None:
        """Take the request out; the next one in quarantine has its turn."""
        del self._pending[request_id]
        if request_id == self._quarantined:
            self._quarantined = None
            while self._quarantine and self._quarantined is None:
                successor = self._pending.get(self._quarantine.popleft())
                if successor is not None and self._state is EngineState.READY:
                    self._pass_on(successor)

    # ---- answers that the engine cannot give -------------------------------------------------------------------

    def _expire_pending(self, limit_s: float, reason: str) -> None:
        """End requests whose deadline is before limit_s."""
        self._take_out(
            lambda pending: pending.request.deadline_s is not None and pending.request.deadline_s <= limit_s,
            DeadlineExceeded(reason),
        )

    def _take_out(self, concerns: Callable[[_Pending], bool], error: EngineError) -> None:
        """End the pending requests that `concerns` picks with the error."""
        with self._lock:
            request_ids = [request_id for request_id, pending in self._pending.items() if concerns(pending)]
            for request_id in request_ids:
                self._forget(request_id)
        self._report_errors(request_ids, error)

    def _report_errors(self, request_ids: list[str], error: EngineError) -> None:
        if request_ids:
            outputs = [TokenOutput(request_id, error=error, is_last=True) for request_id in request_ids]
            self._hand_over(StepReport(outputs=outputs))

    def _hand_over(self, report: StepReport) -> None:
        try:
            self._on_report(report)
        except Exception:  # the caller's fault; without this thread no request would ever be answered again
            logger.exception("a report was not taken in")


# Sent as it is, without pickling; no report is empty.
_HEARTBEAT = b""


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


def _write(connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
    """Send what is in the outbox, everything that is there in one message; None ends it."""
    while True:
        items = [outbox.get()]
        while not outbox.empty():
            items.append(outbox.get())
        try:
            connection.send(items)
        except (OSError, ValueError):
            return  # the engine is gone; what was not started is submitted to the next one
        if items[-1] is None:
            return


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(1.0)
    except subprocess.TimeoutExpired:
        return None


def _how_it_ended(code: int | None) -> str:
    """In words. SIGKILL comes from outside (an operator, the kernel short of memory), other signals are a crash."""
    if code is None or code == -signal.SIGKILL:
        return "was killed"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


def _python() -> str:
    # Inside Triton's stub sys.executable is the environment's interpreter, where there is one.
    if sys.executable and Path(sys.executable).name.startswith("python"):
        return sys.executable
    return shutil.which("python3") or "python3"


# ---- the child's side ------------------------------------------------------------------------------------------


def main(file_descriptor: int) -> int:
    """Serve one EngineClient over the socket with this file descriptor until it says stop or is gone."""
    # Ctrl-C and SIGTERM reach the whole process group; the engine has to outlive them to let streams finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(file_descriptor)
    config = connection.recv()
    assert isinstance(config, EngineConfig)
    configure_logging(config.log_level, as_json=config.json_output, source="textgen engine")

    # What is imported stays: the collector would go through all of it again and again, now and later.
    gc.disable()
    # Here, so that the caller's process never imports torch.
    with without_compiler():
        from textgen_engine.engine import Engine
        from textgen_engine.parallel.launch import RankProcesses, Ranks

    gc.freeze()
    gc.enable()

    sending = threading.Lock()

    def emit(report: StepReport | EngineEnd) -> None:
        send(pickle.dumps(report, protocol=pickle.HIGHEST_PROTOCOL))

    def answer(first: EngineInfo | ModelLoadError | ConfigError) -> None:
        send(pickle.dumps(first, protocol=pickle.HIGHEST_PROTOCOL))

    def send(message: bytes) -> None:
        try:
            with sending:
                connection.send_bytes(message)
        except OSError:
            os._exit(1)  # nobody is left to answer to

    def end(reason: str) -> None:
        emit(EngineEnd(reason))
        os._exit(1)  # at once: whatever other threads and ranks are still doing, nobody waits for

    ranks: Ranks | None = None
    try:
        if config.parallel.world_size > 1:
            ranks = RankProcesses(config, on_loss=lambda loss: end(f"lost {loss}"))
        with without_compiler():
            engine = Engine(config, emit, ranks)
    except (ModelLoadError, ConfigError, RankFailure, MemoryError) as error:
        reason = str(error)
        if isinstance(error, MemoryError):
            reason = "not enough memory to load the model"
        elif isinstance(error, RankFailure) and ranks is not None:
            reason = f"the engine lost {ranks.whose_loss() or f'a rank: {error}'}"
        if ranks is not None:
            ranks.close()
        answer(error if isinstance(error, ConfigError) else ModelLoadError(reason))
        return 1
    gc.collect()
    gc.freeze()
    answer(engine.info)

    def read() -> None:
        try:
            while True:
                for item in connection.recv():
                    if item is None:
                        engine.stop()
                    elif isinstance(item, _Cancel):
                        engine.cancel(item.request_id)
                    else:
                        engine.submit(item)
        except (EOFError, OSError):
            os._exit(0)

    def live() -> None:
        while True:
            time.sleep(_HEARTBEAT_S)
            send(_HEARTBEAT)

    threading.Thread(target=read, name="engine-reader", daemon=True).start()
    threading.Thread(target=live, name="engine-heartbeat", daemon=True).start()
    try:
        engine.run()
    except RankFailure as failure:
        assert ranks is not None
        end(f"lost {ranks.whose_loss() or f'a rank: {failure}'}")
    except Exception:
        logger.exception("the engine's loop failed")
        os._exit(1)  # at once: whatever other threads are still doing, nobody waits for
    return 0


if __name__ == "__main__":
    # Run under the module's own name, so that the records it sends are the caller's classes.
    from textgen_engine import process as _own_module

    sys.exit(_own_module.main(int(sys.argv[1])))
