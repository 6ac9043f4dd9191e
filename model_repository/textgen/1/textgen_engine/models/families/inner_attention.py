"""GPT-J, CodeGen, GPT-Neo, GPT-NeoX Japanese: their attention modules compute scores in a method `_attn` of theirs.

That method alone is replaced; rotary positions and projections stay transformers'.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from textgen_engine.attention.bridge import paged_attention
from textgen_engine.models.families.step import carry_step, use_paged_masks


def prepare(model: Any) -> None:
    """Bind `_attn` of every attention of this model; scores are divided by the root of a head's size."""
    carry_step(model)
    use_paged_masks(model)
    for attention in model.modules():
        if hasattr(type(attention), "_attn"):
            attention._attn = types.MethodType(_attend, attention)


def prepare_gpt_neo(model: Any) -> None:
    """GPT-Neo's scores are not scaled, and every second layer has a window."""
    prepare(model)
    for attention in model.modules():
        if isinstance(attention, GPTNeoSelfAttention):
            attention.layer_idx = attention.layer_id
            attention.paged_scale = 1.0
            attention.paged_window = model.config.window_size if attention.attention_type == "local" else None


def _attend(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, None]:
    """[1, heads, num_tokens, dim] each -> [1, heads, num_tokens, dim]."""
    attended, _weights = paged_attention(
        self,
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        None,
        scaling=getattr(self, "paged_scale", None),
        sliding_window=getattr(self, "paged_window", None),
    )
    return attended.transpose(1, 2), None
