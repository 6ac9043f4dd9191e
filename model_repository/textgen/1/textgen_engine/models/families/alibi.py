"""BLOOM and MPT: attention with linear biases (Press et al. 2021), which transformers adds up as a tensor."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.bloom import modeling_bloom
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from textgen_engine.models.families.step import carry_step, paged, slopes_of_rank, use_paged_masks


def prepare_bloom(model: Any) -> None:
    """Bind a forward to every attention of this BloomForCausalLM."""
    carry_step(model)
    use_paged_masks(model)
    for attention in model.modules():
        if isinstance(attention, BloomAttention):
            slopes_of = functools.partial(modeling_bloom._get_alibi_slopes, device=attention.dense.weight.device)
            slopes = slopes_of_rank(attention, attention.num_heads, slopes_of)
            attention.alibi_slopes = slopes.float().contiguous()
            attention.forward = types.MethodType(_bloom_attention, attention)


def _bloom_attention(
    self: Any, hidden_states: torch.Tensor, residual: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, None]:
    query, key, value = self._reshape(self.query_key_value(hidden_states))  # [1, heads, num_tokens, dim] each
    attended = paged(self, query, key, value, scaling=self.inv_norm_factor, alibi_slopes=self.alibi_slopes)
    return residual + self.dense(attended), None


def prepare_mpt(model: Any) -> None:
    """Bind a forward to this MptForCausalLM's decoder (which insists on a mask tensor) and to its attentions."""
    carry_step(model)
    use_paged_masks(model)
    model.transformer.forward = types.MethodType(_mpt_decoder, model.transformer)
    for attention in model.modules():
        if isinstance(attention, MptAttention):
            slopes_of = functools.partial(_mpt_slopes, device=attention.out_proj.weight.device)
            attention.alibi_slopes = slopes_of_rank(attention, attention.n_heads, slopes_of).float().contiguous()
            attention.forward = types.MethodType(_mpt_attention, attention)


def _mpt_slopes(num_heads: int, device: torch.device) -> torch.Tensor:
    """The last two columns of the bias differ by one distance, that is by the slope."""
    bias: torch.Tensor = build_mpt_alibi_tensor(num_heads, 2, device=device)
    return bias[:, 0, 1] - bias[:, 0, 0]


def _mpt_decoder(self: Any, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
    hidden_states = self.wte(input_ids)
    for block in self.blocks:
        hidden_states, _weights = block(hidden_states, position_bias=None, attention_mask=None)
    return BaseModelOutputWithPast(last_hidden_state=self.norm_f(hidden_states))


def _mpt_attention(self: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    heads = qkv.view(*qkv.shape[:2], 3, self.n_heads, self.head_dim)
    query, key, value = (heads[:, :, part].transpose(1, 2) for part in range(3))
    attended = paged(self, query, key, value, scaling=self.softmax_scale, alibi_slopes=self.alibi_slopes)
    return self.out_proj(attended), None
