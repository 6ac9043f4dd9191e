"""Fixtures: one server with a tiny random model, one gateway in front of it, and what speaks HTTP to the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ..engine.adapters.folders import linear_sizes, save_adapter
from ..engine.tiny import make_tokenizer, save_checkpoint
from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .running_gateway import Gateway, running_gateway

_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_FAMILIES = Path(__file__).parents[1] / "tokenizer" / "templates"
# The chat templates of the tiny model, by name; `opened` is of a model that always thinks first.
TEMPLATES = {path.stem: path.read_text() for path in sorted(_FAMILIES.glob("*.jinja"))}
_NAMED = {"default": _TEMPLATE, "opened": _TEMPLATE.replace("assistant: {%", "assistant: <think>\n{%"), **TEMPLATES}
ADAPTERS = ("first", "second")


@pytest.fixture(scope="session")
def tiny_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose random model has chat templates and two adapters."""
    folder = save_checkpoint(tmp_path_factory.mktemp("gateway_model"), max_position_embeddings=1024)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = _NAMED
    tokenizer.save_pretrained(folder)
    sizes = linear_sizes(folder)
    adapters = {name: folder / "adapters" / name for name in ADAPTERS}
    for seed, path in enumerate(adapters.values()):
        save_adapter(path, sizes, ["q_proj", "o_proj"], seed=seed)
    environment = SERVER_ENVIRONMENT | {
        "MODEL_ID": str(folder),
        "ENABLE_PREFILL_LOGPROBS": "true",
        "LORA_ADAPTERS": ",".join(f"{name}={path}" for name, path in adapters.items()),
    }
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
