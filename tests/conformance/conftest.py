"""Fixtures of the conformance cases: a client of the shared server, and two servers with a tiny random model.

The cases are black-box properties of Text Generation Inference (TGI), by number, where they concern what one request
may ask and gets: each test is named after its case and says the property. Where TGI's own behaviour is a defect or an
accident, the property tested is ours, and the docstring names the difference (docs/differences.md has the reason).
What is HTTP's business in TGI (statuses, routes) appears as Triton's error code and the prefix of the error's text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from textgen_client import Client, Generation

from ..engine.tiny import make_tokenizer, save_checkpoint
from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .asking import ALPHABET, together

TINY_ENVIRONMENT = {
    "MAX_TOTAL_TOKENS": "6144",
    "MAX_INPUT_TOKENS": "5120",
    "MAX_BATCH_TOTAL_TOKENS": "65536",
    "MAX_BATCH_PREFILL_TOKENS": "512",
    "MAX_CONCURRENT_REQUESTS": "100",
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[Client]:
    """A client of the shared server."""
    with Client(server.grpc_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def solo(client: Client) -> Generation:
    """The greedy answer to ALPHABET: what "equals #2" in the cases refers to."""
    return client.generate(ALPHABET, max_new_tokens=24, details=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, random, 6144 positions: a thousand tokens take seconds. With a chat template."""
    folder = save_checkpoint(tmp_path_factory.mktemp("tiny_model"), max_position_embeddings=6144, num_hidden_layers=1)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _tiny_servers(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, RunningServer]]:
    """Both servers with the tiny model; started side by side, for each spends most of its start importing."""
    environment = SERVER_ENVIRONMENT | TINY_ENVIRONMENT | {"MODEL_ID": str(tiny_model)}
    alone = {"PREFIX_CACHING": "false", "MAX_BATCH_SIZE": "1"}
    tiny = RunningServer(tmp_path_factory.mktemp("tiny_server"), environment)
    plain = RunningServer(tmp_path_factory.mktemp("plain_server"), environment | alone)
    try:
        yield tiny.wait_until_ready(), plain.wait_until_ready()
    finally:
        together(tiny.close, plain.close)


@pytest.fixture(scope="session")
def tiny_server(_tiny_servers: tuple[RunningServer, RunningServer]) -> RunningServer:
    """The tiny model with room for long texts."""
    return _tiny_servers[0]


@pytest.fixture(scope="session")
def plain_server(_tiny_servers: tuple[RunningServer, RunningServer]) -> RunningServer:
    """The tiny model without prefix cache and one request at a time: what nothing else can influence."""
    return _tiny_servers[1]


@pytest.fixture(scope="session")
def tiny_client(tiny_server: RunningServer) -> Iterator[Client]:
    """A client of the tiny server."""
    with Client(tiny_server.grpc_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def plain_client(plain_server: RunningServer) -> Iterator[Client]:
    """A client of the plain server."""
    with Client(plain_server.grpc_url, timeout=120) as client:
        yield client
