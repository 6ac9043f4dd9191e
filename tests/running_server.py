"""A real server for tests, started the way a user starts it: scripts/serve.py."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from textgen_serve import processes

REPOSITORY_ROOT = Path(__file__).resolve().parents[1]
SERVE = REPOSITORY_ROOT / "scripts" / "serve.py"

# Options of the shared server: small enough for a laptop, large enough to hold several requests at once.
SERVER_ENVIRONMENT = {
    "MAX_TOTAL_TOKENS": "1024",
    "MAX_INPUT_TOKENS": "960",
    "MAX_BATCH_TOTAL_TOKENS": "16384",
    "MAX_BATCH_PREFILL_TOKENS": "256",
    "MAX_CONCURRENT_REQUESTS": "64",
    "GRACEFUL_TERMINATION_TIMEOUT": "10",
    # Client, server and engine share the machine's cores: two spinning threads of a busy engine would starve the rest.
    "TEXTGEN_NUM_THREADS": "1",
}
READY_WITHIN_S = 180.0


class RunningServer:
    """One `scripts/serve.py` and what is below it.

    grpc_url is host:port, http_url, metrics_url and gateway_url (None without `--gateway-port`) carry the scheme; they
    exist once it is ready. `log` is the server's log, `output` what the launcher printed.
    """

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        arguments: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
    ) -> None:
        """prefix: words before the command; they must end by executing what follows them."""
        self.log = folder / "server.log"
        self.output = folder / "output.txt"
        self.ready_file = folder / "ready.json"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TEXTGEN_")}
        command = [*prefix, sys.executable, str(SERVE), "--host", "127.0.0.1", "--no-demo"]
        # Few tests need a gateway, and each start of one takes a core for a second.
        command += ["--no-gateway"] if "--gateway-port" not in arguments else []
        command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        command += ["--ready-file", str(self.ready_file), "--log-file", str(self.log), *arguments]
        with self.output.open("wb") as output:
            self.launcher = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=inherited | environment, cwd=folder
            )

    def wait_until_ready(self, timeout_s: float = READY_WITHIN_S) -> RunningServer:
        """Return when requests succeed; fails the test with both logs when they never do."""
        deadline = time.monotonic() + timeout_s
        while not self.ready_file.exists():
            if self.launcher.poll() is not None:
                pytest.fail(f"the server ended with exit code {self.launcher.returncode}\n{self.describe()}")
            if time.monotonic() > deadline:
                pytest.fail(f"the server was not ready within {timeout_s:.0f} s\n{self.describe()}")
            time.sleep(0.05)
        ready = json.loads(self.ready_file.read_text())
        self.grpc_url = f"127.0.0.1:{ready['grpc_port']}"
        self.http_url = f"http://127.0.0.1:{ready['http_port']}"
        self.metrics_url = f"http://127.0.0.1:{ready['metrics_port']}/metrics"
        self.gateway_url = f"http://127.0.0.1:{ready['gateway_port']}" if ready["gateway_port"] else None
        self.admin_key: str = ready["restricted_api_key"]
        self._server_pid: int = ready["pids"]["tritonserver"][0]
        return self

    @property
    def pids(self) -> dict[str, list[int]]:
        """Live process ids by role, as they are now: "tritonserver", "engine", and the stubs by model name."""
        return processes.pids_by_role(self._server_pid)

    def pid(self, role: str) -> int:
        """The one process of a role; fails the test when there is none or there are several."""
        found = self.pids.get(role, [])
        assert len(found) == 1, f"{role}: {found} of {self.pids}"
        return found[0]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry `labels`; 0 when there is none. Histograms: name the sample."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            text = response.read().decode()
        total = 0.0
        for line in text.splitlines():
            sample = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", line)
            if sample is None or sample[1] != name:
                continue
            found = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', sample[2] or ""))
            if labels.items() <= found.items():
                total += float(sample[3])
        return total

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Send a signal to the launcher and return its exit code."""
        self.launcher.send_signal(number)
        try:
            return self.launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the launcher did not end within {timeout_s:.0f} s\n{self.describe()}")

    def close(self) -> None:
        """End everything: at once, as a second Ctrl-C does, since Triton takes seconds to end in good order, and this
        is the end of many tests. Safe to call twice."""
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.launcher.pid).children(recursive=True)
        deadline = time.monotonic() + 30
        while self.launcher.poll() is None:
            # Again and again: two signals that come together count as one.
            self.launcher.send_signal(signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.launcher.wait(0.1)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=10)

    def describe(self) -> str:
        """What the launcher printed, and the end of the server's log."""
        log = self.log.read_text(errors="replace").splitlines()[-40:] if self.log.exists() else ["(none)"]
        return f"--- launcher\n{self.output.read_text(errors='replace')}--- server log, last lines\n" + "\n".join(log)


StartServer = Callable[..., RunningServer]
