"""The life of one served model: check, start, wait until a request succeeds, announce, watch, start again, stop.

Owns the order of these steps and what the user is told; each step itself lives in the file named after it.

What is watched, because Triton itself does not: tritonserver, and the processes of its models (the stubs). A dead
tokenizer is loaded again in place, streams go on. When tritonserver or the stub of textgen is dead, nothing can be
saved: the server is ended, which tells the clients that wait, and started again on the same ports.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from textgen_engine import host_memory
from textgen_engine.host_devices import visible_gpus
from textgen_serve import checkpoint, demo_model, gateway, options, probe, processes, ready_file
from textgen_serve.control import ControlError, ModelControl
from textgen_serve.errors import ServeError
from textgen_serve.log import LogFollower, LogLine
from textgen_serve.runtime import find_runtime
from textgen_serve.server import Ports, ServerOptions, TritonServer, choose_ports
from textgen_serve.terminal import Terminal

_DEMO_QUESTION = "Explain in two sentences why the sky is blue."
_POLL_S = 0.1
# Longest silence of a server that answers; the first request of a large model on a CPU takes its time.
_ANSWER_S = 600.0
# W3C's: with them a request is part of its client's trace.
_TRACE_HEADERS = "(traceparent|tracestate)"
# Nothing here calls home, and nothing is fetched from a model hub behind anybody's back.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
_RESTART_WINDOW_S = 600.0
_STUB_LOOK_S = 1.0


@dataclass(frozen=True)
class LaunchOptions:
    """The launcher's own options; what they mean is said in the help texts of scripts/serve.py."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    gateway: bool
    gateway_port: int
    ready_file: Path | None
    demo: bool
    graceful_termination_timeout: int
    model_control_mode: str
    restricted_api_key: str | None
    max_server_restarts: int
    log_file: Path | None
    verbose: bool
    cache_dir: Path
    model_repository: Path
    triton_args: tuple[str, ...]


class _StopRequested(Exception):
    """SIGINT or SIGTERM came."""


class _ServerLost(Exception):
    """A server that was serving is dead, or as good as; the text says what died."""


class Launcher:
    """Runs one server. `run` returns after an orderly stop and raises ServeError for anything that went wrong."""

    def __init__(self, launch: LaunchOptions, engine_environment: dict[str, str], terminal: Terminal) -> None:
        """engine_environment: the engine's options that were given as flags, as variables."""
        self._launch = launch
        self._environment = {name: os.environ.get(name, value) for name, value in _OFFLINE.items()} | engine_environment
        self._terminal = terminal
        self._log_file = launch.log_file or launch.cache_dir / "logs" / f"server-{os.getpid()}.log"
        self._log = LogFollower(self._log_file)
        self._num_stops = 0
        self._ready = False
        self._gateway: gateway.Gateway | None = None
        self._admin_key = launch.restricted_api_key or secrets.token_urlsafe(24)
        self._restarts: deque[float] = deque()
        self._stubs: processes.StubWatch | None = None
        self._looked_s = 0.0

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM. A second signal stops at once."""
        with contextlib.suppress(_StopRequested):
            # Until there is a server to stop in order, a signal may interrupt anything.
            _on_stop_signals(_raise_stop)
            if self._launch.gateway:
                gateway.check_installed()
            model = self._model_folder()
            model_id = (os.environ | self._environment).get("MODEL_ID") or model.name
            self._environment["MODEL_ID"] = str(model)
            runtime = find_runtime(self._launch.cache_dir)
            launch = self._launch
            ports = choose_ports(
                launch.host,
                launch.http_port,
                launch.grpc_port,
                launch.metrics_port,
                launch.gateway_port if launch.gateway else None,
            )
            _on_stop_signals(self._count_stop)
            server_options = self._server_options(ports)
            while True:
                server = TritonServer(runtime, server_options, self._environment)
                try:
                    try:
                        self._serve(server, ports, model.name, model_id)
                    finally:
                        if launch.ready_file is not None:
                            ready_file.remove(launch.ready_file)
                except _StopRequested:
                    self._stop(server)
                    return
                except _ServerLost as lost:
                    server.kill(spare=[self._gateway.pid] if self._gateway is not None else [])
                    self._begin_again(lost)
                except BaseException:
                    server.kill()  # and with it everything below this process
                    raise

    def _begin_again(self, lost: _ServerLost) -> None:
        """Return when the server may be started again; raises ServeError when that was done too often."""
        now_s = time.monotonic()
        while self._restarts and now_s - self._restarts[0] > _RESTART_WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._launch.max_server_restarts:
            if self._gateway is not None:
                self._gateway.kill()
            raise ServeError(f"{lost}; the server's log: {self._log_file}")
        self._restarts.append(now_s)
        self._ready = False
        self._log.forget()
        self._terminal.warn(f"{lost}: starting it again")

    def _count_stop(self, _number: int, _frame: object) -> None:
        self._num_stops += 1

    # ---- before the start -------------------------------------------------------------------------------------------

    def _model_folder(self) -> Path:
        """The folder to serve, after everything that can be known without loading it."""
        environment = os.environ | self._environment
        if not environment.get("MODEL_ID"):
            environment["MODEL_ID"] = str(self._demo_model())
        num_gpus = visible_gpus()
        config = options.check(environment, num_gpus)
        found = checkpoint.inspect(
            config.model.model_id, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
        )
        if not num_gpus:
            checkpoint.check_memory(found, config.model.dtype, host_memory.available_bytes())
        return found.folder

    def _demo_model(self) -> Path:
        folder = demo_model.default_folder(self._launch.cache_dir)
        if not demo_model.is_prepared(folder):
            self._terminal.say("MODEL_ID is not set: preparing SmolLM2-135M-Instruct (about half a minute, once)")
            demo_model.prepare(folder)
        return folder

    def _server_options(self, ports: Ports) -> ServerOptions:
        launch = self._launch
        if not launch.model_repository.is_dir():
            raise ServeError(f"--model-repository: there is no folder {launch.model_repository}")
        try:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log_file.touch()
        except OSError as error:
            raise ServeError(f"cannot write the log {self._log_file}: {error.strerror}") from error
        self._log.skip_to_end()
        return ServerOptions(
            model_repository=launch.model_repository,
            host=launch.host,
            ports=ports,
            drain_s=launch.graceful_termination_timeout,
            log_file=self._log_file,
            model_control_mode=launch.model_control_mode,
            admin_key=self._admin_key,
            forwarded_headers=_TRACE_HEADERS if (os.environ | self._environment).get("OTLP_ENDPOINT") else None,
            extra_arguments=launch.triton_args,
        )

    # ---- while it runs ----------------------------------------------------------------------------------------------

    def _serve(self, server: TritonServer, ports: Ports, model: str, model_id: str) -> None:
        """Never returns: ends by _StopRequested or ServeError."""
        is_first = not self._restarts
        self._wait_until_ready(server, ports, model)
        if ports.gateway is not None and self._gateway is None:
            self._start_gateway(server, ports, model_id)
        self._ready = True
        self._stubs = processes.StubWatch(server.pid)
        if self._launch.ready_file is not None:
            pids = processes.pids_by_role(server.pid)
            if self._gateway is not None:
                pids["gateway"] = [self._gateway.pid]
            ready_file.write(self._launch.ready_file, ports, pids, self._admin_key)
        if is_first:
            self._announce(ports)
            if self._launch.demo:
                self._demonstrate(server, ports)
        while True:
            self._look(server)
            self._look_after_stubs(server, ports)

    def _look_after_stubs(self, server: TritonServer, ports: Ports) -> None:
        """Once a second: replace a dead tokenizer. Raises _ServerLost for what cannot be replaced in place."""
        if self._stubs is None or time.monotonic() - self._looked_s < _STUB_LOOK_S:
            return
        self._looked_s = time.monotonic()
        for stub in dict.fromkeys(self._stubs.look()):
            if self._launch.model_control_mode != "explicit":
                raise _ServerLost(f"a process of the model {stub.model} died")
            control = ModelControl(_reachable(self._launch.host), ports.http, self._admin_key)
            if not _is_missed(control, stub):
                continue
            if stub.model != "tokenizer":
                raise _ServerLost(f"a process of the model {stub.model} died")
            self._terminal.warn("a process of the model tokenizer died: loading it again")
            reload = _Background(lambda control=control: control.reload("tokenizer", _ANSWER_S))  # type: ignore[misc]
            while not reload.done:
                self._look(server)
            if reload.error is not None:
                raise _ServerLost(f"the tokenizer could not be loaded again ({reload.error})")

    def _look(self, server: TritonServer) -> None:
        """One turn of waiting: pass on the log. Raises _StopRequested, _ServerLost when a server that was serving
        ended, or ServeError when one could not even start."""
        time.sleep(_POLL_S)
        if self._num_stops:
            raise _StopRequested
        if self._gateway is not None and self._gateway.exit_code() is not None:
            raise ServeError(
                f"the gateway ended (exit code {self._gateway.exit_code()}); the server's log: {self._log_file}"
            )
        # The status first: what the server wrote before it ended is then in the log.
        ended = server.exit_status()
        for line in self._log.read():
            self._echo(line)
        if self._ready:
            if ended is not None:
                raise _ServerLost(f"tritonserver ended while serving ({ended})")
        elif self._log.fatal is not None or ended is not None:
            # After a fatal line Triton still loads the other models before it gives up; nobody needs to wait for that.
            reason = self._log.reason or f"tritonserver ended before it was ready ({ended})"
            raise ServeError(f"{reason}; the server's log: {self._log_file}")

    def _echo(self, line: LogLine) -> None:
        if self._launch.verbose:
            self._terminal.say(line.text)
        elif self._ready and line.severity in ("W", "E"):
            self._terminal.warn(line.text)

    def _wait_until_ready(self, server: TritonServer, ports: Ports, model: str) -> None:
        host = _reachable(self._launch.host)
        with self._terminal.progress(f"starting {model}") as progress:
            while not probe.is_ready(host, ports.http):
                self._look(server)
                progress.update(self._log.stage)
            progress.update("first request")
            # Loaded is not yet answering: the promise of being ready is that the next request succeeds.
            first = _Background(lambda: probe.answer_one_token(host, ports.http, _ANSWER_S))
            while not first.done:
                self._look(server)
                progress.update("first request")
            elapsed_s = progress.elapsed_s
        if first.error is not None:
            raise ServeError(f"the server loaded, but a first request failed: {first.error}")
        self._terminal.heading(f"ready after {elapsed_s:.1f} s")

    def _start_gateway(self, server: TritonServer, ports: Ports, model_id: str) -> None:
        """Only now: who can connect to it is served, as with Text Generation Inference."""
        launch = self._launch
        environment = os.environ | self._environment
        environment.setdefault("COMPUTE_TYPE", "gpu+optimized" if visible_gpus() else "cpu")
        self._gateway = gateway.Gateway(
            launch.host, ports, model_id, launch.graceful_termination_timeout, self._log_file, environment
        )
        while not self._gateway.answers(_reachable(launch.host)):
            self._look(server)

    def _announce(self, ports: Ports) -> None:
        host = _reachable(self._launch.host)
        say = self._terminal.say
        say(f"  HTTP     http://{host}:{ports.http}")
        if ports.gateway is not None:
            say(f"  gateway  http://{host}:{ports.gateway} (routes of TGI and of OpenAI, /docs)")
        say(f"  gRPC     {host}:{ports.grpc}")
        say(f"  metrics  http://{host}:{ports.metrics}/metrics")
        say(f"  log      {self._log_file}")
        say("try it:")
        say(
            f"  curl -N http://{host}:{ports.http}/v2/models/{probe.MODEL}/generate_stream "
            """-d '{"text_input": "The capital of France is", "stream": true, "max_new_tokens": 20}'"""
        )
        say(f"  {_client_command()} chat --url {host}:{ports.grpc}")

    def _demonstrate(self, server: TritonServer, ports: Ports) -> None:
        """Stream the answer to one chat message. A model without a chat template only loses the demonstration."""
        self._terminal.heading(f"\n> {_DEMO_QUESTION}")
        host = _reachable(self._launch.host)

        def show() -> None:
            for piece in probe.stream_chat(host, ports.http, _DEMO_QUESTION, max_new_tokens=96, timeout_s=_ANSWER_S):
                if self._num_stops:
                    break  # leaving the stream closes the connection, which cancels the request
                self._terminal.piece(piece)

        answer = _Background(show)
        try:
            while not answer.done:
                self._look(server)
        finally:
            self._terminal.say()
        if answer.error is not None:
            self._terminal.warn(f"no demonstration: {answer.error}")
        self._terminal.say("serving; Ctrl-C stops")

    def _stop(self, server: TritonServer) -> None:
        drain = f", running requests get up to {self._launch.graceful_termination_timeout} s" if self._ready else ""
        self._terminal.say(f"stopping{drain}; Ctrl-C again ends it at once")
        if self._gateway is not None:
            self._gateway.stop(give_up=lambda: self._num_stops > 1)
        server.stop(drain=self._ready, give_up=lambda: self._num_stops > 1)
        if self._launch.log_file is None:
            # A log that nobody asked for is kept only to explain a failure.
            self._log_file.unlink(missing_ok=True)
        self._terminal.say("stopped")


class _Background:
    """Runs `work` on a thread, so that its caller can go on watching the server. `error` once done, if it failed."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (probe.ProbeError, ControlError, OSError, http.client.HTTPException, ValueError) as error:
            self.error = error


def _is_missed(control: ModelControl, stub: processes.Stub) -> bool:
    """Whether Triton takes a model for ready of which a process has died. It does not where the process died as the
    model was loaded, or unloaded: then Triton knows, and nobody waits for an answer."""
    try:
        states = [e.state for e in control.index() if (e.name, e.version) == (stub.model, stub.version)]
    except ControlError:
        return True
    return "READY" in states


def _client_command() -> str:
    """How to call the client here: by name where it is on the path, else beside this interpreter."""
    return "textgen" if shutil.which("textgen") else os.path.relpath(Path(sys.executable).with_name("textgen"))


def _reachable(host: str) -> str:
    """An address under which a client on this machine finds a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _raise_stop(_number: int, _frame: object) -> None:
    raise _StopRequested


def _on_stop_signals(handler: Callable[[int, object], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
