"""Which part of every parameter of a model one rank holds, and what has to be added up over the ranks.

A plan comes from transformers' own (`base_model_tp_plan` of a configuration: which layers are split by their outputs,
which by their inputs) as far as that splits by whole heads without copying activations about; families here say it
where transformers has none, or one that wastes. What neither covers is refused when the model is loaded, with the
reason: half a plan would not fail, it would answer nonsense.

The plan is made on a model without memory (the meta device). `Plan.shrink` then gives each module the shape of its
part, before any weight is read; reading is models/sharded_reading.py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from textgen_engine.adapters.peft_folder import LinearSizes
from textgen_engine.models.fusion import FusedGatedLayer
from textgen_engine.models.quantization.part import LayerPart
from textgen_engine.parallel.group import Collectives
from textgen_engine.parallel.linear import NormOverHeads, SummedOverRanks, VocabularyEmbedding, VocabularyHead
from textgen_engine.parallel.split import (
    CannotSplit,
    Heads,
    Range,
    Shard,
    Slice,
    blocked_qvk_rows,
    grouped_qkv_rows,
    halves_rows,
    kv_rows,
    query_rows,
    split_heads,
    split_units,
    split_vocabulary,
    stacked_qkv_rows,
    vocabulary_width,
)

# Outputs of a layer by what they are made of; `inner` is the width of an MLP, `halves` two of them (gate and up).
_HEAD_LAYOUTS: dict[str, Callable[[int, Heads], tuple[Range, ...]]] = {
    "query": query_rows,
    "kv": kv_rows,
    "stacked qkv": stacked_qkv_rows,
    "grouped qkv": grouped_qkv_rows,
    "blocked qvk": blocked_qvk_rows,
}


@dataclass(frozen=True)
class Family:
    """What transformers' plan does not say, by a module's path inside a decoder layer.

    outputs: layers split by their outputs, with the layout of these. inputs: layers split by their inputs ("query"
    or "inner"), whose results are partial sums. norms: norms over all heads at once, with what they are over.
    experts: joined experts, with the layout of gate and up ("halves", or "pairs" of one each). whole: what every rank
    of attention holds.
    """

    outputs: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()


_NORMS_OVER_HEADS = Family(
    outputs={"self_attn.q_proj": "query", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"},
    inputs={"self_attn.o_proj": "query"},
    norms={"self_attn.q_norm": "query", "self_attn.k_norm": "kv"},
)
# Latent attention: what makes the latent is small and the same for all heads, what makes heads of it is split by heads.
_LATENT = Family(
    outputs={"self_attn.q_proj": "query", "self_attn.q_b_proj": "query", "self_attn.kv_b_proj": "query"},
    inputs={"self_attn.o_proj": "query"},
    whole=frozenset(
        f"self_attn.{name}" for name in ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
    ),
)
_JOINED_GATE_UP = Family(outputs={"mlp.gate_up_proj": "halves"}, inputs={"mlp.down_proj": "inner"})
# By model_type of the configuration.
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        outputs={"attn.c_attn": "stacked qkv", "mlp.c_fc": "inner"},
        inputs={"attn.c_proj": "query", "mlp.c_proj": "inner"},
    ),
    "bloom": Family(
        outputs={"self_attention.query_key_value": "grouped qkv", "mlp.dense_h_to_4h": "inner"},
        inputs={"self_attention.dense": "query", "mlp.dense_4h_to_h": "inner"},
    ),
    "mpt": Family(
        outputs={"attn.Wqkv": "stacked qkv", "ffn.up_proj": "inner"},
        inputs={"attn.out_proj": "query", "ffn.down_proj": "inner"},
    ),
    "gptj": Family(
        outputs={"attn.q_proj": "query", "attn.k_proj": "kv", "attn.v_proj": "kv", "mlp.fc_in": "inner"},
        inputs={"attn.out_proj": "query", "mlp.fc_out": "inner"},
    ),
    "codegen": Family(
        outputs={"attn.qkv_proj": "blocked qvk", "mlp.fc_in": "inner"},
        inputs={"attn.out_proj": "query", "mlp.fc_out": "inner"},
    ),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gpt_oss": Family(
        outputs={"self_attn.q_proj": "query", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"},
        inputs={"self_attn.o_proj": "query"},
        experts={"mlp.experts": "pairs"},
    ),
    "gpt_neox": Family(outputs={"attention.query_key_value": "grouped qkv"}, inputs={"attention.dense": "query"}),
    "opt": Family(
        outputs={"self_attn.q_proj": "query", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv", "fc1": "inner"},
        inputs={"self_attn.out_proj": "query", "fc2": "inner"},
    ),
    "phi3": Family(
        outputs={"self_attn.qkv_proj": "stacked qkv", **_JOINED_GATE_UP.outputs},
        inputs={"self_attn.o_proj": "query", **_JOINED_GATE_UP.inputs},
    ),
    "glm": _JOINED_GATE_UP,
    "glm4": _JOINED_GATE_UP,
    "olmo2": _NORMS_OVER_HEADS,
    "olmo3": _NORMS_OVER_HEADS,
    "olmoe": _NORMS_OVER_HEADS,
}
# Where one key-value head serves all queries, the three parts lie behind one another; else they lie group by group.
_MULTI_QUERY_LAYOUTS = {True: "stacked qkv", False: "grouped qkv"}


@dataclass
class Plan:
    """Everything that is split, by names of the whole model's parameters and modules.

    slices: parameter -> the rank's part; what is not named is held whole by every rank. heads: per attention module.
    partial: modules whose results are to be added up. biases: parameters that only rank 0 may add to these.
    norms: norms over all heads, with the whole width. embedding, head: modules split by the vocabulary, if any.
    by_outputs, by_inputs: linear layers, each with the rank's outputs or inputs and how many there are in all.
    """

    shard: Shard
    vocab_size: int = 0
    slices: dict[str, Slice] = field(default_factory=dict)
    heads: dict[str, Heads] = field(default_factory=dict)
    partial: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    norms: dict[str, int] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    by_outputs: dict[str, tuple[tuple[Range, ...], int]] = field(default_factory=dict)
    by_inputs: dict[str, tuple[tuple[Range, ...], int]] = field(default_factory=dict)

    def whole_sizes(self, name: str, part: LinearSizes) -> tuple[int, int]:
        """Inputs and outputs of the whole model's linear layer, of which `part` is the rank's."""
        _, num_inputs = self.by_inputs.get(name, ((), part.num_inputs))
        _, num_outputs = self.by_outputs.get(name, ((), part.num_outputs))
        return num_inputs, num_outputs

    def part_of_products(self, name: str, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of an adapter's down [rank, inputs] and up [rank, outputs] for a layer, what goes with the rank's part."""
        inputs, _ = self.by_inputs.get(name, (None, 0))
        outputs, _ = self.by_outputs.get(name, (None, 0))
        return _columns(down, inputs), _columns(up, outputs)

    def _part_of_layer(self, name: str, layer: Any) -> LayerPart:
        outputs, inputs = _num_outputs(layer), _num_inputs(layer)
        return LayerPart(
            *self.by_outputs.get(name, (((0, outputs),), outputs)), *self.by_inputs.get(name, (((0, inputs),), inputs))
        )

    @property
    def num_local_ids(self) -> int:
        """Token ids of which this rank holds the embedding."""
        start, stop = split_vocabulary(self.vocab_size, self.shard)
        return stop - start

    def shrink(self, model: torch.nn.Module) -> None:
        """Give every split parameter the shape of the rank's part (its values are gone), and tell the modules around
        them how many heads they have."""
        for module_name, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                part = self.slices.get(f"{module_name}.{name}" if module_name else name)
                if part is not None:
                    shape = part.shape(parameter.shape)
                    empty = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
                    setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
                    _tell_size(module, parameter.shape, shape)
                    if (
                        name == "down_proj" and part.dim == 2
                    ):  # of experts; for those whose weights are stored quantized
                        module.inner_of_rank = part.ranges, parameter.shape[2]
        for name, layer in model.named_modules():
            if name in self.by_outputs or name in self.by_inputs:
                layer.part_of_rank = self._part_of_layer(name, layer)
        configs: dict[tuple[int, Heads], Any] = {}
        for name, heads in self.heads.items():
            _tell_heads(model.get_submodule(name), heads, configs)


class PartialConfig:
    """A model's configuration as an attention module of one rank sees it: with its own numbers of heads, and with
    everything else as it is in the model's at that moment."""

    def __init__(self, whole: Any, **own: int) -> None:
        self._whole = whole
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def make_plan(model: Any, shard: Shard) -> Plan:
    """What one rank holds of `model`, of which only shapes are looked at.

    Raises CannotSplit for an architecture that nobody has said how to split, and for sizes that do not allow it.
    """
    config = model.config.get_text_config()
    plan = Plan(shard, config.vocab_size)
    family = _family_of(config)
    stock = model.tp_plan or {}
    if not family.outputs and not stock:
        raise CannotSplit("neither transformers nor this server knows how to split its layers")
    for name, module in model.named_modules():
        if _is_attention(module):
            _plan_attention(plan, name, module, config, family, stock)
    for name, module in model.named_modules():
        if name and not any(name.startswith(f"{attention}.") for attention in plan.heads):
            _plan_inner(plan, name, module, family, stock)
    if not plan.heads:
        raise CannotSplit("it has no attention layers that are known")
    _plan_vocabulary(plan, model)
    return plan


def _family_of(config: Any) -> Family:
    if config.model_type == "gpt_bigcode":
        return Family(
            outputs={"attn.c_attn": _MULTI_QUERY_LAYOUTS[config.multi_query], "mlp.c_fc": "inner"},
            inputs={"attn.c_proj": "query", "mlp.c_proj": "inner"},
        )
    if config.model_type == "falcon":
        layout = _MULTI_QUERY_LAYOUTS[config.multi_query and not config.new_decoder_architecture]
        return Family(
            outputs={"self_attention.query_key_value": layout, "mlp.dense_h_to_4h": "inner"},
            inputs={"self_attention.dense": "query", "mlp.dense_4h_to_h": "inner"},
        )
    return FAMILIES.get(config.model_type, Family())


def _is_attention(module: Any) -> bool:
    return isinstance(getattr(module, "layer_idx", None), int) and any(
        isinstance(child, (torch.nn.Linear, Conv1D)) for child in module.children()
    )


def _plan_attention(plan: Plan, name: str, module: Any, config: Any, family: Family, stock: dict[str, str]) -> None:
    heads = split_heads(*_num_heads(config), plan.shard)
    layouts: dict[str, str] = {}
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}"
        layout = _declared(full_name, family.outputs) or _stock_outputs(child_name, full_name, stock)
        if layout is not None:
            layouts[child_name] = layout
            _split_outputs(plan, full_name, child, _HEAD_LAYOUTS[layout](_num_outputs(child), heads))
        elif _declared(full_name, family.inputs) or _stock_style(full_name, stock) == "rowwise":
            layouts[child_name] = "inputs"
            _split_inputs(plan, full_name, child, query_rows(_num_inputs(child), heads))
        elif any(full_name.endswith(f".{path}") for path in family.whole):
            continue
        elif _declared(full_name, family.norms) is not None:
            _split_norm(plan, full_name, child, _declared(full_name, family.norms) == "query", heads)
        else:
            _keep_or_split_by_heads(plan, full_name, child, heads)
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.shape[0] != heads.num_query:  # such as attention sinks: one number per head
            raise CannotSplit(f"{name}.{parameter_name} has no known layout")
        plan.slices[f"{name}.{parameter_name}"] = Slice(0, (heads.query,))
    if "inputs" not in layouts.values() or len(layouts) < 2:
        raise CannotSplit(f"the layers of {name} have no known layout")
    plan.heads[name] = heads


def _num_heads(config: Any) -> tuple[int, int]:
    num_query = config.num_attention_heads
    num_kv = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    if hasattr(config, "multi_query") and not getattr(config, "new_decoder_architecture", False):
        num_kv = 1 if config.multi_query else num_query  # StarCoder and old Falcons: other names say nothing
    return num_query, num_kv or num_query


def _stock_outputs(child_name: str, full_name: str, stock: dict[str, str]) -> str | None:
    """The layout that transformers' plan implies: it splits by outputs only what is separate layers of whole heads."""
    if _stock_style(full_name, stock) != "colwise":
        return None
    layout = {"q_proj": "query", "k_proj": "kv", "v_proj": "kv"}.get(child_name)
    if layout is None:
        raise CannotSplit(f"{full_name} has no known layout")
    return layout


def _keep_or_split_by_heads(plan: Plan, name: str, module: Any, heads: Heads) -> None:
    """What no plan names: norms of one head are the same for all heads; weights per head are split with the heads."""
    for parameter_name, parameter in module.named_parameters():
        if parameter.dim() == 1 and not isinstance(module, (torch.nn.Linear, Conv1D)) and parameter.shape[0] <= 512:
            is_per_head = False
        elif parameter.dim() == 2 and parameter.shape[0] in (heads.num_query, heads.num_kv) and "norm" in name:
            is_per_head = True
        else:
            raise CannotSplit(f"{name}.{parameter_name} has no known layout")
        if is_per_head:
            held = heads.query if "q_" in name.rpartition(".")[2] else heads.kv
            plan.slices[f"{name}.{parameter_name}"] = Slice(0, (held,))


def _split_norm(plan: Plan, name: str, module: Any, is_query: bool, heads: Heads) -> None:
    if not is_query and heads.num_kv < plan.shard.world_size:
        raise CannotSplit(f"{name} is over {heads.num_kv} key-value heads, fewer than ranks")
    width = module.weight.shape[0]
    plan.slices[f"{name}.weight"] = Slice(0, (query_rows if is_query else kv_rows)(width, heads))
    plan.norms[name] = width


def _plan_inner(plan: Plan, name: str, module: Any, family: Family, stock: dict[str, str]) -> None:
    """Split one layer outside attention: part of an MLP, or joined experts."""
    style = _stock_style(name, stock)
    layout = _declared(name, family.outputs)
    if _declared(name, family.experts) == "pairs":
        _split_paired_experts(plan, name, module)
    elif _declared(name, family.experts) or style == "moe_tp_experts":
        _split_experts(plan, name, module)
    elif not isinstance(module, (torch.nn.Linear, Conv1D)):
        return
    elif layout is not None or style == "colwise":
        rows_of = halves_rows if layout == "halves" else _units
        _split_outputs(plan, name, module, rows_of(_num_outputs(module), plan.shard))
    elif _declared(name, family.inputs) or style == "rowwise":
        _split_inputs(plan, name, module, _units(_num_inputs(module), plan.shard))


def _units(rows: int, shard: Shard) -> tuple[Range, ...]:
    return (split_units(rows, shard),)


def _split_experts(plan: Plan, name: str, module: Any) -> None:
    """gate_up_proj [experts, 2 * inner, hidden] and down_proj [experts, hidden, inner], both split by inner."""
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"gate_up_proj", "down_proj"} or getattr(module, "is_transposed", False):
        raise CannotSplit(f"the experts of {name} have no known layout: {', '.join(sorted(parameters))}")
    if parameters["gate_up_proj"].shape[1] != 2 * parameters["down_proj"].shape[2]:
        raise CannotSplit(f"the experts of {name} have no known layout")
    plan.slices[f"{name}.gate_up_proj"] = Slice(1, halves_rows(parameters["gate_up_proj"].shape[1], plan.shard))
    plan.slices[f"{name}.down_proj"] = Slice(2, _units(parameters["down_proj"].shape[2], plan.shard))
    plan.partial.append(name)


def _split_paired_experts(plan: Plan, name: str, module: Any) -> None:
    """gate_up_proj [experts, hidden, 2 * inner] of a gate and an up in turn, down_proj [experts, inner, hidden], and a
    bias for each (gpt-oss)."""
    start, stop = split_units(module.down_proj.shape[1], plan.shard)
    plan.slices[f"{name}.gate_up_proj"] = Slice(2, ((2 * start, 2 * stop),))
    plan.slices[f"{name}.gate_up_proj_bias"] = Slice(1, ((2 * start, 2 * stop),))
    plan.slices[f"{name}.down_proj"] = Slice(1, ((start, stop),))
    plan.biases.append(f"{name}.down_proj_bias")
    plan.partial.append(name)


def _split_outputs(plan: Plan, name: str, module: Any, part: tuple[Range, ...]) -> None:
    plan.slices[f"{name}.weight"] = Slice(_output_dim(module), part)
    plan.by_outputs[name] = part, _num_outputs(module)
    if module.bias is not None:
        plan.slices[f"{name}.bias"] = Slice(0, part)


def _split_inputs(plan: Plan, name: str, module: Any, part: tuple[Range, ...]) -> None:
    plan.slices[f"{name}.weight"] = Slice(1 - _output_dim(module), part)
    plan.by_inputs[name] = part, _num_inputs(module)
    plan.partial.append(name)
    if module.bias is not None:
        plan.biases.append(f"{name}.bias")


def _output_dim(module: Any) -> int:
    return 1 if isinstance(module, Conv1D) else 0  # GPT-2's Conv1D keeps its weight the other way round


def _num_outputs(module: Any) -> int:
    num_outputs: int = module.weight.shape[_output_dim(module)]
    return num_outputs


def _num_inputs(module: Any) -> int:
    num_inputs: int = module.weight.shape[1 - _output_dim(module)]
    return num_inputs


def _plan_vocabulary(plan: Plan, model: Any) -> None:
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, torch.nn.Embedding):
        raise CannotSplit(f"its embedding is a {type(embedding).__name__}")
    part = Slice(0, (split_vocabulary(embedding.weight.shape[0], plan.shard),))
    plan.embedding = names[embedding]
    plan.slices[f"{plan.embedding}.weight"] = part
    if not isinstance(head, torch.nn.Linear) or head.weight.shape[0] != embedding.weight.shape[0]:
        raise CannotSplit(f"its head is a {type(head).__name__} of another vocabulary than its embedding")
    plan.vocab_size = head.weight.shape[0]
    plan.head = names[head]
    plan.slices[f"{plan.head}.weight"] = part
    plan.by_outputs[plan.head] = part.ranges, plan.vocab_size
    if head.bias is not None:
        plan.slices[f"{plan.head}.bias"] = part


def _declared(name: str, paths: dict[str, str]) -> str | None:
    return next((said for path, said in paths.items() if name.endswith(f".{path}")), None)


def _stock_style(name: str, stock: dict[str, str]) -> str | None:
    return stock.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def _columns(matrix: torch.Tensor, ranges: tuple[Range, ...] | None) -> torch.Tensor:
    return matrix if ranges is None else torch.cat([matrix[:, start:stop] for start, stop in ranges], dim=1)


def _tell_size(module: Any, whole: torch.Size, part: tuple[int, ...]) -> None:
    if isinstance(module, torch.nn.Linear) and len(part) == 2:
        module.out_features, module.in_features = part
    elif isinstance(module, Conv1D) and len(part) == 2:
        module.nx, module.nf = part
    elif isinstance(module, torch.nn.Embedding):
        module.num_embeddings, module.padding_idx = part[0], None  # padding matters to gradients only
    for name in ("intermediate_dim", "intermediate_size"):
        if len(whole) == 3 and getattr(module, name, None) == whole[2]:
            setattr(module, name, part[2])


def _tell_heads(module: Any, heads: Heads, configs: dict[tuple[int, Heads], Any]) -> None:
    """Set what attention modules keep of their heads, under the names transformers' classes use."""
    module.heads_of_rank = heads  # for what is worked out per head from their number, such as ALiBi's slopes
    dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    local_query, local_kv = heads.num_local_query, heads.num_local_kv
    for name, whole, part in _numbers(heads, dim):
        if getattr(module, name, None) == whole:
            setattr(module, name, part)
    if hasattr(module, "num_key_value_groups"):
        module.num_key_value_groups = local_query // local_kv
    config = getattr(module, "config", None)
    if config is not None:
        key = (id(config), heads)
        if key not in configs:
            configs[key] = PartialConfig(config, num_attention_heads=local_query, num_key_value_heads=local_kv)
        module.config = configs[key]


def _numbers(heads: Heads, dim: int | None) -> Iterator[tuple[str, int, int]]:
    """Attribute, its value for the whole model, its value for the rank."""
    for name in ("num_heads", "num_attention_heads", "n_heads"):
        yield name, heads.num_query, heads.num_local_query
    for name in ("num_key_value_heads", "num_kv_heads", "kv_heads"):
        yield name, heads.num_kv, heads.num_local_kv
    if dim is not None:
        for name in ("split_size", "embed_dim"):
            yield name, heads.num_query * dim, heads.num_local_query * dim
        yield "kv_dim", heads.num_kv * dim, heads.num_local_kv * dim


def connect_ranks(model: torch.nn.Module, plan: Plan, collectives: Collectives) -> None:
    """Let the ranks work together: from here on the model computes what the whole one does, on all ranks at once."""
    for module in model.modules():
        if isinstance(module, FusedGatedLayer):
            module.sum_over_ranks = collectives.all_reduce
    for name in plan.partial:
        _wrap(model, name, partial(SummedOverRanks, collectives=collectives))
    for name, width in plan.norms.items():
        _wrap(model, name, partial(NormOverHeads, width=width, collectives=collectives))
    width = vocabulary_width(plan.vocab_size, plan.shard.world_size)
    start, stop = split_vocabulary(plan.vocab_size, plan.shard)
    if plan.embedding is not None:
        _wrap(model, plan.embedding, lambda inner: VocabularyEmbedding(inner, start, stop - start, collectives))
    if plan.head is not None:
        _wrap(model, plan.head, lambda inner: VocabularyHead(inner, plan.vocab_size, width, collectives))


def keep_biases_of_rank_0(model: torch.nn.Module, plan: Plan) -> None:
    """A bias of a partial result is added once: by rank 0, the others hold zeros."""
    if plan.shard.rank:
        for name in plan.biases:
            model.get_parameter(name).data.zero_()


def _wrap(model: torch.nn.Module, name: str, wrapper: Callable[[Any], torch.nn.Module]) -> None:
    parent: torch.nn.Module = model
    *path, child_name = name.split(".")
    for step in path:
        if isinstance(parent, FusedGatedLayer):
            return  # which adds up by itself
        parent = parent.get_submodule(step)
    setattr(parent, child_name, wrapper(parent.get_submodule(child_name)))
