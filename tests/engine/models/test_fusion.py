"""Fused layers compute what the stock ones do, and stock models stay stock."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from textgen_engine.attention import bridge
from textgen_engine.attention.base import AttentionMetadata
from textgen_engine.attention.compiled import CompiledBackend
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import ModelConfig
from textgen_engine.kernels.cpu import load_kernels
from textgen_engine.models.experts import GroupedExperts, replace_experts
from textgen_engine.models.fusion import FusedGatedLayer, fuse_layers
from textgen_engine.models.loader import load_model

from ..tiny import save_checkpoint


def fused_logits(
    folder: Path,
    ids: torch.Tensor,
    *,
    compiled: bool,
    dtype: str = "float32",
    quantize: str | None = None,
    cache_dtype: torch.dtype | None = None,
) -> tuple[int, torch.Tensor]:
    """The number of fused layers, and the logits [num_tokens, vocab] of a prompt."""
    kernels = load_kernels(num_threads=2) if compiled else None
    if compiled and (kernels is None or getattr(torch, dtype) not in kernels.dtypes):
        pytest.skip("no compiler, or a processor without bfloat16")
    backend = SdpaBackend() if kernels is None else CompiledBackend(kernels)
    loaded = load_model(ModelConfig(str(folder), dtype=dtype, quantize=quantize), backend, kernels)
    count = ids.shape[1]
    keys = [
        torch.zeros(1, layer.num_kv_heads, count, layer.head_dim, dtype=cache_dtype or loaded.dtype)
        for layer in loaded.layers
    ]
    metadata = AttentionMetadata(
        num_decodes=0,
        query_lens=[count],
        seq_lens=[count],
        block_tables=torch.zeros(1, 1, dtype=torch.int64),
        slot_blocks=torch.zeros(count, dtype=torch.int64),
        slot_offsets=torch.arange(count),
        keys=keys,
        values=[key.clone() for key in keys],
    )
    backend.prepare(metadata)
    with torch.inference_mode():
        output = loaded.model(
            input_ids=ids,
            position_ids=torch.arange(count)[None],
            use_cache=False,
            attention_metadata=metadata,
            attention_backend=backend,
        )
    return sum(isinstance(module, FusedGatedLayer) for module in loaded.model.modules()), output.logits[0]


@pytest.mark.parametrize(
    ("family", "num_fused"),
    [
        *(("llama", 3), ("mistral", 2), ("qwen2", 2), ("qwen3", 2), ("gemma", 2), ("gemma2", 2), ("gemma3", 7)),
        *(("mixtral", 2), ("qwen3_moe", 2), ("olmo", 0), ("olmo2", 0)),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("num_tokens", [7, 60])
def test_fused_equals_stock(
    checkpoint: Callable[[str], Path], family: str, num_fused: int, compiled: bool, num_tokens: int
) -> None:
    """Logits of this model are of size 30 to 100."""
    ids = torch.randint(2, 500, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    found_fused, found = fused_logits(checkpoint(family), ids, compiled=compiled)
    assert found_fused == num_fused
    stock = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    assert not any(isinstance(module, FusedGatedLayer) for module in stock.modules())
    with torch.inference_mode():
        expected = stock(ids).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_fused_in_bfloat16(checkpoint: Callable[[str], Path], family: str) -> None:
    """Nearer to float32 than transformers in bfloat16, for the residual and all sums are float32."""
    ids = torch.randint(2, 500, (1, 30), generator=torch.Generator().manual_seed(1))
    num_fused, found = fused_logits(checkpoint(family), ids, compiled=True, dtype="bfloat16")
    assert num_fused
    with torch.inference_mode():
        exact, rounded = (
            AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=dtype).eval()(ids).logits[0].float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    assert (found - exact).square().mean() < (rounded - exact).square().mean()


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_fused_with_a_cache_of_8_bits(
    checkpoint: Callable[[str], Path], family: str, cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call, with what PyTorch's operations give on such a cache. A key's last bit that differs may take it to
    the next of its few values: hence the tolerance."""
    ids = torch.randint(2, 500, (1, 60), generator=torch.Generator().manual_seed(1))
    _, expected = fused_logits(checkpoint(family), ids, compiled=False, cache_dtype=cache_dtype)
    monkeypatch.setattr(CompiledBackend, "run", None)  # which a layer in one call does without
    num_fused, found = fused_logits(checkpoint(family), ids, compiled=True, cache_dtype=cache_dtype)
    assert num_fused == {"llama": 3, "gemma3": 7}[family]
    assert (found - expected).square().mean() < 1e-4 * expected.square().mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_with_weights_of_8_bits(checkpoint: Callable[[str], Path], dtype: str) -> None:
    """All layers, for what they are compared with rounds as they do."""
    ids = torch.randint(2, 500, (1, 30), generator=torch.Generator().manual_seed(1))
    num_fused, found = fused_logits(checkpoint("llama"), ids, compiled=True, dtype=dtype, quantize="int8")
    assert num_fused == 3
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()(ids).logits[0]
    assert (found.float() - exact).square().mean() < 0.03 * exact.square().mean()


@pytest.mark.parametrize("num_tokens", [3, 40])
@pytest.mark.parametrize("method", ["eetq", "fp8", "bitsandbytes-nf4"])
def test_fused_with_coded_weights(
    tmp_path: Path, method: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call, what dequantized weights give; in bfloat16 about as near to float32 as these are in bfloat16, for
    the rounding of weights is the largest part."""
    folder = save_checkpoint(tmp_path / "plain", intermediate_size=128)
    monkeypatch.setattr(CompiledBackend, "run", None)  # which a layer in one call does without
    ids = torch.randint(2, 500, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    _, exact = fused_logits(folder, ids, compiled=False, quantize=method)
    _, rounded = fused_logits(folder, ids, compiled=False, quantize=method, dtype="bfloat16")
    num_fused, found = fused_logits(folder, ids, compiled=True, quantize=method)
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=1e-4)
    num_fused_in_bfloat16, found = fused_logits(folder, ids, compiled=True, quantize=method, dtype="bfloat16")
    assert num_fused == num_fused_in_bfloat16 == 3
    assert (found.float() - exact).square().mean() < 1.2 * (rounded.float() - exact).square().mean()


def stock_model(folder: Path) -> Any:
    bridge.register()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=bridge.ATTENTION_NAME
    ).requires_grad_(False)


def test_a_layer_that_only_looks_alike_stays_stock(checkpoint: Callable[[str], Path]) -> None:
    """The trial, not the structure, tells: here a layer that multiplies what it adds to the residual."""
    model = stock_model(checkpoint("granite"))
    model.model.layers[1].residual_multiplier = 0.5
    fusion = fuse_layers(model, None, {})
    assert (fusion.layers, fusion.num_differing) == ({"Llama": 1}, 1)
    assert not isinstance(model.model.layers[1], FusedGatedLayer)


def test_another_activation_is_kept(checkpoint: Callable[[str], Path]) -> None:
    model = stock_model(checkpoint("llama"))
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    assert fuse_layers(model, load_kernels(num_threads=1), {}).layers == {"Llama": 3}


def test_one_line_says_what_was_applied(checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    kernels = load_kernels(num_threads=1)
    with caplog.at_level(logging.INFO, "textgen_engine.models.loader"):
        for family, quantize in (("mixtral", None), ("phi3", "eetq"), ("gpt2", None)):
            config = ModelConfig(str(checkpoint(family)), dtype="float32", quantize=quantize)
            load_model(config, SdpaBackend(), kernels)
    lines = [line for line in caplog.messages if " loaded: " in line]
    assert [line.split()[0] for line in lines] == ["MixtralForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel"]
    expected = [
        ("2 layers fused as Mixtral's", "attention by SdpaBackend", "float32 on cpu"),
        ("linear layers eetq", "no layer fused", "KV blocks released behind a window of 8"),
        ("LM head tied to the embedding", "no layer fused"),
    ]
    if kernels is not None:
        expected[0] = (*expected[0], "experts of 2 layers by compiled grouped products", "linear layers by compiled")
    for line, parts in zip(lines, expected, strict=True):
        assert all(part in line for part in parts), line


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_grouped_experts_equal_stock_ones(checkpoint: Callable[[str], Path], family: str) -> None:
    """Each token's result is its own, whoever stands beside it. What has another form (gpt-oss is transposed) stays
    stock."""
    kernels = load_kernels(num_threads=2)
    if kernels is None:
        pytest.skip("no C++ compiler")
    model = stock_model(checkpoint(family))
    stock = [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj")]
    stock = [module for module in stock if isinstance(module.gate_up_proj, torch.nn.Parameter)]
    kept = [copy.deepcopy(module) for module in stock]
    num_replaced = replace_experts(model, kernels)
    assert num_replaced == (0 if family == "gpt_oss" else len(stock))
    replaced = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    for grouped, expert in zip(replaced, kept, strict=family != "gpt_oss"):
        generator = torch.Generator().manual_seed(2)
        for num_tokens in (1, 2, 17, 60):
            x = torch.randn(num_tokens, expert.gate_up_proj.shape[2], generator=generator)
            weights, index = torch.rand(num_tokens, expert.num_experts, generator=generator).topk(2)
            with torch.inference_mode():
                found, expected = grouped(x, index, weights), expert(x, index, weights)
            torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
