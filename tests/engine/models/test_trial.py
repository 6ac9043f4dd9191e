"""`models/trial.py`: a model whose results through our attention are not its own is refused when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_compatibility_function,
    sliding_window_causal_mask_function,
)

from textgen_engine.attention.bridge import MaskRule, mask_rule, paged_attention
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import ModelConfig
from textgen_engine.errors import ModelLoadError
from textgen_engine.models import loader
from textgen_engine.models.loader import load_model


def load_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.nn.Module], None], dtype: str = "float32"
) -> None:
    """Load with `change` done to the model once transformers' own logits are known."""
    stock_logits = loader.stock_logits

    def then_change(model: torch.nn.Module, *rest: Any) -> torch.Tensor | None:
        expected = stock_logits(model, *rest)
        change(model)
        return expected

    monkeypatch.setattr(loader, "stock_logits", then_change)
    load_model(ModelConfig(str(folder), dtype=dtype), SdpaBackend())  # type: ignore[arg-type]


class LooksBack(torch.nn.Module):
    """Adds a little of the row before, as a convolution would."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.3 * x.roll(1, dims=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_that_see_their_neighbours_in_the_batch(
    llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    load_changed(llama, monkeypatch, lambda model: None, dtype)

    def change(model: torch.nn.Module) -> None:
        model.model.norm = torch.nn.Sequential(model.model.norm, LooksBack())

    with pytest.raises(ModelLoadError, match=r"LlamaForCausalLM cannot be served: .* differ from its own"):
        load_changed(llama, monkeypatch, change, dtype)


def test_layers_that_carry_state_are_named(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ModelLoadError, match="MambaMixer"):
        load_model(ModelConfig(str(checkpoint("mamba"))), SdpaBackend())


def test_what_masks_say_reaches_attention_as_a_rule() -> None:
    """The names of transformers' mask functions, and what they close over, are read from the functions."""
    assert mask_rule(mask_function=causal_mask_function) is None
    window = sliding_window_causal_mask_function(5)
    assert mask_rule(mask_function=window) == MaskRule(sliding_window=5)
    assert mask_rule(mask_function=chunked_causal_mask_function(7, torch.zeros(1))) == MaskRule(chunk_size=7)
    positions = torch.tensor([[0, 1, 0]])
    assert mask_rule(mask_function=packed_sequence_compatibility_function(window, positions, positions)) == MaskRule(5)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (bidirectional_mask_function, "bidirectional_mask_function"),
        (or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 3))), "or_masks"),
        (and_masks(causal_mask_function, lambda b, h, q, k: q != k), "test_trial|lambda"),
    ],
)
def test_other_masks_are_refused_by_name_where_they_are_used(function: Callable[..., torch.Tensor], name: str) -> None:
    rule = mask_rule(mask_function=function)
    query = torch.zeros(1, 1, 1, 8)
    with pytest.raises(NotImplementedError, match=name):
        paged_attention(torch.nn.Module(), query, query, query, rule)
