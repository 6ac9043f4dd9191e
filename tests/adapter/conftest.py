"""The adapter's modules, imported over a stand-in for the module that only Triton's stub has."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from . import fake_backend

_ADAPTER = (
    "triton_requests", "triton_responder", "triton_responses", "triton_tensors", "triton_tokenizer", "triton_tracing",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _backend() -> Iterator[None]:
    """Puts the stand-in where `import` finds it, and takes it and what imported it away again."""
    sys.modules["triton_python_backend_utils"] = fake_backend.make_module()
    yield
    for name in ("triton_python_backend_utils", *_ADAPTER):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def triton_requests(_backend: None) -> Any:
    return importlib.import_module("triton_requests")


@pytest.fixture(scope="session")
def triton_tokenizer(_backend: None) -> Any:
    return importlib.import_module("triton_tokenizer")


@pytest.fixture(scope="session")
def triton_responses(_backend: None) -> Any:
    return importlib.import_module("triton_responses")


@pytest.fixture(scope="session")
def triton_responder(_backend: None) -> Any:
    return importlib.import_module("triton_responder")
