"""Fixtures shared by all tests: the demonstration model that `make setup` puts into the cache folder."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
MODEL_DIR = REPOSITORY_ROOT / ".cache" / "models" / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The folder of SmolLM2-135M-Instruct (safetensors, tokenizer, chat template)."""
    if not (MODEL_DIR / "tokenizer.json").is_file():
        pytest.fail(f"the demonstration model is missing from {MODEL_DIR}: run `make setup`")
    return MODEL_DIR
