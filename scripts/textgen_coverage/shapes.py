"""Random checkpoints of a few hundred megabytes, in the shape of the families that are specialized.

Wide and shallow, so that a step costs what its matrices cost; made in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"

_WIDE: dict[str, Any] = {"hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 1024}
_GATED: dict[str, Any] = {**_WIDE, "intermediate_size": 2048, "num_hidden_layers": 8, "num_key_value_heads": 4}
# family -> transformers' configuration class, its sizes
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", _GATED),
    "Qwen 3": ("Qwen3Config", {**_GATED, "head_dim": 64}),
    "Gemma 2": ("Gemma2Config", {**_GATED, "head_dim": 64, "sliding_window": 256}),
    "Gemma 3": ("Gemma3TextConfig", {**_GATED, "head_dim": 64, "sliding_window": 256}),
    "Mixtral": (
        "MixtralConfig",
        {**_GATED, "intermediate_size": 1536, "num_hidden_layers": 3, "num_local_experts": 8},
    ),
    "Qwen 3 MoE": (
        "Qwen3MoeConfig",
        {
            **_GATED,
            "head_dim": 64,
            "num_hidden_layers": 3,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 768,
        },
    ),
    "Falcon": (
        "FalconConfig",
        {
            **_WIDE,
            "num_hidden_layers": 8,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
        },
    ),
    "StarCoder": (
        "GPTBigCodeConfig",
        {"n_embd": 768, "n_head": 12, "n_layer": 8, "n_positions": 1024, "multi_query": True},
    ),
    "StarCoder 2": ("Starcoder2Config", {**_GATED, "intermediate_size": 3072, "sliding_window": 256}),
}


def save_shape(folder: Path, family: str, tokenizer: PreTrainedTokenizerBase) -> float:
    """A checkpoint with the tokenizer's vocabulary, from a fixed seed; returns the megabytes of its weights."""
    class_name, sizes = SHAPES[family]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, class_name)(vocab_size=len(tokenizer), **sizes, **special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # wide enough for texts that do not repeat one token
            parameter.data.normal_(std=2.0 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    num_bytes: int = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return num_bytes / 1e6


def processor() -> str:
    """Its name."""
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def record(kind: str, found: dict[str, Any], machine: dict[str, Any] | None = None) -> None:
    """Put results of one kind (`gain`, `served`) into RESULTS, in the place of older ones of the same families.
    machine: where they were measured, if that matters."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    merged = {**results.get(kind, {}), **found}
    results[kind] = {family: merged[family] for family in SHAPES if family in merged}
    if machine is not None:
        results["machine"] = machine
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
