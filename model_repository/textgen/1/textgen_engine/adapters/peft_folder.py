"""Reads an adapter as PEFT saves it: adapter_config.json beside adapter_model.safetensors.

Owns what the two files mean: which layers are adapted, how their products are scaled, and what is refused because the
layers cannot apply it. Knows the model by the names and sizes of its linear layers only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# Settings of PEFT's LoraConfig that change what an adapted layer computes, and that we do not apply.
_REFUSED_SETTINGS = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_BASE_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+?)(?:\.base_layer)?\.weight")
# Layers of experts see only the tokens routed to them, in an order of their own: rows of the step mean nothing there.
_ROUTED = re.compile(r"(^|\.)experts\.")


class AdapterError(Exception):
    """The folder holds no adapter that this model can apply; the text says why."""


@dataclass(frozen=True)
class LinearSizes:
    """What a linear layer maps: x [..., num_inputs] -> [..., num_outputs]."""

    num_inputs: int
    num_outputs: int


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter: for each adapted layer, by its name in the model, x -> x @ down.t() @ up to be added.

    down: [rank, num_inputs]; up: [rank, num_outputs], scale included. rank: the largest of all layers.
    """

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    rank: int
    num_bytes: int


def read_adapter(
    folder: Path,
    layers: Mapping[str, LinearSizes],
    *,
    head: str | None,
    max_rank: int,
    dtype: torch.dtype,
    base_weight: Callable[[str], torch.Tensor | None] = lambda _: None,
) -> AdapterWeights:
    """The adapter in `folder`, on the CPU in `dtype`, for a model with these linear layers.

    head: the layer that makes logits, which PEFT's "all-linear" leaves out. base_weight: a weight of the model by its
    module's name; PEFT may save such beside the adapter, and then they must be equal. Raises AdapterError.
    """
    settings = _read_settings(folder)
    weights = _read_weights(folder / WEIGHTS_NAME)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        match = _WEIGHT.fullmatch(name)
        if match is not None:
            pairs.setdefault(match["module"], {})[match["side"]] = weight
        else:
            _check_base_weight(name, weight, dtype, base_weight)
    if not pairs:
        raise AdapterError(f"{WEIGHTS_NAME} has no LoRA weights")
    _check_targets(settings, pairs, layers, head)
    adapted = {module: _as_products(module, pair, layers[module], settings, dtype) for module, pair in pairs.items()}
    rank = max(down.shape[0] for down, _ in adapted.values())
    if rank > max_rank:
        raise AdapterError(f"its rank is {rank}; at most {max_rank} is allowed (TEXTGEN_MAX_LORA_RANK)")
    num_bytes = sum(side.numel() * side.element_size() for pair in adapted.values() for side in pair)
    return AdapterWeights(adapted, rank, num_bytes)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise AdapterError(f"the folder {folder} does not exist")
    if not path.is_file():
        raise AdapterError(f"{folder} is no adapter: it has no {CONFIG_NAME}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{path} is no JSON object")
    kind = str(settings.get("peft_type", "")).upper()
    if kind != "LORA":
        raise AdapterError(f"its peft_type is {kind or 'not given'}; only LORA is supported")
    task = settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterError(f"its task_type is {task}; only CAUSAL_LM is supported")
    for name in _REFUSED_SETTINGS:
        if settings.get(name):
            raise AdapterError(f"it sets `{name}`, which is not supported; given: {settings[name]!s:.100}")
    if settings.get("bias", "none") != "none":
        raise AdapterError(f"it sets `bias`, which is not supported; given: {settings['bias']!r}")
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise AdapterError(f"`{name}` must be a number above 0; given: {value!r}")
    return settings


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        if pickled.is_file():
            raise AdapterError(f"{pickled} is a pickle, which may run code when it is read: save it as safetensors")
        raise AdapterError(f"{path.parent} is no adapter: it has no {WEIGHTS_NAME}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error


def _check_base_weight(
    name: str, weight: torch.Tensor, dtype: torch.dtype, base_weight: Callable[[str], torch.Tensor | None]
) -> None:
    """Refuse a weight that is no part of a LoRA product, unless it is the model's own."""
    match = _BASE_WEIGHT.fullmatch(name)
    base = None if match is None or ".lora_" in name else base_weight(match["module"])
    if base is None:
        raise AdapterError(f"{WEIGHTS_NAME} has {name}, which is not supported")
    if base.shape != weight.shape or not torch.equal(base.cpu().to(dtype), weight.to(dtype)):
        raise AdapterError(f"{WEIGHTS_NAME} has another {name} than the model, which is not supported")


def _check_targets(
    settings: Mapping[str, Any], given: Iterable[str], layers: Mapping[str, LinearSizes], head: str | None
) -> None:
    """Refuse weights of layers that the model lacks or the settings do not name, and an adapter that lacks some."""
    targeted = {name for name in layers if _is_targeted(name, settings, is_head=name == head)}
    for module in given:
        if module not in layers:
            raise AdapterError(f"it adapts {module}, and the model has no linear layer of that name")
        if _ROUTED.search(module):
            raise AdapterError(f"it adapts {module}: layers of experts are not supported")
        if module not in targeted:
            raise AdapterError(f"{WEIGHTS_NAME} has weights of {module}, which `target_modules` does not name")
    missing = sorted(targeted - set(given))
    if missing and settings.get("target_modules") != "all-linear":
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AdapterError(f"{WEIGHTS_NAME} lacks weights of {missing[0]}{more}: incomplete, or for another model")


def _is_targeted(module: str, settings: Mapping[str, Any], *, is_head: bool) -> bool:
    """PEFT's rules (tuners_utils.check_target_module_exists): a text is a regex for the whole name, an entry of a list
    is the whole name or its end; then layers_to_transform picks among the numbered layers."""
    targets = settings.get("target_modules")
    if targets is None:
        raise AdapterError("it has no `target_modules`")
    excluded = settings.get("exclude_modules")
    if excluded and _is_named(module, excluded):
        return False
    if targets == "all-linear":
        return not is_head
    if not _is_named(module, targets):
        return False
    chosen = settings.get("layers_to_transform")
    if chosen is None or chosen == [] or isinstance(targets, str):
        return True
    patterns = settings.get("layers_pattern")
    patterns = [patterns] if isinstance(patterns, str) else patterns or []
    found = [re.match(rf".*\.{pattern}\.(\d+)\.", module) for pattern in patterns] or [
        re.match(r".*\.[^.]*\.(\d+)\.", module)
    ]
    numbers = [int(match[1]) for match in found if match is not None]
    wanted = [chosen] if isinstance(chosen, int) else chosen
    return bool(numbers) and numbers[0] in wanted


def _is_named(module: str, names: Any) -> bool:
    if isinstance(names, str):
        try:
            return re.fullmatch(names, module) is not None
        except re.error as error:
            raise AdapterError(f"{names!r} is no regular expression: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"`target_modules` must be a text or a list of texts; given: {names!r:.100}")
    return any(module == name or module.endswith(f".{name}") for name in names)


def _as_products(
    module: str,
    pair: Mapping[str, torch.Tensor],
    sizes: LinearSizes,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    if set(pair) != {"A", "B"}:
        raise AdapterError(f"{WEIGHTS_NAME} lacks lora_{'B' if 'A' in pair else 'A'} of {module}")
    down, up = pair["A"], pair["B"]
    rank = down.shape[0]
    if down.shape != (rank, sizes.num_inputs) or up.shape != (sizes.num_outputs, rank) or not rank:
        shapes = " and ".join("x".join(map(str, weight.shape)) for weight in (down, up))
        wanted = f"rank x {sizes.num_inputs} and {sizes.num_outputs} x rank"
        raise AdapterError(f"its weights of {module} are {shapes}, the model needs {wanted}: it is for another model")
    configured = _of_pattern(module, settings.get("rank_pattern"), settings["r"])
    if rank != configured:
        raise AdapterError(f"its weights of {module} have rank {rank}, its settings say {configured}")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise AdapterError(f"its weights of {module} have values that are not finite")
    alpha = _of_pattern(module, settings.get("alpha_pattern"), settings["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return down.to(dtype).contiguous(), (up.float() * scale).t().to(dtype).contiguous()


def _of_pattern(module: str, pattern: Any, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first key that is the end of the name, as a regex."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
