"""Puts the tokenizer model's package on the path, as Triton does, and loads the demonstration tokenizer once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

MODEL_FOLDER = Path(__file__).resolve().parents[2] / "model_repository" / "tokenizer" / "1"
if str(MODEL_FOLDER) not in sys.path:
    sys.path.append(str(MODEL_FOLDER))


@pytest.fixture(scope="session")
def loaded(model_dir: Path) -> Any:
    """The demonstration tokenizer with a prompt limit of 200 tokens. Shared: tests must not change it."""
    from textgen_tokenizer.config import TokenizerConfig
    from textgen_tokenizer.loading import load

    return load(TokenizerConfig(model_id=str(model_dir), max_input_tokens=200))


@pytest.fixture(scope="session")
def service(loaded: Any) -> Any:
    from textgen_tokenizer.service import TokenizerService

    return TokenizerService(loaded)
