"""Experts that a checkpoint has quantized, one by one: kept so, and equal to the weights that their codes stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.experts import has_known_form
from textgen_engine.models.quantization.experts import ExpertLayers
from textgen_engine.models.quantization.linear import CodedLinear
from textgen_quantization import packers

from ...tiny import Harness, save_checkpoint
from .test_methods import EXPERT_SIZES, STORED, load, texts, weights_of

CASES = [
    ("mixtral", "gptq 4 bits"),
    ("mixtral", "awq"),
    ("qwen3_moe", "gptq 4 bits, act-order"),
    ("qwen3_moe", "gptq 8 bits"),
    ("deepseek_v3", "fp8 by blocks"),
    ("mixtral", "fp8 by uneven blocks"),
    ("qwen3_moe", "bitsandbytes nf4, nested"),
    ("mixtral", "bitsandbytes 8 bits"),
    ("qwen3_moe", "compressed-tensors, packed"),
]


def repacked(tmp_path: Path, family: str, name: str) -> Path:
    plain = save_checkpoint(tmp_path / "plain", family, **EXPERT_SIZES)
    return packers.repack(plain, tmp_path, *STORED[name])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_stored_experts_stay_quantized(
    tmp_path: Path, new_engine: Callable[..., Harness], family: str, name: str
) -> None:
    """No float weights of experts are left, each layer of experts computes what the plain ones do, and the texts of a
    batch of unlike prompts are theirs."""
    folder = repacked(tmp_path, family, name)
    loaded = load(folder / "packed")
    stock = load(folder / "meant", compiled=False)
    ours = [module for module in loaded.model.modules() if isinstance(module, ExpertLayers)]
    theirs = [module for module in stock.model.modules() if has_known_form(module)]
    assert len(ours) == len(theirs) >= 1
    for quantized, plain in zip(ours, theirs, strict=True):
        assert not list(quantized.named_parameters())
        layers = [layer for layer in quantized.modules() if isinstance(layer, CodedLinear)]
        assert len(layers) == 8
        assert all(layer.weight.dtype.itemsize == 1 for layer in layers)
        if "act-order" not in name:
            for attribute, parts in (("gate_up_proj", quantized.gate_up), ("down_proj", quantized.down)):
                meant = torch.stack([weights_of(layer) for layer in parts])  # type: ignore[arg-type]
                torch.testing.assert_close(meant, getattr(plain, attribute).data, atol=1e-5, rtol=1e-3)
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
        weights, index = torch.rand(7, 4, generator=torch.Generator().manual_seed(1)).topk(2)
        with torch.inference_mode():
            expected, found = plain(x, index, weights), quantized(x, index, weights)
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert texts(new_engine(folder / "packed")) == texts(new_engine(folder / "meant"))


def test_experts_left_plain_stay_plain(tmp_path: Path, new_engine: Callable[..., Harness]) -> None:
    """A checkpoint that quantizes only what is no expert."""
    folder = repacked(tmp_path, "qwen3_moe", "gptq 4 bits")
    packed, meant = (load_file(folder / name / "model.safetensors") for name in ("packed", "meant"))
    mixed = {name: tensor for name, tensor in packed.items() if ".experts." not in name}
    mixed |= {name: tensor for name, tensor in meant.items() if ".experts." in name}
    save_file(mixed, folder / "packed" / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder / "packed")
    assert not any(isinstance(module, ExpertLayers) for module in loaded.model.modules())
    assert texts(new_engine(folder / "packed")) == texts(new_engine(folder / "meant"))


def test_what_lacks_or_cannot_be_served_is_named(tmp_path: Path) -> None:
    folder = repacked(tmp_path, "mixtral", "fp8 by blocks") / "packed"
    weights = load_file(folder / "model.safetensors")
    prefix = next(name for name in weights if ".experts.1.w3." in name).rpartition(".w3.")[0]

    def refused(changed: dict[str, torch.Tensor], reason: str) -> None:
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelLoadError, match=reason):
            load(folder)

    without = {name: tensor for name, tensor in weights.items() if name != f"{prefix}.w3.weight_scale_inv"}
    refused(without, r"lacks fp8 weights of expert 1's w3 in model\.layers\.0\.mlp\.experts")
    without = {name: tensor for name, tensor in weights.items() if name != f"{prefix}.w3.weight"}
    refused(without, r"lacks model\.layers\.0\.\S+\.experts\.1\.w3\.weight")
    joined = weights | {f"{prefix.rpartition('.')[0]}.gate_up_proj_scale_inv": torch.ones(4, 4, 2)}
    refused(joined, "experts whose fp8 weights are joined are not served")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    refused(weights, r"the checkpoint has model\.layers\.0\.\S+ of shape .*, the model's is")
