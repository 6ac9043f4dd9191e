"""Llama-like decoder layers on a GPU: a dozen kernels in the place of forty.

Joined weights for q, k, v and for gate and up; RMSNorm together with the addition before it; rotary positions together
with the write into the paged cache; the gate in one pass (kernels/). A layer is replaced only if it computes what the
stock layer does, on a few random rows through the same attention: structure alone cannot tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from textgen_engine.attention.base import AttentionMetadata, Scoring
from textgen_engine.attention.bridge import STEP_ATTRIBUTE
from textgen_engine.attention.flash import FlashBackend
from textgen_engine.models.cpu_linear import has_hooks
from textgen_engine.models.trial import CALL_ERRORS

logger = logging.getLogger(__name__)

_TRIAL_ROWS = 5
# Largest difference as a share of the largest result; 16-bit types round each intermediate result elsewhere.
_TOLERANCE = 1e-4
_TOLERANCE_16_BIT = 3e-2


@dataclass(frozen=True)
class LayerKernels:
    """The functions of kernels/rms_norm.py, rotary_store.py and gated.py, or their references."""

    rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rotary_store: Callable[..., None]
    gated: Callable[..., torch.Tensor]


def triton_kernels() -> LayerKernels | None:
    """The kernels; None where Triton's language is not installed."""
    try:
        from textgen_engine.kernels.gated import gated
        from textgen_engine.kernels.rms_norm import rms_norm
        from textgen_engine.kernels.rotary_store import rotary_store
    except ImportError:
        return None
    return LayerKernels(rms_norm, rotary_store, gated)


class FusedGpuLayer(torch.nn.Module):
    """Takes the place of a decoder layer: pre-norm attention with rotary positions (and normed heads, as Qwen3 has
    them), then a gated SiLU MLP."""

    def __init__(self, layer: Any, scoring: Scoring, kernels: LayerKernels) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._kernels = kernels
        self.layer_idx: int = attention.layer_idx
        self.scoring = scoring
        self.head_dim: int = attention.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        self.qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = attention.o_proj
        self.gate_up = _join(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj
        self.input_norm, self.epsilon = layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon
        self.mlp_norm = layer.post_attention_layernorm.weight
        self.mlp_epsilon = layer.post_attention_layernorm.variance_epsilon
        has_head_norms = hasattr(attention, "q_norm")
        self.query_norm = attention.q_norm.weight if has_head_norms else None
        self.key_norm = attention.k_norm.weight if has_head_norms else None
        self.head_epsilon = attention.q_norm.variance_epsilon if has_head_norms else 0.0

    @staticmethod
    def matches(layer: Any) -> bool:
        children = {name: child for name, child in layer.named_modules() if name}
        if set(children) - {"mlp.act_fn"} not in (_GATED_LAYER, _GATED_LAYER | _HEAD_NORMS):
            return False
        linears = [child for name, child in children.items() if name.endswith("_proj")]
        norms = [child for name, child in children.items() if name.endswith("norm")]
        parameters = list(layer.parameters())
        return (
            not any(has_hooks(module) for module in layer.modules())
            and all(type(linear) is torch.nn.Linear for linear in linears)
            and all(isinstance(getattr(norm, "variance_epsilon", None), float) for norm in norms)
            and len({parameter.dtype for parameter in parameters}) == 1
            and parameters[0].dtype.is_floating_point
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_metadata: AttentionMetadata,
        attention_backend: FlashBackend,
        **_: Any,  # masks, positions and caches of transformers, which attention/bridge.py has no use for either
    ) -> torch.Tensor:
        x = hidden_states[0]  # [num_tokens, hidden]
        cos, sin = (table[0] for table in position_embeddings)  # [num_tokens, rotary_dim]
        normed, _total = self._kernels.rms_norm(x, self.input_norm, self.epsilon)
        qkv = self.qkv(normed).view(x.shape[0], -1, self.head_dim)  # [num_tokens, heads + 2 * kv_heads, dim]
        self._kernels.rotary_store(
            qkv,
            cos,
            sin,
            attention_metadata.keys[self.layer_idx],
            attention_metadata.values[self.layer_idx],
            attention_metadata.slot_blocks,
            attention_metadata.slot_offsets,
            num_heads=self.num_heads,
            query_norm=self.query_norm,
            key_norm=self.key_norm,
            epsilon=self.head_epsilon,
        )
        query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        attended = attention_backend.attend(self.layer_idx, query, key, value, attention_metadata, self.scoring)
        normed, h = self._kernels.rms_norm(
            self.output(attended.view(x.shape[0], -1)), self.mlp_norm, self.mlp_epsilon, residual=x
        )
        output: torch.Tensor = h + self.down(self._kernels.gated(self.gate_up(normed)))
        return output[None]


_GATED_LAYER = {
    *("input_layernorm", "post_attention_layernorm", "self_attn", "mlp"),
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
_HEAD_NORMS = {"self_attn.q_norm", "self_attn.k_norm"}


def fuse_gpu_layers(
    model: torch.nn.Module, backend: FlashBackend, kernels: LayerKernels | None, scorings: Mapping[int, Scoring]
) -> int:
    """Replace what matches, in this model alone; returns how many layers, and logs one line."""
    num_fused, num_differing = 0, 0
    for layers in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
        for index, layer in enumerate[Any](layers):
            if kernels is None or not FusedGpuLayer.matches(layer) or hasattr(layer, STEP_ATTRIBUTE):
                continue
            if _computes_the_same(layer, backend, kernels, scorings):
                layers[index] = FusedGpuLayer(layer, scorings[layer.self_attn.layer_idx], kernels)
                num_fused += 1
            else:
                num_differing += 1
    name = type(model).__name__
    logger.info("%s: %d layers fused, %d alike in structure but not in result", name, num_fused, num_differing)
    return num_fused


@torch.inference_mode()
def _computes_the_same(
    layer: Any, backend: FlashBackend, kernels: LayerKernels, scorings: Mapping[int, Scoring]
) -> bool:
    """Whether results, and what is in the cache afterwards, are those of the stock layer: a chunk and two decodes."""
    weight = layer.input_layernorm.weight
    device, dtype, dim = weight.device, weight.dtype, layer.self_attn.head_dim
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TRIAL_ROWS, weight.shape[0], generator=generator).to(device, dtype)
    angles = torch.randn(1, _TRIAL_ROWS, dim // 2, generator=generator).repeat(1, 1, 2).to(device)
    embeddings = (angles.cos().to(dtype), angles.sin().to(dtype))
    tolerance = _TOLERANCE if dtype is torch.float32 else _TOLERANCE_16_BIT
    results = []
    try:
        fused = FusedGpuLayer(layer, scorings[layer.self_attn.layer_idx], kernels)
        for module in (layer, fused):
            metadata = _trial_metadata(layer, device, dtype)
            backend.prepare(metadata)
            output = module(
                x,
                attention_mask=None,
                position_embeddings=embeddings,
                attention_metadata=metadata,
                attention_backend=backend,
            )
            if isinstance(output, tuple):
                output = output[0]
            index = layer.self_attn.layer_idx
            results.append((output, metadata.keys[index], metadata.values[index]))
    except CALL_ERRORS:
        return False  # not called as we thought, so not the layer we thought
    return all(
        torch.allclose(right.float(), given.float(), atol=tolerance * float(right.float().abs().max()), rtol=0)
        for right, given in zip(*results, strict=True)
    )


def _trial_metadata(layer: Any, device: torch.device, dtype: torch.dtype) -> AttentionMetadata:
    """Two decodes, of texts of 2 and 1, and a chunk of 3, on a cache of zeros."""
    attention = layer.self_attn
    shape = (3, attention.k_proj.out_features // attention.head_dim, 16, attention.head_dim)
    # The layer finds its tensors by its index.
    cache = [torch.zeros(shape, device=device, dtype=dtype)] * attention.layer_idx
    keys, values = ([*cache, torch.zeros(shape, device=device, dtype=dtype)] for _ in range(2))
    return AttentionMetadata(
        num_decodes=2,
        query_lens=[1, 1, 3],
        seq_lens=[2, 1, 3],
        block_tables=torch.tensor([[0], [1], [2]], device=device),
        slot_blocks=torch.tensor([0, 1, 2, 2, 2], device=device),
        slot_offsets=torch.tensor([1, 0, 0, 1, 2], device=device),
        keys=keys,
        values=values,
    )


def _join(*linears: Any) -> torch.nn.Linear:
    """One linear layer whose outputs are those of all, one behind the other."""
    joined = torch.nn.Linear(1, 1, bias=linears[0].bias is not None, device="meta")
    joined.in_features, joined.out_features = linears[0].in_features, sum(linear.out_features for linear in linears)
    weights = [linear.weight.data for linear in linears]
    joined.weight = torch.nn.Parameter(torch.cat(weights), requires_grad=False)
    if joined.bias is not None:
        joined.bias = torch.nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joined
