"""Models whose positions do not come as `position_ids`, or start elsewhere than at 0."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.nn import functional

from textgen_engine.attention import bridge
from textgen_engine.models.families.step import carry_step, use_paged_masks


def prepare_decoder(model: Any) -> None:
    """Decoders of the BART family count positions from the step's shape: their embedding gets the true ones."""
    carry_step(model)
    use_paged_masks(model)
    for name, module in model.named_modules():
        if name.endswith("embed_positions") and isinstance(module, torch.nn.Embedding):
            module.forward = types.MethodType(_embed_positions, module)  # type: ignore[method-assign]


def _embed_positions(self: Any, *_: Any, **__: Any) -> torch.Tensor:
    step = getattr(self, bridge.STEP_ATTRIBUTE)
    return functional.embedding(step.positions + getattr(self, "offset", 0), self.weight)


def prepare_after_padding(model: Any) -> None:
    """The RoBERTa family numbers positions from the id of padding, plus one."""
    carry_step(model, position_offset=first_position(model.config))
    use_paged_masks(model)


def first_position(config: Any) -> int:
    """Position of a text's first token."""
    return int(config.pad_token_id or 0) + 1
