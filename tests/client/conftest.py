"""Fixtures: scripted Tritons on free ports."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import textgen_client

from .fake_triton import FakeTriton, running_fake


@pytest.fixture
def start_triton() -> Iterator[Callable[[int], FakeTriton]]:
    """Starts scripted servers, on the port given (0: any free one), and stops them at the end."""
    with contextlib.ExitStack() as running:
        yield lambda port: running.enter_context(running_fake(port))


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
