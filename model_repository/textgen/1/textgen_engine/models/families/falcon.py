"""Falcon: rotary positions or ALiBi; one key-value head for all queries, a few, or one each.

transformers repeats the keys and values of the newer architecture for every query head before it caches them. Here the
cache holds each key-value head once.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from textgen_engine.models.families.step import carry_step, paged, slopes_of_rank, use_paged_masks


def prepare(model: Any) -> None:
    """Bind a forward to every attention of this FalconForCausalLM."""
    carry_step(model)
    use_paged_masks(model)
    for attention in model.modules():
        if isinstance(attention, FalconAttention):
            attention.alibi_slopes = None
            if model.config.alibi:
                # transformers keeps them in bfloat16, scales them like the scores, and rounds each bias to bfloat16 as
                # well; that last step loses distances beyond 256 tokens, and is left out.
                device = attention.dense.weight.device
                slopes_of = functools.partial(modeling_bloom._get_alibi_slopes, device=device)
                slopes = slopes_of_rank(attention, attention.num_heads, slopes_of).bfloat16().float()
                attention.alibi_slopes = (slopes * attention.inv_norm_factor).contiguous()
            attention.forward = types.MethodType(_attention, attention)


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    *,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    query, key, value = (part.transpose(1, 2) for part in _split(self, self.query_key_value(hidden_states)))
    if self.alibi_slopes is None:
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    attended = paged(self, query, key, value, scaling=self.inv_norm_factor, alibi_slopes=self.alibi_slopes)
    return self.dense(attended), None


def _split(attention: Any, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, num_tokens, all heads * dim] -> query [1, num_tokens, heads, dim], key and value [.., kv_heads, dim]."""
    rows, dim = qkv.shape[:2], attention.head_dim
    if attention.new_decoder_architecture:  # per key-value head: its queries, its key, its value
        groups = qkv.view(*rows, attention.num_kv_heads, -1, dim)
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
    if attention.multi_query:  # all queries, the key, the value
        heads = qkv.view(*rows, attention.num_heads + 2, dim)
        return heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]
    heads = qkv.view(*rows, attention.num_heads, 3, dim)
    return heads[..., 0, :], heads[..., 1, :], heads[..., 2, :]
