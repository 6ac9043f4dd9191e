"""Llama 4: layers without rotary positions scale their queries by position, and count positions from the step's shape.

In a step of many sequences those counts are wrong. The scale is moved to the query projection, where the true positions
are known.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

from textgen_engine.models.families.step import Step, carry_step, use_paged_masks


def prepare(model: Any) -> None:
    """Replace the query projection of every such layer of this model."""
    step = carry_step(model)
    use_paged_masks(model)
    for attention in model.modules():
        if isinstance(attention, Llama4TextAttention) and attention.attn_temperature_tuning and not attention.use_rope:
            attention.attn_temperature_tuning = 0
            attention.q_proj = _ScaledByPosition(
                attention.q_proj, step, floor_scale=attention.floor_scale, scale=attention.attn_scale
            )


class _ScaledByPosition(torch.nn.Module):
    """linear(x) * (1 + scale * log(1 + floor((position + 1) / floor_scale))); see arXiv 2501.19399."""

    def __init__(self, linear: torch.nn.Module, step: Step, *, floor_scale: float, scale: float) -> None:
        super().__init__()
        self.linear = linear
        self._step = step
        self._floor_scale, self._scale = floor_scale, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = self._step.positions.float()
        factor = torch.log1p(torch.floor((positions + 1) / self._floor_scale)) * self._scale + 1  # [1, num_tokens]
        query: torch.Tensor = self.linear(x)
        return (query * factor[..., None]).to(query.dtype)
