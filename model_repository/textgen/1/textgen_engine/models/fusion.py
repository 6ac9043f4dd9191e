"""Decoder layers whose pieces run together; which layers qualify, and how their weights are joined.

A family names the structure it takes the place of. Structure alone cannot tell a layer that multiplies its residual by
a constant from one that does not, so each layer is also tried: stock and fused layer compute the same few random rows,
and one that differs stays stock. Only instances are replaced, never a class of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from textgen_engine.attention.base import AttentionBackend, AttentionFeatures, AttentionMetadata, Scoring
from textgen_engine.attention.bridge import STEP_ATTRIBUTE
from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.models.cpu_linear import MOST_COMPILED_ROWS, has_hooks
from textgen_engine.models.quantization.linear import IntegerLinear, QuantizedLinear

logger = logging.getLogger(__name__)

_TRIAL_ROWS = 3
# Float32 sums in another order: far less than any real difference between two layers.
_TOLERANCE = 1e-4
_TOLERANCE_INTEGERS = 2e-2


class FusedGatedLayer(torch.nn.Module):
    """Takes the place of a Llama-like decoder layer: pre-norm attention with rotary positions, then a gated SiLU MLP.

    Replaces q_proj, k_proj, v_proj by `qkv` and gate_proj, up_proj by `gate_up`, rows joined in this order; needs a
    trial's Recorder for what only the stock attention knows: its scoring.

    sum_over_ranks: set where this rank holds only a part of every layer's heads and inner units: adds up the partial
    results of attention and MLP before they are added to the residual.
    """

    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, layer: Any, trial: Recorder, kernels: CpuKernels | None) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        # The kernels that run several pieces in one call know float32 weights alone.
        self._kernels = kernels if type(attention.o_proj) is torch.nn.Linear else None
        self.layer_idx = trial.layer
        self.scoring = trial.scoring
        self.num_heads, self.num_kv_heads, self.head_dim = trial.query.shape[1], trial.key.shape[1], trial.key.shape[2]
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        self.qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = attention.o_proj
        self.gate_up = _join(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj
        self.input_norm, self.epsilon = layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon
        self.mlp_norm, self.mlp_epsilon = (
            layer.post_attention_layernorm.weight,
            layer.post_attention_layernorm.variance_epsilon,
        )

    @staticmethod
    def matches(layer: Any) -> bool:
        children = {name: child for name, child in layer.named_modules() if name}
        if set(children) - {"mlp.act_fn"} != _GATED_LAYER:
            return False
        linears = [child for name, child in children.items() if name.endswith("_proj")]
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        return (
            not any(has_hooks(module) for module in layer.modules())
            and len({_kind(linear) for linear in linears} - {None}) == 1
            and not any(_kind(linear) is None for linear in linears)
            and all(isinstance(getattr(norm, "variance_epsilon", None), float) for norm in norms)
            and all(parameter.dtype is torch.float32 for parameter in layer.parameters())
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_metadata: AttentionMetadata,
        attention_backend: AttentionBackend,
        **_: Any,  # masks, positions and caches of transformers, which attention/bridge.py has no use for either
    ) -> torch.Tensor:
        x = hidden_states[0]  # [num_tokens, hidden]
        cos, sin = (table[0] for table in position_embeddings)  # [num_tokens, dim]
        few_rows = self._kernels is not None and x.shape[0] <= MOST_COMPILED_ROWS
        turns_all = cos.shape[1] == self.head_dim
        qkv = self._compiled_in(x, cos, sin) if few_rows and turns_all else self._plain_in(x, cos, sin)
        query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        attended = attention_backend.run(
            self.layer_idx,
            query,
            key,
            value,
            attention_metadata,
            self.scoring,
        ).reshape(x.shape[0], -1)
        whole = few_rows and self.sum_over_ranks is None
        return (self._compiled_out(attended, x) if whole else self._plain_out(attended, x))[None]

    def _plain_in(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        normed = functional.rms_norm(x, self.input_norm.shape, self.input_norm, self.epsilon)
        qkv: torch.Tensor = self.qkv(normed)
        qkv = qkv.view(x.shape[0], -1, self.head_dim)  # [num_tokens, heads + 2 * kv_heads, dim]
        turned = qkv[:, : self.num_heads + self.num_kv_heads, : cos.shape[1]]
        first, second = turned.chunk(2, dim=2)
        turned.copy_(turned * cos[:, None] + torch.cat((-second, first), dim=2) * sin[:, None])
        return qkv

    def _plain_out(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = x + self._sum(self.output(attended))
        normed = functional.rms_norm(h, self.mlp_norm.shape, self.mlp_norm, self.mlp_epsilon)
        gate, up = self.gate_up(normed).chunk(2, dim=1)
        return h + self._sum(self.down(functional.silu(gate) * up))

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        return partial if self.sum_over_ranks is None else self.sum_over_ranks(partial)

    def _compiled_in(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        assert self._kernels is not None
        return self._kernels.layer_in(
            x,
            self.input_norm,
            self.qkv.weight,
            self.qkv.bias,
            cos,
            sin,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            epsilon=self.epsilon,
        )

    def _compiled_out(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert self._kernels is not None
        output, gate_up, down = ((layer.weight, layer.bias) for layer in (self.output, self.gate_up, self.down))
        return self._kernels.layer_out(attended, x, output, self.mlp_norm, gate_up, down, epsilon=self.mlp_epsilon)


_GATED_LAYER = {
    *("input_layernorm", "post_attention_layernorm", "self_attn", "mlp"),
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
FAMILIES = (FusedGatedLayer,)


def fuse_layers(model: torch.nn.Module, kernels: CpuKernels | None, scorings: Mapping[int, Scoring]) -> int:
    """Replace what matches a family, in this model alone; returns how many layers, and logs one line. Needs a model
    whose attention is attention/bridge.py's, and what each layer asked of it in the whole model."""
    num_fused, num_differing = 0, 0
    for layers in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
        for index, layer in enumerate(layers):
            for family in FAMILIES:
                # A fused layer gets a step's metadata by keyword; a model that hands none on keeps its layers.
                if family.matches(layer) and not hasattr(layer, STEP_ATTRIBUTE):
                    fused = _tried(family, layer, kernels, scorings)
                    if fused is None:
                        num_differing += 1
                    else:
                        layers[index] = fused
                        num_fused += 1
    name = type(model).__name__
    logger.info("%s: %d layers fused, %d alike in structure but not in result", name, num_fused, num_differing)
    return num_fused


@torch.inference_mode()
def _tried(
    family: type[FusedGatedLayer], layer: Any, kernels: CpuKernels | None, scorings: Mapping[int, Scoring]
) -> FusedGatedLayer | None:
    """The fused layer, if it computes what the stock layer does."""
    generator = torch.Generator().manual_seed(0)
    # An activation whose last bit differs may be rounded to the next of 255 integers.
    tolerance = _TOLERANCE_INTEGERS if isinstance(layer.self_attn.q_proj, IntegerLinear) else _TOLERANCE
    dim = layer.self_attn.head_dim
    x = torch.randn(1, _TRIAL_ROWS, layer.input_layernorm.weight.shape[0], generator=generator)
    angles = torch.randn(1, _TRIAL_ROWS, dim // 2, generator=generator).repeat(1, 1, 2)
    stock, ours = Recorder(), Recorder()
    keywords = {"position_embeddings": (angles.cos(), angles.sin()), "attention_metadata": _NO_METADATA}
    try:
        expected = layer(x, attention_mask=None, attention_backend=stock, **keywords)
        stock.scoring = scorings.get(stock.layer, stock.scoring)  # a window may come with the mask, which is not here
        with torch.inference_mode(False):  # parameters that other modes may use too
            fused = family(layer, stock, kernels)
        found = fused(x, attention_backend=ours, **keywords)
        pairs = ((expected, found), (stock.query, ours.query), (stock.key, ours.key), (stock.value, ours.value))
        for right, given in pairs:
            if not torch.allclose(right, given, atol=tolerance * float(right.abs().max()), rtol=0):
                return None
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None  # not called as we thought, so not the layer we thought
    return fused


_NO_METADATA = AttentionMetadata(0, [], [], torch.empty(0), torch.empty(0), torch.empty(0), [], [])


class Recorder(AttentionBackend):
    """Notes what one attention layer asks for, and answers with its queries."""

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scoring: Scoring

    def check(self, features: AttentionFeatures) -> None:
        pass

    def prepare(self, metadata: AttentionMetadata) -> None:
        pass

    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        scoring: Scoring,
    ) -> torch.Tensor:
        self.layer, self.query, self.key, self.value = layer, query.clone(), key.clone(), value.clone()
        self.scoring = scoring
        return query.clone()


def _kind(linear: torch.nn.Module) -> type[torch.nn.Module] | None:
    """What can be joined with its like: plain linear layers, or quantized ones of one form."""
    return type(linear) if type(linear) is torch.nn.Linear or isinstance(linear, QuantizedLinear) else None


def _join(*linears: Any) -> Any:
    """One linear layer whose outputs are those of all, one behind the other. Raises TypeError if there is none."""
    if isinstance(linears[0], QuantizedLinear):
        together = linears[0].joined_with(list(linears[1:]))
        if together is None:
            raise TypeError("these quantized layers cannot be joined")
        return together
    joined = torch.nn.Linear(1, 1, bias=linears[0].bias is not None)
    joined.in_features, joined.out_features = linears[0].in_features, sum(linear.out_features for linear in linears)
    joined.weight = torch.nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if joined.bias is not None:
        joined.bias = torch.nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joined
