"""Fused layers compute what the stock ones do, and stock models stay stock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from textgen_engine.attention.base import AttentionMetadata
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import ModelConfig
from textgen_engine.kernels.cpu import load_kernels
from textgen_engine.models.fusion import FusedGatedLayer
from textgen_engine.models.loader import load_model


def fused_logits(folder: Path, ids: torch.Tensor, *, compiled: bool) -> tuple[int, torch.Tensor]:
    """The number of fused layers, and the logits [num_tokens, vocab] of a prompt."""
    kernels = load_kernels(num_threads=2) if compiled else None
    if compiled and kernels is None:
        pytest.skip("no C++ compiler")
    backend = SdpaBackend()
    loaded = load_model(ModelConfig(str(folder), dtype="float32"), backend, kernels)
    count = ids.shape[1]
    keys = [torch.zeros(1, layer.num_kv_heads, count, layer.head_dim) for layer in loaded.layers]
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


@pytest.mark.parametrize(("family", "num_fused"), [("llama", 3), ("mistral", 2), ("qwen2", 2), ("gemma", 0)])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("num_tokens", [7, 60])
def test_fused_equals_stock(
    checkpoint: Callable[[str], Path], family: str, num_fused: int, compiled: bool, num_tokens: int
) -> None:
    """Logits of this model are of size 30 to 100; with few rows the compiled form runs, with 60 the plain one."""
    ids = torch.randint(2, 500, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    found_fused, found = fused_logits(checkpoint(family), ids, compiled=compiled)
    assert found_fused == num_fused
    stock = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    assert not any(isinstance(module, FusedGatedLayer) for module in stock.modules())
    with torch.inference_mode():
        expected = stock(ids).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


def test_a_layer_that_only_looks_alike_stays_stock(checkpoint: Callable[[str], Path]) -> None:
    """The trial, not the structure, tells: here a layer whose MLP is activated otherwise."""
    from textgen_engine.attention import bridge
    from textgen_engine.models.fusion import fuse_layers

    bridge.register()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("llama"), dtype=torch.float32, attn_implementation=bridge.ATTENTION_NAME
    ).requires_grad_(False)
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    assert fuse_layers(model, None, {}) == 2
    assert not isinstance(model.model.layers[1], FusedGatedLayer)
