"""`models/loader.py`: what is refused, with a line that says why, and what is read from a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import ModelConfig
from textgen_engine.errors import ModelLoadError
from textgen_engine.models.loader import LoadedModel, load_model

from .tiny import EOS_ID, MAX_POSITIONS, VOCAB_SIZE, save_checkpoint, set_eos_ids


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(ModelConfig(str(folder), **options), SdpaBackend())


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def cut(path: Path, share: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not a valid JSON"),
    "config of nothing known": (lambda f: change_config(f, model_type="nosuch"), "nosuch"),
    "config of the wrong type": (lambda f: change_config(f, hidden_size="wide"), "hidden_size"),
    "config that contradicts itself": (lambda f: change_config(f, num_attention_heads=7), "attention heads"),
    "no generator": (lambda f: change_config(f, model_type="t5"), "T5Config"),
    "no safetensors": (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
    "header cut off": (lambda f: cut(f / "model.safetensors", 0.001), "damaged"),
    "weights cut off": (lambda f: cut(f / "model.safetensors", 0.9), "damaged"),
    "a weight missing": (drop_weight, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "fewer layers than configured": (lambda f: change_config(f, num_hidden_layers=4), "lacks .* and 8 more"),
    "another shape": (
        lambda f: change_config(f, intermediate_size=100),
        "64x96 in the checkpoint, 64x100 in the model",
    ),
    "a shard missing": (
        lambda f: (
            (f / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
            )
            and (f / "model.safetensors").rename(f / "model-00002-of-00002.safetensors")
        ),
        "model-00001-of-00002",
    ),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "tokenizer"),
    "broken tokenizer": (lambda f: cut(f / "tokenizer.json", 0.5), "tokenizer"),
    "broken generation_config": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(folder: Path, damage: str) -> None:
    spoil, reason = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_model_larger_than_the_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(ModelLoadError, match="not enough memory"):
        load(folder)


def test_what_the_engine_needs_to_know(folder: Path) -> None:
    loaded = load(folder)
    assert (loaded.vocab_size, loaded.max_positions) == (VOCAB_SIZE, MAX_POSITIONS)
    assert [(layer.num_kv_heads, layer.head_dim, layer.value_dim) for layer in loaded.layers] == [(2, 16, 16)] * 3
    assert loaded.layers[0].bytes_per_token(torch.float32) == 2 * 32 * 4
    assert loaded.dtype is torch.float32, "auto is float32 on the CPU"
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert load(folder, dtype="bfloat16").dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("in_generation_config", "in_config", "expected"),
    [
        ([5, 7], 3, {5, 7}),
        (5, [3, 4], {5}),
        (None, [3, 4], {3, 4}),
        (None, None, {EOS_ID}),  # the tokenizer's own
    ],
)
def test_the_first_that_names_ends_of_the_text_wins(
    folder: Path, in_generation_config: Any, in_config: Any, expected: set[int]
) -> None:
    change_config(folder, eos_token_id=in_config)
    set_eos_ids(folder, in_generation_config)
    assert load(folder).eos_token_ids == expected


def test_rotary_embeddings_that_look_at_the_whole_batch_are_kept_to_where_they_do_not(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
        "factor": 8.0,
    }
    assert load(save_checkpoint(tmp_path, rope_parameters=rope)).max_positions == 64


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    assert load(save_checkpoint(tmp_path, tie_word_embeddings=True)).vocab_size == VOCAB_SIZE


def test_loading_leaves_stock_models_stock(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert stock.config._attn_implementation == "sdpa"
    assert stock(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
