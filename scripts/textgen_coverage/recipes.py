"""A tiny random checkpoint of any causal language model that transformers knows, from its configuration class alone.

Sizes that go by the same name in many configurations are made small; what a family needs beside that stands in one
table. Every parameter is drawn anew, those included that transformers starts at zero or one: a model whose gates, sinks
or biases are zero would hide what they do.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 512
MAX_POSITIONS = 512

_SMALL: dict[tuple[str, ...], Any] = {
    ("vocab_size", "vocab_size_per_layer_input"): VOCAB_SIZE,
    ("hidden_size_per_layer_input",): 16,
    ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size", "emb_dim"): 64,
    (
        "intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size",
        "dense_intermediate_size", "intermediate_size_mlp", "mlp_hidden_size", "dim_ff",
    ): 96,
    (
        "num_attention_heads", "n_head", "decoder_attention_heads", "encoder_attention_heads", "n_heads",
        "num_heads", "num_decoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads",
    ): 4,
    ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "multi_query_group_num"): 2,
    ("head_dim", "attention_head_dim", "swa_head_dim", "kv_channels", "dim_head", "d_kv"): 16,
    (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
        "num_moe_experts",
    ): 4,
    (
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
        "num_selected_experts",
    ): 2,
    ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"): 1,
    (
        "moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size", "shared_intermediate_size",
        "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    ): 48,
    ("n_group", "topk_group", "num_expert_group"): 1,
    ("q_lora_rank",): 32,
    ("kv_lora_rank", "o_lora_rank"): 16,
    ("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"): 16,
    ("v_head_dim", "swa_v_head_dim"): 24,
    ("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size"): 8,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"): MAX_POSITIONS,
    ("bos_token_id",): 1,
    ("eos_token_id",): 0,
    ("pad_token_id",): 2,
    ("is_decoder",): True,
    ("initializer_range", "init_std"): 0.2,
    ("floor_scale",): 4,
}  # fmt: skip
_SIZES = {name: value for names, value in _SMALL.items() for name in names}
_LAYERS = ("num_hidden_layers", "n_layer", "decoder_layers", "num_layers", "n_layers", "num_decoder_layers")
_MOST_LAYERS = 8

# What a family needs beside small sizes, and what makes it show all kinds of layers it may have. For a nested
# configuration: a dictionary of what differs in it.
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _DEFAULT_ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 2.0}},
    "gemma3n_text": {
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "intermediate_size": [96] * 10,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "activation_sparsity_pattern": [0.9] * 2 + [0.0] * 8,
    },
    "gemma4_text": {"num_hidden_layers": 6},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "glm4_moe": {"num_mtp_layers": 0},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"num_hidden_layers": 4},
    "llama4": {"text_config": {"num_hidden_layers": 4}},
    "mamba2": {"head_dim": 32},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_head_dim": 16},
    "olmo": {"clip_qkv": 2.0},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
}


class NoRecipe(Exception):
    """No tiny checkpoint of this model could be made; the text says why."""


def model_types() -> list[str]:
    """Every model type that AutoModelForCausalLM knows, in transformers' own names."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_config(model_type: str) -> Any:
    """A small configuration of the family, its nested configurations small as well."""
    config_class = CONFIG_MAPPING[model_type]
    return _small(config_class, OVERRIDES.get(model_type, {}))


def _small(config_class: Any, overrides: dict[str, Any]) -> Any:
    default = config_class()
    nested = {
        name: _small(type(getattr(default, name)), overrides.get(name, {}))
        for name in getattr(config_class, "sub_configs", {})
        if getattr(default, name, None) is not None
    }
    given = default.to_dict()
    known = set(given) | set(inspect.signature(config_class).parameters)
    settings: dict[str, Any] = {name: value for name, value in _SIZES.items() if name in known}
    for name in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"):
        if name in settings and given.get(name) == given.get(name.replace("key_value", "attention"), 0):
            settings[name] = 4
    for name in ("q_lora_rank", "sliding_window", "rotary_dim"):
        if name in settings and given.get(name, 0) is None:
            del settings[name]
    settings |= _fewer_layers(given, known)
    settings |= nested | {name: value for name, value in overrides.items() if name not in nested}
    return config_class(**{name: value for name, value in settings.items() if value is not None or name in given})


def _fewer_layers(given: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """So few layers that each kind of them occurs (at most _MOST_LAYERS), and lists of one entry per layer cut."""
    name = next((name for name in _LAYERS if name in known), None)
    if name is None or not isinstance(given.get(name), int):
        return {}
    before = given[name]
    per_layer = {
        key: value for key, value in given.items() if isinstance(value, list) and len(value) == before and before > 2
    }
    count = 2
    for values in per_layer.values():
        if all(isinstance(value, str) for value in values):
            count = max(count, *(values.index(kind) + 1 for kind in set(values)))
    count = min(count, _MOST_LAYERS)
    return {key: value[:count] for key, value in per_layer.items()} | {key: count for key in _LAYERS if key in known}


def save_checkpoint(folder: Path, model_type: str, seed: int = 0) -> None:
    """A random model of the family with a tokenizer. Raises NoRecipe."""
    try:
        config = make_config(model_type)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception as error:
        raise NoRecipe(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    _randomize(model, seed)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Parameters such that layers matter and logits are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(noise)
        elif parameter.ndim >= 2:
            parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(noise * 0.2)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<|end|>", "<|start|>", *(f"w{index}" for index in range(VOCAB_SIZE - 2))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|start|>")
