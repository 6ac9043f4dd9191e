"""`Sandbox`: work that cannot be interrupted, in processes that can be killed.

    engine process ──spawn──► template process        prepares once (a library, a tokenizer's tables), then only forks
          │                      ├─fork──► worker 1   serves one job's calls, one at a time, over its own socket
          └──one socket each──►  └─fork──► worker 2   killed when late; its memory dies with it

Forking from a prepared, single-threaded template makes a worker in milliseconds and shares the tables. The template
owns its workers' process ids (it alone reaps them), so "kill worker 7" can never hit a stranger that got the number.
A template ends when its control socket closes, whatever happened to the engine, and takes its workers with it.

Run as `python -m textgen_engine.grammar.sandbox <fd>`; the engine does.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pickle
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from textgen_engine import errors
from textgen_engine.errors import EngineFailure, RequestError

_PR_SET_PDEATHSIG = 1
_START_TIMEOUT_S = 120.0


class WorkerLate(Exception):
    """A worker did not answer in time; it has been killed."""


class WorkerDied(Exception):
    """A worker ended without an answer (out of memory, a crash in a library)."""


class Worker:
    """One forked process and the object in it. Used by one thread at a time."""

    def __init__(self, connection: Connection, kill: Callable[[], None]) -> None:
        self._connection = connection
        self._kill = kill
        self._closed = False

    def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """`getattr(object, method)(*args)` over there. Raises WorkerLate, WorkerDied, or the RequestError raised."""
        self.send(method, *args)
        return self.receive(timeout_s)

    def send(self, method: str, *args: Any) -> None:
        try:
            self._connection.send((method, args))
        except OSError:
            self.close()
            raise WorkerDied from None

    def has_answer(self) -> bool:
        return self._closed or self._connection.poll(0)

    def receive(self, timeout_s: float) -> Any:
        """The answer to the oldest `send`."""
        if self._closed:
            raise WorkerDied
        try:
            if not self._connection.poll(max(0.0, timeout_s)):
                self.close()
                raise WorkerLate
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            self.close()
            raise WorkerDied from None
        if kind == "refused":
            name, message = value
            raise getattr(errors, name)(message)
        if kind == "failed":
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """Kill the process. Idempotent."""
        if not self._closed:
            self._closed = True
            self._connection.close()
            self._kill()


class Sandbox:
    """The engine's side of one template process. `open` may be called from several threads."""

    def __init__(self, factory: str, payload: Any, *, memory_bytes: int, niceness: int = 0) -> None:
        """factory: "module:function"; called once in the template with `payload`, returns a callable that makes the
        object of one worker. memory_bytes: private memory a worker may add to what it shares with the template.

        Nothing is started before `start` or the first `open`.
        """
        self._setup = (factory, payload, memory_bytes, niceness)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_ready = False
        self._num_opened = 0
        self._closed = False

    def start(self) -> None:
        """Start the template without waiting until it has prepared itself. Raises EngineFailure."""
        with self._lock:
            self._start_template()

    def open(self) -> Worker:
        """A fresh worker. Starts the template when there is none (or it died). Raises EngineFailure."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            control = self._running_template()
            self._num_opened += 1
            number = self._num_opened
            try:
                socket.send_fds(control, [b"fork %d" % number], [theirs.fileno()])
            except OSError as error:
                ours.close()
                self._stop_template()
                raise EngineFailure(f"the grammar worker's template died: {error}") from None
        return Worker(Connection(ours.detach()), lambda: self._kill(number))

    def close(self) -> None:
        """End the template and all workers. Idempotent."""
        with self._lock:
            self._closed = True
            self._stop_template()

    def _kill(self, number: int) -> None:
        with self._lock:
            if self._control is not None:
                try:
                    self._control.send(b"kill %d" % number)
                except OSError:
                    return  # the template is gone, and its workers with it

    def _running_template(self) -> socket.socket:
        """The control socket of a prepared template."""
        control = self._start_template()
        if not self._is_ready:
            control.settimeout(_START_TIMEOUT_S)
            try:
                answer = control.recv(65536).decode()
            except OSError as error:
                answer = str(error)
            if answer != "ready":
                self._stop_template()
                raise EngineFailure(f"the grammar worker's template cannot start: {answer or 'it died'}"[:500])
            control.settimeout(None)
            self._is_ready = True
        return control

    def _start_template(self) -> socket.socket:
        if self._closed:
            raise EngineFailure("the server is stopping")
        if self._process is not None and self._process.poll() is not None:
            self._stop_template()
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "textgen_engine.grammar.sandbox", str(theirs.fileno())],
                    stdin=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                )
            self._control, self._is_ready = ours, False
            assert self._process.stdin is not None
            try:
                with self._process.stdin as pipe:
                    pickle.dump(self._setup, pipe)
            except OSError as error:
                self._stop_template()
                raise EngineFailure(f"the grammar worker's template cannot start: {error}") from None
        return self._control

    def _stop_template(self) -> None:
        control, process = self._control, self._process
        self._control = self._process = None
        if control is not None:
            control.close()
        if process is not None:
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(control_fd: int) -> None:
    """The template: prepare, then fork and reap until the control socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when we end
    control = socket.socket(fileno=control_fd)
    try:
        factory, payload, memory_bytes, niceness = pickle.load(sys.stdin.buffer)
        module, function = factory.split(":")
        make = getattr(importlib.import_module(module), function)(payload)
        if niceness:
            os.nice(niceness)
    except BaseException as error:
        control.send(f"{type(error).__name__}: {error}".encode()[:60000])
        return
    gc.collect()
    gc.freeze()  # so that collections in workers do not touch, and thereby copy, the shared pages
    try:
        control.send(b"ready")
    except BrokenPipeError:  # the engine ended while this was being prepared
        return
    process_ids: dict[int, int] = {}
    while True:
        readable, _, _ = select.select([control], [], [], 1.0)
        for number, process_id in list(process_ids.items()):
            if os.waitpid(process_id, os.WNOHANG)[0]:
                del process_ids[number]
        if not readable:
            continue
        try:
            message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        except ConnectionResetError:  # closed before our "ready" was read: an engine that ended at once
            message = b""
        if not message:
            for process_id in process_ids.values():
                os.kill(process_id, signal.SIGKILL)
            return
        verb, number = message.split()[0], int(message.split()[1])
        if verb == b"kill":
            if number in process_ids:
                os.kill(process_ids[number], signal.SIGKILL)
            continue
        process_id = os.fork()
        if process_id == 0:
            control.close()
            _serve(Connection(descriptors[0]), make, memory_bytes)
        os.close(descriptors[0])
        process_ids[number] = process_id


def _serve(connection: Connection, make: Callable[[], Any], memory_bytes: int) -> None:
    """A worker's whole life; never returns into the template's code."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _limit_memory(memory_bytes)
        served = make()
        while True:
            try:
                method, args = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            try:
                answer = ("ok", getattr(served, method)(*args))
            except RequestError as error:
                answer = ("refused", (type(error).__name__, error.message))
            except Exception as error:
                answer = ("failed", f"{type(error).__name__}: {error}"[:2000])
            connection.send(answer)
    finally:
        os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    with open("/proc/self/status") as status:
        private_kb = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
    bound = private_kb * 1024 + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))


def deadline_in(timeout_s: float) -> Callable[[], float]:
    """A function that says how many seconds are left."""
    end_s = time.monotonic() + timeout_s
    return lambda: max(0.0, end_s - time.monotonic())


if __name__ == "__main__":
    main(int(sys.argv[1]))
