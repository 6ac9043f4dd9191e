"""The way to a model's modules for what a step brings, where the model does not hand keywords on to them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from textgen_engine.attention import bridge
from textgen_engine.attention.base import AttentionBackend, AttentionMetadata


@dataclass(eq=False)
class Step:
    """What the model's forward was called with last. One per model; the engine's thread alone runs the model."""

    metadata: AttentionMetadata | None = None
    backend: AttentionBackend | None = None
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(1, 0))  # int64 [1, num_tokens]


def carry_step(model: Any, *, position_offset: int = 0) -> Step:
    """Give this model a forward that notes metadata, backend and positions in the Step it returns, which every module
    of the model then has as `bridge.STEP_ATTRIBUTE`, and that hands on only what the model knows.

    position_offset is added to the positions the model sees.
    """
    step = Step()
    for module in model.modules():
        setattr(module, bridge.STEP_ATTRIBUTE, step)
    stock_forward = model.forward
    parameters = inspect.signature(stock_forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())

    @functools.wraps(stock_forward)
    def forward(
        *,
        position_ids: torch.Tensor,
        attention_metadata: AttentionMetadata,
        attention_backend: AttentionBackend,
        **keywords: Any,
    ) -> Any:
        step.metadata, step.backend, step.positions = attention_metadata, attention_backend, position_ids
        keywords["position_ids"] = position_ids + position_offset if position_offset else position_ids
        return stock_forward(**{name: value for name, value in keywords.items() if takes_any or name in parameters})

    model.forward = forward
    return step


def use_paged_masks(model: Any) -> None:
    """Let a model that was loaded with eager attention build no masks from now on."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = bridge.ATTENTION_NAME


def slopes_of_rank(attention: Any, num_heads: int, slopes_of: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """ALiBi's slopes, worked out from the number of heads, of those heads that this attention module has: all, or the
    ones of its rank (set by models/sharding.py)."""
    heads = getattr(attention, "heads_of_rank", None)
    if heads is None:
        return slopes_of(num_heads)
    return slopes_of(heads.num_query)[heads.query[0] : heads.query[1]]


def paged(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **keywords: Any) -> Any:
    """`bridge.paged_attention` of the current step, joined heads: query, key and value [1, heads, num_tokens, dim] ->
    [1, num_tokens, heads * value_dim]."""
    attended, _ = bridge.paged_attention(module, query, key, value, None, **keywords)
    return attended.flatten(2)
