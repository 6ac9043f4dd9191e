"""Quantized weights over several ranks: stored ones are the same codes and scales, whatever a rank's part begins with.

Weights that are quantized when they are read have scales of their own where a layer is split by its inputs: there the
ranks equal one rank with the weights that their parts stand for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.quantization.linear import CodedLinear, IntegerLinear, QuantizedLinear
from textgen_engine.models.quantization.part import Axis, LayerPart
from textgen_engine.parallel.split import Shard
from textgen_engine.parallel.worker import prepare
from textgen_quantization import packers

from ..models.quantization.test_methods import AT_LOAD, STORED, weights_of
from ..test_engine_equalities import requests_of
from ..tiny import make_config, save_checkpoint
from .threads import PROMPTS, NewRanks, assert_alike, record_logits

# Two groups of heads and one on two ranks, one head on some of four: parts of 64, 32 and 16 inputs of attention's
# output, of 96 and 48 of the MLP's.
UNEVEN = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 192}
EVEN = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SPLIT = [name for name in STORED if not name.startswith(("bitsandbytes nf4", "bitsandbytes fp4"))]
MORE_RANKS = ("gptq 4 bits, one group", "gptq 4 bits, act-order", "awq", "fp8 by uneven blocks")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "model", num_hidden_layers=2, **UNEVEN)


@pytest.mark.parametrize(("name", "world_size"), [*((name, 2) for name in SPLIT), *((name, 4) for name in MORE_RANKS)])
def test_stored_weights_are_the_same(
    new_ranks: NewRanks, plain: Path, tmp_path: Path, name: str, world_size: int
) -> None:
    settings, pack = STORED[name]
    folder = packers.repack(plain, tmp_path, settings, pack)
    assert_alike(new_ranks(folder / "packed", world_size), new_ranks(folder / "meant", 1), num_tokens=6)
    part, _ = prepare(make_config(folder / "packed").model, Shard(1, world_size))
    layers = [module for module in part.model.modules() if isinstance(module, CodedLinear)]
    assert len(layers) >= 8, "a rank's layers are quantized, too"


def test_4_bit_codes_in_one_row_are_refused(tmp_path: Path) -> None:
    """bitsandbytes stores a layer's codes as one long column."""
    folder = packers.repack(save_checkpoint(tmp_path / "plain", **EVEN), tmp_path, *STORED["bitsandbytes nf4"])
    with pytest.raises(ModelLoadError, match="cannot be split over 2 ranks: its weights are stored as bitsandbytes"):
        prepare(make_config(folder / "packed").model, Shard(1, 2))


@pytest.mark.parametrize("form", ["phi3, gptq", "phi3, fp8"])
def test_joined_layers_are_split_part_by_part(new_ranks: NewRanks, tmp_path: Path, form: str) -> None:
    """Queries, keys and values in one packed layer: several ranges of its words, or of its blocks, a rank."""
    name = "gptq 4 bits" if form.endswith("gptq") else "fp8 by uneven blocks"
    settings, pack = STORED[name]
    folder = packers.repack(save_checkpoint(tmp_path / "plain", "phi3"), tmp_path, settings, pack)
    assert_alike(new_ranks(folder / "packed", 2), new_ranks(folder / "meant", 1), num_tokens=6)


@pytest.mark.parametrize("method", AT_LOAD)
def test_weights_quantized_at_load_are_what_the_parts_stand_for(
    new_ranks: NewRanks, tmp_path: Path, method: str
) -> None:
    model = save_checkpoint(tmp_path / "model", **EVEN)
    meant = what_parts_stand_for(model, tmp_path / "meant", method)
    if method != "int8":
        assert_alike(new_ranks(model, 2, quantize=method), new_ranks(meant, 1), num_tokens=6)
    else:  # which rounds activations, too
        first = []
        for folder, world_size, quantize in ((model, 2, method), (meant, 1, None)):
            harness = new_ranks(folder, world_size, quantize=quantize)
            recorded = record_logits(harness)
            harness.run(requests_of(PROMPTS, 1))
            first.append(torch.cat(recorded.logits))
        torch.testing.assert_close(first[0], first[1], rtol=0, atol=0.1 * float(first[1].abs().max()))
    if method.startswith("bitsandbytes-"):  # blocks of 64 weights, which the ranks' parts are made of
        assert_alike(new_ranks(model, 2, quantize=method), new_ranks(model, 1, quantize=method), num_tokens=6)


def test_experts_quantized_at_load(new_ranks: NewRanks, tmp_path: Path) -> None:
    """Blocks of 64 weights, which the ranks' parts of each expert are made of."""
    model = save_checkpoint(tmp_path / "model", "mixtral", **EVEN)
    options = {"quantize": "bitsandbytes-nf4"}
    assert_alike(new_ranks(model, 2, **options), new_ranks(model, 1, **options), PROMPTS[:4], num_tokens=6)


@pytest.mark.parametrize(
    ("family", "name"),
    [("mixtral", "awq"), ("qwen3_moe", "gptq 4 bits, act-order"), ("mixtral", "fp8 by uneven blocks")],
)
def test_stored_experts_are_split_by_their_inner_units(
    new_ranks: NewRanks, tmp_path: Path, family: str, name: str
) -> None:
    plain = save_checkpoint(
        tmp_path / "plain", family, **EVEN, **({"moe_intermediate_size": 192} if "qwen" in family else {})
    )
    folder = packers.repack(plain, tmp_path, *STORED[name])
    assert_alike(new_ranks(folder / "packed", 2), new_ranks(folder / "meant", 1), PROMPTS[:4], num_tokens=6)


def what_parts_stand_for(model: Path, folder: Path, method: str) -> Path:
    """A plain checkpoint of the weights that two ranks hold; each near those of the model, and quantized."""
    original = load_file(model / "model.safetensors")
    meant = {name: tensor.clone() for name, tensor in original.items()}
    for rank in range(2):
        loaded, _ = prepare(make_config(model, quantize=method).model, Shard(rank, 2), fused=False)
        plan = loaded.plan
        assert plan is not None
        num_quantized = 0
        for name in (*plan.by_outputs, *plan.by_inputs):
            layer = loaded.model.get_submodule(name)
            if isinstance(layer, QuantizedLinear):
                part = plan.slices[f"{name}.weight"]
                places = torch.cat([torch.arange(*ends) for ends in part.ranges])
                meant[f"{name}.weight"].index_copy_(part.dim, places, weights_of(layer))
                num_quantized += 1
        assert num_quantized == 14
        assert any(isinstance(module, IntegerLinear) for module in loaded.model.modules()) == (method == "int8")
    worst = max(float((meant[name] - tensor).abs().mean() / tensor.abs().mean()) for name, tensor in original.items())
    assert 0 < worst < {"bitsandbytes-nf4": 0.1, "bitsandbytes-fp4": 0.14, "fp8": 0.03}.get(method, 0.01)
    shutil.copytree(model, folder)
    save_file(meant, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_a_part_reads_of_packed_tensors() -> None:
    """Words and groups that cover the ranges; of these, what is held."""
    part = LayerPart(((0, 16),), 16, ((12, 20), (30, 32)), 32)
    words, groups = Axis("inputs", 8), Axis("inputs", 16)
    read = part.slice(1, words)
    assert read is not None and read.ranges == ((1, 3), (3, 4))
    codes = torch.cat([torch.arange(8, 24), torch.arange(24, 32)])[None]
    assert part.held(codes, 1, words).tolist() == [[*range(12, 20), 30, 31]]
    assert part.group_size(16) == 2
    assert part.length(groups) == 3
    assert part.by_group(torch.tensor([0, 1, 1]), 0, groups, 2).tolist() == [0, 0, 1, 1, 1]
    assert part.slice(0, Axis("outputs", 4)) is None
    assert LayerPart(((0, 4),), 4, ((32, 48),), 64).group_size(32) == 16, "all within one group"
