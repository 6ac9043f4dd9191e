"""Layers that run in one call, and rows that the last of them leaves out, change nothing in what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from textgen_engine.attention.base import AttentionMetadata
from textgen_engine.attention.compiled import CompiledBackend
from textgen_engine.batch import BatchInputs, StepLists
from textgen_engine.config import ModelConfig
from textgen_engine.kernels.cpu import CpuKernels, load_kernels
from textgen_engine.kv_cache import KVCache
from textgen_engine.model_runner import ModelRunner
from textgen_engine.models.fusion import FusedGatedLayer, LayersTogether
from textgen_engine.models.loader import LoadedModel, load_model

_BLOCK_SIZE = 4
# Tokens that each sequence has in the cache and in the step: two decodes, then chunks at unlike places.
_SEQUENCES = [(6, 1), (11, 1), (0, 7), (5, 9), (14, 2)]
_ROWS = {
    "last of each": [0, 1, 8, 17, 19],
    "in another order, twice": [19, 2, 3, 4, 8, 8, 0],
    "none": [],
    "one": [5],
    "all": list(range(20)),
}


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    found = load_kernels(num_threads=2)
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def step_of(cache: KVCache, rows: list[int], spans: list[tuple[int, int]]) -> BatchInputs:
    """Tokens `start` to `start + count` of each sequence, all of whose ids are known."""
    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(2, 500, (len(spans), 32), generator=generator)
    tables = torch.randperm(8 * len(spans), generator=generator).view(len(spans), 8)
    positions = [torch.arange(start, start + count) for start, count in spans]
    ids = torch.cat([text[at] for text, at in zip(texts, positions, strict=True)])
    metadata = AttentionMetadata(
        num_decodes=sum(count == 1 for _, count in spans),
        query_lens=[count for _, count in spans],
        seq_lens=[start + count for start, count in spans],
        block_tables=tables,
        slot_blocks=torch.cat([table[at // _BLOCK_SIZE] for table, at in zip(tables, positions, strict=True)]),
        slot_offsets=torch.cat(positions) % _BLOCK_SIZE,
        keys=cache.keys,
        values=cache.values,
    )
    lists = StepLists(ids.tolist(), rows, tables.tolist())
    return BatchInputs(ids, torch.cat(positions), metadata, torch.tensor(rows, dtype=torch.int64), [], [], lists=lists)


def logits_of(loaded: LoadedModel, kernels: CpuKernels, rows: list[int], *, dtype: torch.dtype) -> torch.Tensor:
    cache = KVCache(loaded.layers, num_blocks=40, block_size=_BLOCK_SIZE, dtype=dtype, device=torch.device("cpu"))
    runner = ModelRunner(loaded, CompiledBackend(kernels), cache)
    before = step_of(cache, [], [(0, max(start, 1)) for start, _ in _SEQUENCES])
    before.attention.num_decodes = 0  # one of one token stands behind longer ones
    runner.forward(before, [])
    return runner.forward(step_of(cache, rows, _SEQUENCES), [])


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gemma3", "float32"), ("qwen3", "bfloat16")])
@pytest.mark.parametrize("rows", _ROWS.values(), ids=list(_ROWS))
def test_rows_are_those_of_a_whole_step(
    checkpoint: Callable[[str], Path], kernels: CpuKernels, family: str, dtype: str, rows: list[int]
) -> None:
    if getattr(torch, dtype) not in kernels.dtypes:
        pytest.skip("a processor without bfloat16")
    loaded = load_model(ModelConfig(str(checkpoint(family)), dtype=dtype), CompiledBackend(kernels), kernels)
    assert loaded.leaves_out_rows
    whole = logits_of(loaded, kernels, _ROWS["all"], dtype=loaded.dtype)
    found = logits_of(loaded, kernels, rows, dtype=loaded.dtype)
    assert found.shape == (len(rows), loaded.vocab_size)
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(found, whole[rows], atol=tolerance * float(whole.abs().max()), rtol=0)


def test_a_cache_that_the_kernels_do_not_read_computes_all_rows(
    checkpoint: Callable[[str], Path], kernels: CpuKernels
) -> None:
    loaded = load_model(ModelConfig(str(checkpoint("llama")), dtype="float32"), CompiledBackend(kernels), kernels)
    whole = logits_of(loaded, kernels, _ROWS["all"], dtype=torch.float64)
    found = logits_of(loaded, kernels, _ROWS["last of each"], dtype=torch.float64)
    torch.testing.assert_close(found, whole[_ROWS["last of each"]], atol=1e-5 * float(whole.abs().max()), rtol=0)


def test_a_model_that_adds_between_layers_calls_each_by_itself(
    checkpoint: Callable[[str], Path], kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As models do that mix an image's features into the first layers' results."""

    def adding(self: Any, hidden_states: torch.Tensor, **keywords: Any) -> Any:
        return forward(self, hidden_states + 0.0, **keywords)

    forward = FusedGatedLayer.forward
    monkeypatch.setattr(FusedGatedLayer, "forward", adding)
    loaded = load_model(ModelConfig(str(checkpoint("llama")), dtype="float32"), CompiledBackend(kernels), kernels)
    layers = [module for module in loaded.model.modules() if isinstance(module, FusedGatedLayer)]
    assert len(layers) == 3 and not loaded.leaves_out_rows
    assert len({id(layer.together) for layer in layers}) == 3
    found = logits_of(loaded, kernels, _ROWS["last of each"], dtype=torch.float32)
    monkeypatch.undo()
    loaded = load_model(ModelConfig(str(checkpoint("llama")), dtype="float32"), CompiledBackend(kernels), kernels)
    assert loaded.leaves_out_rows
    expected = logits_of(loaded, kernels, _ROWS["last of each"], dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_run_that_is_cut_short_is_an_error(checkpoint: Callable[[str], Path], kernels: CpuKernels) -> None:
    loaded = load_model(ModelConfig(str(checkpoint("llama")), dtype="float32"), CompiledBackend(kernels), kernels)
    layers = [module for module in loaded.model.modules() if isinstance(module, FusedGatedLayer)]
    together = layers[0].together
    assert isinstance(together, LayersTogether)
    cache = KVCache(
        loaded.layers, num_blocks=40, block_size=_BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu")
    )
    inputs = step_of(cache, [], _SEQUENCES)
    CompiledBackend(kernels).prepare(inputs.attention)
    x = torch.zeros(1, 20, 64)
    rotary = torch.zeros(1, 20, 16), torch.zeros(1, 20, 16)
    together.pass_on(layers[0], x, rotary, inputs.attention)
    with pytest.raises(RuntimeError, match="2 of 3 decoder layers were run"):
        together.pass_on(layers[2], x, rotary, inputs.attention)
