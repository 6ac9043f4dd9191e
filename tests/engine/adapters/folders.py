"""PEFT folders with random weights for tiny checkpoints, and the same checkpoints with an adapter merged in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def linear_sizes(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of every linear layer of the checkpoint's model."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            sizes[name] = (module.in_features, module.out_features)
        elif hasattr(module, "nf"):
            sizes[name] = (module.nx, module.nf)
    return sizes


def save_adapter(
    folder: Path,
    sizes: dict[str, tuple[int, int]],
    targets: list[str] | str,
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    strength: float = 0.5,
    ranks: dict[str, int] | None = None,
    **settings: Any,
) -> Path:
    """An adapter of the layers whose name ends in a target (a text: matches it as a regex). ranks: rank_pattern."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (num_inputs, num_outputs) in sizes.items():
        if isinstance(targets, str):
            chosen = name != "lm_head" if targets == "all-linear" else re.fullmatch(targets, name) is not None
        else:
            chosen = any(f".{name}".endswith(f".{target}") for target in targets)
        if not chosen:
            continue
        own_rank = next((value for key, value in (ranks or {}).items() if f".{name}".endswith(f".{key}")), rank)
        key = f"base_model.model.{name}"
        weights[f"{key}.lora_A.weight"] = torch.randn(own_rank, num_inputs, generator=generator) * num_inputs**-0.5
        weights[f"{key}.lora_B.weight"] = torch.randn(num_outputs, own_rank, generator=generator) * strength
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": targets}
    if ranks:
        config["rank_pattern"] = ranks
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


def save_merged(folder: Path, checkpoint: Path, adapter: Path) -> Path:
    """The checkpoint with W + scale * B A in the place of each adapted W: the definition, written out."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for key in [key for key in weights if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = weights[key], weights[key.replace("lora_A", "lora_B")]
        rank = down.shape[0]
        alpha = next(
            (value for end, value in settings.get("alpha_pattern", {}).items() if f".{name}".endswith(f".{end}")),
            settings["lora_alpha"],
        )
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        module = model.get_submodule(name)
        delta = (up @ down) * scale
        with torch.no_grad():
            module.weight += delta.t() if hasattr(module, "nf") else delta
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder
