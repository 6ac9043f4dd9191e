"""Decoder layers whose pieces run together; which layers qualify, and how their weights are joined.

A family names the structure it takes the place of. Structure alone cannot tell a layer that multiplies its residual by
a constant from one that does not, so each layer is also tried: stock and fused layer compute the same few random rows,
and one that differs stays stock. Only instances are replaced, never a class of transformers.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from textgen_engine.attention.base import AttentionBackend, AttentionFeatures, AttentionMetadata, Scoring
from textgen_engine.attention.bridge import STEP_ATTRIBUTE
from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.kernels.cpu_records import Activation, GatedLayer, GatedLayers, StepTables
from textgen_engine.mapped_memory import WeightMemory
from textgen_engine.models.cpu_linear import JoinedLinears, PackedLinear, has_hooks
from textgen_engine.models.quantization.linear import CodedLinear, IntegerLinear, QuantizedLinear

_TRIAL_ROWS = 3
# Float32 sums in another order: far less than any real difference between two layers.
_TOLERANCE = 1e-4
_TOLERANCE_INTEGERS = 2e-2  # an activation whose last bit differs may be rounded to the next of 255 integers
_TOLERANCE_BFLOAT16 = 3e-2  # of which the stock layer's rounding is the larger part


class FusedNorm(torch.nn.Module):
    """An RMSNorm in one operation, in float32. weight: what the normed values are multiplied by; its own, if the stock
    module multiplies by one more than its parameter."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class Family:
    """What a decoder layer with rotary positions and RMSNorms consists of beside its linear layers.

    query_key_norms: over each head, before rotary positions. outer_norms: of what attention and MLP give, before it is
    added to the residual. has_experts: `mlp` is not a gated MLP but anything else, and stays as it is.
    """

    name: str
    query_key_norms: bool = False
    outer_norms: bool = False
    has_experts: bool = False

    def matches(self, layer: Any, dtypes: set[torch.dtype]) -> bool:
        """Whether the layer has these parts and no others, all of which can be joined, in one of these types."""
        children = {name: child for name, child in layer.named_modules() if name}
        if self.has_experts == ("mlp.gate_proj" in children):
            return False
        own = {name for name in children if not (self.has_experts and name.startswith("mlp."))}
        if own - {"mlp.act_fn"} != self._parts():
            return False
        linears = [children[name] for name in own if name.endswith("_proj")]
        kinds = {_kind(linear) for linear in linears}
        if self.has_experts or any(isinstance(linear, CodedLinear) and not linear.can_pack for linear in linears):
            dtypes = {torch.float32}
        return (
            len(kinds) == 1
            and None not in kinds
            and all(isinstance(getattr(children[name], "weight", None), torch.Tensor) for name in own if "norm" in name)
            and not any(has_hooks(module) for module in layer.modules())
            and len(found := {parameter.dtype for parameter in layer.parameters()}) == 1
            and found <= dtypes
        )

    def _parts(self) -> set[str]:
        parts = {"self_attn", *(f"self_attn.{name}_proj" for name in "qkvo"), "mlp"}
        parts |= {"input_layernorm", "post_attention_layernorm"}
        if self.query_key_norms:
            parts |= {"self_attn.q_norm", "self_attn.k_norm"}
        if self.outer_norms:
            parts |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
        if not self.has_experts:
            parts |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
        return parts


FAMILIES = (
    Family("Llama"),  # Mistral, Qwen 2, SmolLM and Gemma 1, too
    Family("Qwen 3", query_key_norms=True),
    Family("Gemma 2", outer_norms=True),
    Family("Gemma 3", query_key_norms=True, outer_norms=True),
    Family("Mixtral", has_experts=True),
    Family("Qwen 3 MoE", query_key_norms=True, has_experts=True),
)


class FusedGatedLayer(torch.nn.Module):
    """Takes the place of a decoder layer: attention with rotary positions between norms, then a gated MLP or experts.

    Replaces q_proj, k_proj, v_proj by `qkv` and gate_proj, up_proj by `gate_up`, rows joined in this order; needs a
    trial's Recorder for what only the stock attention knows: its scoring.

    A model in bfloat16 is for the compiled kernels alone; everything between the linear layers is then float32, and so
    is what comes out, unless `returns_input_type` is set.

    sum_over_ranks: set where this rank holds only a part of every layer's heads and inner units: adds up the partial
    results of attention and MLP before they are added to the residual.
    """

    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
    returns_input_type = True

    def __init__(
        self,
        layer: Any,
        family: Family,
        trial: Recorder,
        kernels: CpuKernels | None,
        memory: WeightMemory | None = None,
    ) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx = trial.layer
        self.scoring = trial.scoring
        self.num_heads, self.num_kv_heads, self.head_dim = trial.query.shape[1], trial.key.shape[1], trial.key.shape[2]
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        self.qkv = _join(kernels, attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = attention.o_proj
        self.input_norm = _norm_of(layer.input_layernorm)
        self.query_norm: FusedNorm | None = None
        self.key_norm: FusedNorm | None = None
        self.attention_norm: FusedNorm | None = None  # of what attention gives
        self.output_norm: FusedNorm | None = None  # of what the MLP gives
        self.experts: torch.nn.Module | None = None
        if family.query_key_norms:
            self.query_norm, self.key_norm = _norm_of(attention.q_norm), _norm_of(attention.k_norm)
        if family.outer_norms:
            self.attention_norm = _norm_of(layer.post_attention_layernorm)
            self.mlp_norm = _norm_of(layer.pre_feedforward_layernorm)
            self.output_norm = _norm_of(layer.post_feedforward_layernorm)
        else:
            self.mlp_norm = _norm_of(layer.post_attention_layernorm)
        if family.has_experts:
            self.experts = mlp
        else:
            self.gate_up = _join(kernels, mlp.gate_proj, mlp.up_proj)
            self.down = mlp.down_proj
            self.activation = mlp.act_fn
        self._in_bfloat16 = trial.query.dtype is torch.bfloat16
        self.whole: GatedLayer | None = None  # for a kernel that computes all of it
        self.together: LayersTogether | None = None
        packed = [
            self._pack(name, kernels, memory)
            for name in (("qkv", "output") if family.has_experts else ("qkv", "output", "gate_up", "down"))
        ]
        if kernels is not None and all(packed) and self.experts is None:
            self.whole = self._as_one_call(kernels)

    def _pack(self, name: str, kernels: CpuKernels | None, memory: WeightMemory | None) -> bool:
        """Give a linear layer the form that the kernels read, if it can have it."""
        linear = getattr(self, name)
        if kernels is not None and type(linear) in (torch.nn.Linear, JoinedLinears):
            setattr(self, name, PackedLinear(linear, kernels, memory))
            return True
        if isinstance(linear, QuantizedLinear):
            linear.pack(memory)
            return linear.for_kernels is not None
        return False

    def _as_one_call(self, kernels: CpuKernels) -> GatedLayer | None:
        """This layer for a kernel that computes all of it, if there is one."""
        activation = _compiled_activation(self.activation)
        if activation is None or self.down.in_features % kernels.block:
            return None
        norms = (self.input_norm, self.query_norm, self.key_norm, self.attention_norm, self.mlp_norm, self.output_norm)
        return GatedLayer(
            num_heads=self.num_heads,
            intermediate=self.down.in_features,
            kind=kernels.kind_of(self.qkv.for_kernels, in_bfloat16=self._in_bfloat16),
            scoring=self.scoring,
            activation=activation,
            norms=[None if norm is None else (norm.weight, norm.epsilon) for norm in norms],
            qkv=self.qkv.for_kernels,
            output=self.output.for_kernels,
            gate_up=self.gate_up.for_kernels,
            down=self.down.for_kernels,
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
        if (
            self.together is not None
            and isinstance(attention_metadata.plan, StepTables)
            and position_embeddings[0].shape[2] == self.head_dim
        ):
            return self.together.pass_on(self, hidden_states, position_embeddings, attention_metadata)
        cos, sin = (table[0].float() for table in position_embeddings)
        x = hidden_states[0].float()
        qkv = self._plain_in(x, cos, sin)
        query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        attended = attention_backend.run(self.layer_idx, query, key, value, attention_metadata, self.scoring)
        output = self._plain_out(attended.reshape(x.shape[0], -1), x)
        return (output.to(hidden_states.dtype) if self.returns_input_type else output)[None]

    def _plain_in(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        qkv: torch.Tensor = self.qkv(self.input_norm(x))
        qkv = qkv.view(x.shape[0], -1, self.head_dim)  # [num_tokens, heads + 2 * kv_heads, dim]
        if self.query_norm is not None and self.key_norm is not None:
            query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
            qkv = torch.cat((self.query_norm(query), self.key_norm(key), value), dim=1)
        turned = qkv[:, : self.num_heads + self.num_kv_heads, : cos.shape[1]]
        first, second = turned.chunk(2, dim=2)
        turned.copy_(turned * cos[:, None] + torch.cat((-second, first), dim=2) * sin[:, None])
        return qkv

    def _plain_out(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        added = self._sum(self.output(attended))
        h = x + (added if self.attention_norm is None else self.attention_norm(added))
        normed = self.mlp_norm(h)
        if self.experts is not None:
            added = self.experts(normed[None])[0]
        else:
            gate, up = self.gate_up(normed).chunk(2, dim=1)
            added = self.down(self.activation(gate) * up)
        added = self._sum(added)
        return h + (added if self.output_norm is None else self.output_norm(added))

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        return partial if self.sum_over_ranks is None else self.sum_over_ranks(partial)


class LayersTogether:
    """Fused layers that follow one another in a model, computed in one call when the last of them is reached. Those
    before it hand on what they were given. Not for models that do anything else to it on the way: RuntimeError."""

    def __init__(self, layers: list[FusedGatedLayer], kernels: CpuKernels) -> None:
        """layers: in the model's order, each of which has its `whole`."""
        self._first, self._last = layers[0], layers[-1]
        wholes = [(layer.layer_idx, layer.whole) for layer in layers if layer.whole is not None]
        assert len(wholes) == len(layers)
        self._layers = GatedLayers(wholes)
        self._kernels = kernels
        self._given: torch.Tensor | None = None
        self._rotary: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def join(cls, layers: list[FusedGatedLayer], kernels: CpuKernels) -> None:
        """Let these layers run together from now on."""
        together = cls(layers, kernels)
        for layer in layers:
            layer.together = together

    def pass_on(
        self,
        layer: FusedGatedLayer,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """hidden_states [1, num_tokens, hidden]: of the last layer all layers' result, of the others the same again."""
        if layer is self._first:
            self._given, self._rotary = hidden_states, []
        if hidden_states is not self._given:
            raise RuntimeError("something changes what one decoder layer hands to the next")
        self._rotary.append(position_embeddings)
        if layer is not self._last:
            return hidden_states
        rotary, self._given, self._rotary = self._rotary, None, []
        if len(rotary) != len(self._layers):
            raise RuntimeError(f"{len(rotary)} of {len(self._layers)} decoder layers were run")
        tables = {id(pair): (pair[0][0].float(), pair[1][0].float()) for pair in rotary}
        assert isinstance(metadata.plan, StepTables)
        output = self._kernels.layers(
            self._layers,
            metadata.plan,
            hidden_states[0].float(),
            [tables[id(pair)] for pair in rotary],
            *(metadata.keys, metadata.values),
        )
        return (output.to(hidden_states.dtype) if layer.returns_input_type else output)[None]


@dataclass
class Fusion:
    """What fuse_layers did. layers: how many of each family. num_differing: alike in structure, but not in result.
    all_together: the model's layers all run in one call, which may leave out what of the last one's is not wanted."""

    layers: Counter[str] = field(default_factory=Counter)
    num_differing: int = 0
    all_together: bool = False

    def __str__(self) -> str:
        parts = [f"{count} layers fused as {family}'s" for family, count in self.layers.items()] or ["no layer fused"]
        if self.num_differing:
            parts.append(f"{self.num_differing} alike in structure but not in result")
        return ", ".join(parts)


def fuse_layers(
    model: torch.nn.Module, kernels: CpuKernels | None, scorings: Mapping[int, Scoring], *, is_part: bool = False
) -> Fusion:
    """Replace what matches a family, in this model alone. Needs a model whose attention is attention/bridge.py's, and
    what each layer asked of it in the whole model. is_part: one rank's, whose experts add up by themselves."""
    done = Fusion()
    memory = WeightMemory()
    families = [family for family in FAMILIES if not (is_part and family.has_experts)]
    dtypes = {torch.float32} if kernels is None else kernels.dtypes
    for layers in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]:
        for index, layer in enumerate(layers):
            # A fused layer gets a step's metadata by keyword; a model that hands none on keeps its layers.
            family = next((one for one in families if one.matches(layer, dtypes)), None)
            if family is None or hasattr(layer, STEP_ATTRIBUTE):
                continue
            fused = _tried(family, layer, kernels, scorings, memory)
            if fused is None:
                done.num_differing += 1
            else:
                layers[index] = fused
                done.layers[family.name] += 1
        fused_layers = [layer for layer in layers if isinstance(layer, FusedGatedLayer)]
        if len(fused_layers) == len(layers):  # nobody else sees what they pass on
            for layer in fused_layers:
                layer.returns_input_type = False
        if kernels is not None and not is_part:
            for run in _runs(layers):
                LayersTogether.join(run, kernels)
                done.all_together = len(run) == len(layers) == len(scorings)
    return done


def call_separately(model: torch.nn.Module, kernels: CpuKernels | None) -> bool:
    """Give each fused layer a call of its own again; False where nothing was together."""
    found = [layer for layer in model.modules() if isinstance(layer, FusedGatedLayer) and layer.together is not None]
    for layer in found:
        assert kernels is not None
        LayersTogether.join([layer], kernels)
    return bool(found)


def _runs(layers: Iterable[torch.nn.Module]) -> list[list[FusedGatedLayer]]:
    """Layers behind one another for each of which there is a kernel that computes all of it."""
    runs: list[list[FusedGatedLayer]] = [[]]
    for layer in layers:
        if isinstance(layer, FusedGatedLayer) and layer.whole is not None:
            runs[-1].append(layer)
        else:
            runs.append([])
    return [run for run in runs if run]


@torch.inference_mode()
def _tried(
    family: Family,
    layer: Any,
    kernels: CpuKernels | None,
    scorings: Mapping[int, Scoring],
    memory: WeightMemory,
) -> FusedGatedLayer | None:
    """The fused layer, if it computes what the stock layer does."""
    if not isinstance(layer.self_attn.q_proj, IntegerLinear):
        is_rounded = layer.input_layernorm.weight.dtype is torch.bfloat16
        return _compared(family, layer, kernels, scorings, memory, _TOLERANCE_BFLOAT16 if is_rounded else _TOLERANCE)
    # In bfloat16 the stock layer rounds activations twice, to that and to integers: both are compared in float32.
    norms = [module for module in layer.modules() if not list(module.children()) and _kind(module) is None]
    dtype = layer.input_layernorm.weight.dtype
    with torch.inference_mode(False):
        for norm in norms:
            norm.float()
    fused = _compared(family, layer, kernels, scorings, memory, _TOLERANCE_INTEGERS)
    if fused is None:
        with torch.inference_mode(False):
            for norm in norms:
                norm.to(dtype)
    return fused


def _compared(
    family: Family,
    layer: Any,
    kernels: CpuKernels | None,
    scorings: Mapping[int, Scoring],
    memory: WeightMemory,
    tolerance: float,
) -> FusedGatedLayer | None:
    generator = torch.Generator().manual_seed(0)
    norm: torch.Tensor = layer.input_layernorm.weight
    dim = layer.self_attn.head_dim
    x = torch.randn(1, _TRIAL_ROWS, norm.shape[0], generator=generator).to(norm.dtype)
    angles = torch.randn(1, _TRIAL_ROWS, dim // 2, generator=generator).repeat(1, 1, 2).to(norm.dtype)
    stock, ours = Recorder(), Recorder()
    keywords = {"position_embeddings": (angles.cos(), angles.sin()), "attention_metadata": _NO_METADATA}
    try:
        expected = layer(x, attention_mask=None, attention_backend=stock, **keywords)
        stock.scoring = scorings.get(stock.layer, stock.scoring)  # a window may come with the mask, which is not here
        with torch.inference_mode(False):  # parameters that other modes may use too
            fused = FusedGatedLayer(layer, family, stock, kernels, memory)
        found = fused(x, attention_backend=ours, **keywords)
        pairs = ((expected, found), (stock.query, ours.query), (stock.key, ours.key), (stock.value, ours.value))
        for right, given in pairs:
            if not _close(right, given, tolerance):
                return None
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None  # not called as we thought, so not the layer we thought
    return fused


def _close(right: torch.Tensor, given: torch.Tensor, tolerance: float) -> bool:
    right, given = right.float(), given.float()
    return torch.allclose(right, given, atol=tolerance * float(right.abs().max()), rtol=0)


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


@torch.inference_mode()
def _norm_of(module: Any) -> FusedNorm:
    """An RMSNorm as one operation. Raises TypeError for a module that is none."""
    weight, epsilon = module.weight, getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float):
        raise TypeError(f"{type(module).__name__} is no RMSNorm")
    x = torch.randn(_TRIAL_ROWS, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    expected = module(x)
    tolerance = _TOLERANCE if weight.dtype is torch.float32 else _TOLERANCE_BFLOAT16
    with torch.inference_mode(False):
        for candidate in (weight.data.float(), 1.0 + weight.data.float()):
            norm = FusedNorm(candidate, epsilon)
            if _close(expected, norm(x.float()), tolerance):
                return norm
    raise TypeError(f"{type(module).__name__} is no RMSNorm")


def _compiled_activation(function: Callable[[torch.Tensor], torch.Tensor]) -> Activation | None:
    values = torch.linspace(-4, 4, 33)
    for activation, known in _ACTIVATIONS.items():
        if torch.allclose(function(values), known(values), atol=1e-6, rtol=0):
            return activation
    return None


_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU_TANH: functools.partial(functional.gelu, approximate="tanh"),
}


def _kind(linear: torch.nn.Module) -> type[torch.nn.Module] | None:
    """What can be joined with its like: plain linear layers, or quantized ones of one form."""
    return type(linear) if type(linear) is torch.nn.Linear or isinstance(linear, QuantizedLinear) else None


def _join(kernels: CpuKernels | None, *linears: Any) -> Any:
    """One linear layer whose outputs are those of all, one behind the other. Raises TypeError if there is none."""
    if isinstance(linears[0], QuantizedLinear):
        together = linears[0].joined_with(list(linears[1:]))
        if together is None:
            raise TypeError("these quantized layers cannot be joined")
        return together
    if kernels is not None:
        return JoinedLinears(list(linears))
    joined = torch.nn.Linear(1, 1, bias=linears[0].bias is not None)
    joined.in_features, joined.out_features = linears[0].in_features, sum(linear.out_features for linear in linears)
    joined.weight = torch.nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if joined.bias is not None:
        joined.bias = torch.nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joined
