"""The adapter's modules, imported over a stand-in for the module that only Triton's stub has."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from . import fake_backend

_ADAPTER = ("triton_io", "triton_responder", "triton_tracing")


@pytest.fixture(scope="session", autouse=True)
def _backend() -> Iterator[None]:
    """Puts the stand-in where `import` finds it, and takes it and what imported it away again."""
    sys.modules["triton_python_backend_utils"] = fake_backend.make_module()
    yield
    for name in ("triton_python_backend_utils", *_ADAPTER):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def triton_io(_backend: None) -> Any:
    return importlib.import_module("triton_io")


@pytest.fixture(scope="session")
def triton_responder(_backend: None) -> Any:
    return importlib.import_module("triton_responder")
