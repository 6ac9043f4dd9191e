"""Fixtures: one server with a tiny random model, one gateway in front of it, and what speaks HTTP to the gateway."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..engine.tiny import make_tokenizer, save_checkpoint
from ..running_server import SERVER_ENVIRONMENT, RunningServer

API_KEY = "the-key"
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Gateway:
    """A running `textgen-gateway`. log: its access log so far is in this file."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextlib.contextmanager
def running_gateway(folder: Path, server: RunningServer, *arguments: str) -> Iterator[Gateway]:
    """A gateway on a free port, up when this yields."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "access.log"
    command = [sys.executable, "-m", "textgen_client.gateway.command", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--triton-url", server.grpc_url, "--triton-metrics-url", server.metrics_url, "--model-id", "org/tiny"]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *arguments], stdout=out, stderr=subprocess.STDOUT)
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


@pytest.fixture(scope="session")
def tiny_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose random model has a chat template."""
    folder = save_checkpoint(tmp_path_factory.mktemp("gateway_model"), max_position_embeddings=1024)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    environment = SERVER_ENVIRONMENT | {"MODEL_ID": str(folder)}
    running = RunningServer(tmp_path_factory.mktemp("gateway_server"), environment)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="session")
def gateway(tiny_triton: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway that most tests share."""
    with running_gateway(tmp_path_factory.mktemp("gateway"), tiny_triton) as running:
        yield running


@pytest.fixture(scope="session")
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    """Plain HTTP to the shared gateway."""
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        yield client
