"""Fixtures: scripted Tritons on free ports."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

import textgen_client

from .fake_triton import FakeTriton


@pytest.fixture
def start_triton() -> Iterator[Callable[[int], FakeTriton]]:
    """Starts scripted servers, on the port given (0: any free one), and stops them at the end."""
    servers: list[grpc.Server] = []

    def start(port: int) -> FakeTriton:
        fake = FakeTriton()
        server = grpc.server(ThreadPoolExecutor(max_workers=16))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
        fake.url = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
        server.start()
        servers.append(server)
        return fake

    yield start
    for server in servers:
        server.stop(grace=None).wait()


@pytest.fixture
def triton(start_triton: Callable[[int], FakeTriton]) -> FakeTriton:
    return start_triton(0)


@pytest.fixture
def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def environment() -> dict[str, str]:
    """For processes that import the client, installed or not."""
    return {**os.environ, "PYTHONPATH": str(Path(textgen_client.__file__).parents[1])}
