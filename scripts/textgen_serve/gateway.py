"""The HTTP gateway beside a server: its start, whether it answers, its end. What it serves is its own affair."""

from __future__ import annotations

import http.client
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from textgen_serve import processes
from textgen_serve.errors import ServeError
from textgen_serve.server import Ports

# What it may take, beyond draining, to leave.
_LEAVE_S = 5.0


class Gateway:
    """A running `textgen-gateway`; its log goes to `log_file`. Its options are read from `environment`."""

    def __init__(
        self, host: str, ports: Ports, model_id: str, drain_s: int, log_file: Path, environment: Mapping[str, str]
    ) -> None:
        """Starts the process; raises ServeError when it cannot be started."""
        check_installed()
        assert ports.gateway is not None
        self._port = ports.gateway
        self._drain_s = drain_s
        command = [sys.executable, "-m", "textgen_client.gateway.command"]
        command += [f"--host={host}", f"--port={ports.gateway}", f"--model-id={model_id}"]
        command += [f"--triton-url={_local(host)}:{ports.grpc}"]
        command += [f"--triton-metrics-url=http://{_local(host)}:{ports.metrics}/metrics"]
        command += [f"--graceful-termination-timeout={drain_s}"]
        try:
            with log_file.open("ab") as log:
                # As the server, out of reach of a Ctrl-C in the terminal.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    start_new_session=True,
                    preexec_fn=processes.die_with_parent,
                )
        except OSError as error:
            raise ServeError(f"cannot start the gateway: {error.strerror or error}") from error

    @property
    def pid(self) -> int:
        """Process id; with several workers, that of their parent."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def answers(self, host: str) -> bool:
        """Whether it takes requests. Costs no inference."""
        connection = http.client.HTTPConnection(host, self._port, timeout=2)
        try:
            connection.request("GET", "/chat")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self, give_up: Callable[[], bool]) -> None:
        """Take no more requests, let running ones finish for up to the drain time. `give_up` cuts the wait short."""
        if self._process.poll() is None:
            self._process.terminate()
            deadline = time.monotonic() + self._drain_s + _LEAVE_S
            while self._process.poll() is None and time.monotonic() < deadline and not give_up():
                time.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def check_installed() -> None:
    """Raises ServeError where what the gateway needs is missing."""
    missing = [name for name in ("textgen_client", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ServeError(
            f"the gateway needs {' and '.join(missing)}: pip install './client[gateway]', or start with --no-gateway"
        )


def _local(host: str) -> str:
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{address}]" if ":" in address else address
