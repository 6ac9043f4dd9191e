"""Fixtures: one server with a tiny random model, one gateway in front of it, and what speaks HTTP to the gateway."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from ..engine.tiny import make_tokenizer, save_checkpoint
from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .running_gateway import Gateway, running_gateway

_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


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
    with running_gateway(tmp_path_factory.mktemp("gateway"), tiny_triton.grpc_url, tiny_triton.metrics_url) as running:
        yield running


@pytest.fixture(scope="session")
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    """Plain HTTP to the shared gateway."""
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        yield client
