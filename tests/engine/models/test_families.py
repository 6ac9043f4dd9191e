"""Preparations change one model: transformers' classes, and other models of theirs, stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import ModelConfig
from textgen_engine.models.loader import load_model


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon", "gptj", "llama4"])
def test_stock_models_stay_stock(checkpoint: Callable[[str], Path], family: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    before = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = before(ids).logits
    loaded = load_model(ModelConfig(str(checkpoint(family)), dtype="float32"), SdpaBackend())
    after = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.equal(after(ids).logits, expected)
        assert torch.equal(before(ids).logits, expected)
    assert type(loaded.model) is type(after)


def test_one_key_value_head_is_cached_once(checkpoint: Callable[[str], Path]) -> None:
    """Falcon's multi-query attention, and its newer groups, which transformers caches once per query head."""
    for family, num_kv_heads in (("falcon", 1), ("falcon_grouped", 2), ("falcon_alibi", 4), ("gpt_bigcode", 1)):
        loaded = load_model(ModelConfig(str(checkpoint(family)), dtype="float32"), SdpaBackend())
        assert {layer.num_kv_heads for layer in loaded.layers} == {num_kv_heads}, family


def test_positions_after_padding_count_against_the_longest_text(tmp_path: Path) -> None:
    from textgen_coverage.recipes import MAX_POSITIONS, save_checkpoint

    save_checkpoint(tmp_path, "roberta")
    loaded = load_model(ModelConfig(str(tmp_path), dtype="float32"), SdpaBackend())
    assert loaded.max_positions == MAX_POSITIONS - 3, "the id of padding is 2"
