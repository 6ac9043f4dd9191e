"""models/gpu_layers.py with the kernels' references: fused layers compute what stock layers do, unlike ones stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from textgen_engine.attention import bridge
from textgen_engine.kv_cache import KVCache
from textgen_engine.model_runner import ModelRunner
from textgen_engine.models.gpu_layers import LayerKernels, fuse_gpu_layers
from textgen_engine.models.loader import load_model
from textgen_engine.models.trial import check_results, probe_layers, stock_logits

from ..test_cuda_graphs import flash, step
from ..tiny import FAMILIES, make_config


def reference_kernels() -> LayerKernels:
    from textgen_engine.kernels.gated import gated_reference
    from textgen_engine.kernels.rms_norm import rms_norm_reference
    from textgen_engine.kernels.rotary_store import rotary_store_reference

    return LayerKernels(rms_norm_reference, rotary_store_reference, gated_reference)


@pytest.fixture
def models(checkpoint: Callable[[str], Path]) -> Callable[[str, torch.dtype], torch.nn.Module]:
    bridge.register()

    def load(family: str, dtype: torch.dtype) -> torch.nn.Module:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            checkpoint(family), dtype=dtype, attn_implementation=bridge.ATTENTION_NAME
        ).eval()
        return model

    return load


@pytest.mark.parametrize(
    ("family", "fuses"),
    [
        ("llama", True),
        ("qwen2", True),
        ("qwen3", True),
        ("mistral", True),
        ("gemma", False),
        ("granite", True),  # its multipliers are 1 here
        ("olmo", False),
        ("olmo2", False),
        ("phi3", False),
        ("smollm3", False),
        ("mixtral", False),
    ],
)
def test_fused_equals_stock(models: Callable[..., torch.nn.Module], family: str, fuses: bool) -> None:
    """check_results runs two sequences in chunks through the cache, and compares with transformers' own logits."""
    device = torch.device("cpu")
    model = models(family, torch.float32)
    expected = stock_logits(model, 512, device)
    assert expected is not None
    backend = flash()
    needs = probe_layers(model, device, {"logits_to_keep": 1})
    num_fused = fuse_gpu_layers(model, backend, reference_kernels(), needs.scorings)
    num_layers = len(needs.shapes)
    if family == "smollm3":  # layers without rotary positions stay stock, the others are fused
        assert 0 < num_fused < num_layers
    else:
        assert num_fused == (num_layers if fuses else 0)
    check_results(model, backend, [needs.shapes[i] for i in range(num_layers)], expected, torch.float32)


def test_alike_in_structure_but_not_in_result(models: Callable[..., torch.nn.Module]) -> None:
    model = models("granite", torch.float32)
    for module in model.modules():
        if hasattr(module, "residual_multiplier"):
            module.residual_multiplier = 0.5
    needs = probe_layers(model, torch.device("cpu"), {"logits_to_keep": 1})
    assert fuse_gpu_layers(model, flash(), reference_kernels(), needs.scorings) == 0


def test_in_bfloat16(models: Callable[..., torch.nn.Module]) -> None:
    device = torch.device("cpu")
    model = models("qwen3", torch.bfloat16)
    expected = stock_logits(model, 512, device)
    assert expected is not None
    backend = flash()
    needs = probe_layers(model, device, {"logits_to_keep": 1})
    assert fuse_gpu_layers(model, backend, reference_kernels(), needs.scorings) == 2
    check_results(model, backend, [needs.shapes[0], needs.shapes[1]], expected, torch.bfloat16)


def test_layers_that_are_all_fused_need_no_masks(models: Callable[..., torch.nn.Module], llama: Path) -> None:
    loaded = replace(load_model(make_config(llama).model, flash()), model=models("llama", torch.float32))
    needs = probe_layers(loaded.model, loaded.device, {"logits_to_keep": 1})
    tables = torch.arange(20).view(5, 4)
    logits = []
    for fuses in (False, True):
        if fuses:
            assert fuse_gpu_layers(loaded.model, flash(), reference_kernels(), needs.scorings) == len(loaded.layers)
        cache = KVCache(loaded.layers, num_blocks=20, block_size=4, dtype=torch.float32, device=loaded.device)
        runner = ModelRunner(replace(loaded, reads_masks=not fuses), flash(), cache)
        logits.append(runner.forward(step(cache, [1, 1, 1], tables, 0), ()))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_without_kernels_nothing_is_replaced(models: Callable[..., torch.nn.Module]) -> None:
    model = models("llama", torch.float32)
    needs = probe_layers(model, torch.device("cpu"), {"logits_to_keep": 1})
    assert fuse_gpu_layers(model, flash(), None, needs.scorings) == 0


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "bloom", "llama4", "deepseek_v3"])
def test_every_scoring_through_the_gpu_backend(checkpoint: Callable[[str], Path], family: str) -> None:
    """Soft caps, sinks, ALiBi, chunks, values narrower than keys: load_model compares with transformers' logits."""
    assert family in FAMILIES
    load_model(make_config(checkpoint(family)).model, flash(), fused=False)
