"""A real `textgen-gateway` for tests, in front of whatever speaks Triton's protocol."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Gateway:
    """A running `textgen-gateway`. log: its access log so far is in this file."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextlib.contextmanager
def running_gateway(
    folder: Path, grpc_url: str, metrics_url: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[Gateway]:
    """A gateway on a free port, up when this yields. environment: variables beside those of the tests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "access.log"
    command = [sys.executable, "-m", "textgen_client.gateway.command", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--triton-url", grpc_url, "--triton-metrics-url", metrics_url, "--model-id", "org/tiny"]
    variables = {**os.environ, **(environment or {})}
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *arguments], stdout=out, stderr=subprocess.STDOUT, env=variables)
    try:
        scheme = "https" if "--tls-key" in arguments else "http"
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Gateway(f"{scheme}://127.0.0.1:{port}", process, log)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
