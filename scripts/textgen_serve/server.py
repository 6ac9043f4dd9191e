"""One tritonserver: its command line, its start, and its end without leftovers.

Knows processes, ports and files; nothing of models, readiness or terminals.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from textgen_serve import processes
from textgen_serve.control import KEY_HEADER
from textgen_serve.errors import ServeError
from textgen_serve.runtime import Runtime
from textgen_serve.shared_memory import RegionPrefix, clean_abandoned

# What tritonserver may take, beyond draining, to unload its models and leave.
_UNLOAD_S = 15
# Tells the stub of textgen whose end it has to look for, and how many seconds after that it ends the server.
_LAUNCHER = "TRITON_TEXTGEN_LAUNCHER"
# Loading models is running code, mapping shared memory is reading it, and trace and log settings name files to write.
# Reading a model's configuration and statistics stays open: monitoring and load generators ask for them.
_ADMIN_APIS = "model-repository,shared-memory,trace,logging"
# Our own models, whose config.pbtxt say everything. Triton would start each Python model once more to ask it for more;
# other models that somebody puts beside them may need that.
_COMPLETE_MODELS = {"ensemble", "textgen", "tokenizer"}
# Below what Linux takes for outgoing connections (net.ipv4.ip_local_port_range begins at 32768).
_UNASSIGNED_PORTS = range(15_000, 32_768)


@dataclass(frozen=True)
class Ports:
    """The listeners of a server, and of the gateway where there is one."""

    http: int
    grpc: int
    metrics: int
    gateway: int | None = None


@dataclass(frozen=True)
class ServerOptions:
    """What the command line of tritonserver is made of. drain_s: time for running requests when it is stopped.

    forwarded_headers: a pattern; the models get gRPC metadata of these names as parameters of the request.
    """

    model_repository: Path
    host: str
    ports: Ports
    drain_s: int
    log_file: Path
    admin_key: str
    model_control_mode: str = "explicit"
    forwarded_headers: str | None = None
    extra_arguments: tuple[str, ...] = ()


def choose_ports(host: str, http: int, grpc: int, metrics: int, gateway: int | None = None) -> Ports:
    """The ports asked for, with a free one for each 0; ServeError names one that is in use.

    All are held at once while choosing, so they differ; they are free again on return. tritonserver takes them seconds
    later, so free ones are taken from where the system finds none for outgoing connections.
    """
    chosen = []
    with ExitStack() as held:
        wanted = [("--http-port", http), ("--grpc-port", grpc), ("--metrics-port", metrics)]
        if gateway is not None:
            wanted.append(("--gateway-port", gateway))
        for option, port in wanted:
            listener = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            # As a server does: a port whose last connections are still closing is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                _bind(listener, host, port)
                listener.listen()
            except OSError as error:
                raise ServeError(f"{option}: cannot listen on {host}:{port}: {error.strerror}") from error
            chosen.append(listener.getsockname()[1])
    return Ports(*chosen)


def _bind(listener: socket.socket, host: str, port: int) -> None:
    if port == 0:
        for candidate in random.sample(_UNASSIGNED_PORTS, 50):
            with suppress(OSError):
                listener.bind((host, candidate))
                return
    listener.bind((host, port))


class TritonServer:
    """A running tritonserver, its log in `options.log_file`; `stop` and `kill` both end and reap everything."""

    def __init__(self, runtime: Runtime, options: ServerOptions, environment: dict[str, str]) -> None:
        """Starts the process; raises ServeError when it cannot be executed. `environment` is what the models read."""
        clean_abandoned()
        processes.adopt_orphans()
        self._drain_s = options.drain_s
        self._regions = RegionPrefix()
        try:
            with options.log_file.open("ab") as log:
                # A session of its own: a Ctrl-C in the terminal reaches the launcher only, which then stops in order.
                self._process = subprocess.Popen(
                    command_of(runtime, options, self._regions.name),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=runtime.environment | environment | {_LAUNCHER: f"{os.getpid()} {options.drain_s + _UNLOAD_S}"},
                    start_new_session=True,
                    preexec_fn=processes.die_with_parent,
                    pass_fds=(self._regions.descriptor,),
                )
        except OSError as error:
            self._regions.remove()
            raise ServeError(f"cannot start {runtime.binary}: {error.strerror or error}") from error

    @property
    def pid(self) -> int:
        """Process id of tritonserver."""
        return self._process.pid

    def exit_status(self) -> str | None:
        """None while it runs, else how it ended, in words."""
        code = self._process.poll()
        if code is None:
            return None
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def stop(self, give_up: Callable[[], bool], drain: bool = True) -> None:
        """Let running requests finish for up to the drain time, then end every process and region.

        `give_up` is asked ten times a second and cuts the wait short.
        """
        if self._process.poll() is None:
            self._process.terminate()
            deadline = time.monotonic() + (self._drain_s if drain else 0) + _UNLOAD_S
            while self._process.poll() is None and time.monotonic() < deadline and not give_up():
                time.sleep(0.1)
        # Stubs leave by themselves shortly after the server; give them that moment unless somebody is in a hurry.
        self._finish(grace_s=0.0 if give_up() else 5.0)

    def kill(self, spare: Collection[int] = ()) -> None:
        """End every process at once, but for those of this process's children that are in `spare`."""
        self._finish(grace_s=0.0, spare=spare)

    def _finish(self, grace_s: float, spare: Collection[int] = ()) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        processes.end_all_below(grace_s, spare)
        self._regions.remove()


def command_of(runtime: Runtime, options: ServerOptions, region_prefix: str) -> list[str]:
    """Of a server whose regions of shared memory have names that begin with region_prefix."""
    command = [
        str(runtime.binary),
        f"--model-repository={options.model_repository}",
        f"--http-address={options.host}",
        f"--http-port={options.ports.http}",
        f"--grpc-address={options.host}",
        f"--grpc-port={options.ports.grpc}",
        f"--metrics-address={options.host}",
        f"--metrics-port={options.ports.metrics}",
        f"--exit-timeout-secs={options.drain_s}",
        f"--model-control-mode={options.model_control_mode}",
        f"--backend-config=python,shm-region-prefix-name={region_prefix}",
    ]
    if runtime.backend_directory is not None:
        command.append(f"--backend-directory={runtime.backend_directory}")
    if options.model_control_mode == "explicit":
        command.append("--load-model=*")
    if {path.name for path in options.model_repository.iterdir() if path.is_dir()} <= _COMPLETE_MODELS:
        command.append("--disable-auto-complete-config")
    command.append(f"--http-restricted-api={_ADMIN_APIS}:{KEY_HEADER}={options.admin_key}")
    command.append(f"--grpc-restricted-protocol={_ADMIN_APIS}:{KEY_HEADER}={options.admin_key}")
    if options.forwarded_headers is not None:
        command.append(f"--grpc-header-forward-pattern={options.forwarded_headers}")
    command.extend(options.extra_arguments)
    return command
