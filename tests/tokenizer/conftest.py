"""The demonstration tokenizer, loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


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
