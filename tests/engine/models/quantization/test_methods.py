"""Every method of quantization through the engine: checkpoints made here, texts equal to those of the weights meant."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import ModelConfig
from textgen_engine.errors import ModelLoadError
from textgen_engine.kernels.cpu import load_kernels
from textgen_engine.models.experts import has_known_form
from textgen_engine.models.fusion import FusedGatedLayer
from textgen_engine.models.loader import LoadedModel, load_model
from textgen_engine.models.quantization.bitsandbytes_4bit import TABLES, FourBit
from textgen_engine.models.quantization.experts import ExpertLayers
from textgen_engine.models.quantization.linear import CodedLinear, IntegerLinear, QuantizedLinear, unpack_nibbles
from textgen_quantization import packers

from ...tiny import Harness, make_request, save_checkpoint

AT_LOAD = ("int8", "eetq", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "fp8")
# Multiples of 64, which 4-bit codes need.
EXPERT_SIZES = {"intermediate_size": 128, "moe_intermediate_size": 128}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [100], [33] * 40, [2, 300, 4]]

CT = {"quant_method": "compressed-tensors"}


def scheme(form: str, **weights: Any) -> dict[str, Any]:
    return {**CT, "format": form, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


# What a checkpoint says of itself, and how its layers are packed.
STORED: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], packers.Packed]]] = {
    "gptq 4 bits": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, packers.gptq(4, 32)),
    "gptq 4 bits, one group": ({"quant_method": "gptq", "bits": 4, "group_size": -1}, packers.gptq(4, -1)),
    "gptq 4 bits, act-order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        packers.gptq(4, 32, act_order=True),
    ),
    "gptq 4 bits, small groups": ({"quant_method": "gptq", "bits": 4, "group_size": 16}, packers.gptq(4, 16)),
    "gptq 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 32}, packers.gptq(8, 32)),
    "gptq version 2": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        packers.gptq(4, 32, version=2),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, packers.awq(32)),
    "fp8 by blocks": (
        {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        packers.float8_blocks(32, 32),
    ),
    "fp8 by uneven blocks": (
        {"quant_method": "fp8", "weight_block_size": [40, 40], "activation_scheme": "dynamic"},
        packers.float8_blocks(40, 40),
    ),
    "compressed-tensors, floats": (
        scheme("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
        packers.float8_channels,
    ),
    "compressed-tensors, integers": (
        scheme("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        packers.int8_channels,
    ),
    "compressed-tensors, packed": (
        scheme("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=True),
        packers.packed_groups(4, 32),
    ),
}

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
for _kind in ("nf4", "fp4"):
    for _nested in (False, True):
        STORED[f"bitsandbytes {_kind}{', nested' if _nested else ''}"] = (
            {**BNB, "bnb_4bit_quant_type": _kind, "bnb_4bit_use_double_quant": _nested},
            packers.bitsandbytes_4bit(_kind, TABLES[f"bitsandbytes-{_kind}"], nested=_nested),
        )
STORED["bitsandbytes 8 bits"] = ({"quant_method": "bitsandbytes", "load_in_8bit": True}, packers.bitsandbytes_int8)


def load(folder: Path, *, compiled: bool = True, **options: Any) -> LoadedModel:
    kernels = load_kernels(num_threads=1) if compiled else None
    return load_model(ModelConfig(str(folder), dtype="float32", num_threads=1, **options), SdpaBackend(), kernels)


def texts(harness: Harness) -> list[list[int]]:
    """Greedy tokens of unlike prompts, all in one batch; then of one of them alone, which must not differ."""
    requests = [make_request(f"r{i}", prompt, 12, ignore_eos_token=True) for i, prompt in enumerate(PROMPTS)]
    together = harness.run(requests)
    alone = harness.run_alone(make_request("alone", PROMPTS[0], 12, ignore_eos_token=True))
    assert together["r0"].ids() == alone.ids()
    return [together[f"r{i}"].ids() for i in range(len(PROMPTS))]


@pytest.mark.parametrize("name", STORED)
def test_a_quantized_checkpoint_needs_no_option(tmp_path: Path, new_engine: Callable[..., Harness], name: str) -> None:
    """The texts are those of the plain weights that the packed ones stand for."""
    settings, pack = STORED[name]
    llama = save_checkpoint(tmp_path / "plain", intermediate_size=128)
    folder = packers.repack(llama, tmp_path, settings, pack)
    loaded = load(folder / "packed")
    layers = [module for module in loaded.model.modules() if isinstance(module, CodedLinear)]
    fused = [module for module in loaded.model.modules() if isinstance(module, FusedGatedLayer)]
    assert (len(layers), len(fused)) == (12, 3)
    assert all(layer.whole is not None for layer in fused) or load_kernels(1) is None, "each in one call"
    assert all(layer.kernels is not None for layer in layers) or load_kernels(1) is None
    assert texts(new_engine(folder / "packed")) == texts(new_engine(folder / "meant"))
    assert texts(new_engine(folder / "packed", quantize=settings["quant_method"])) != [[]]


@pytest.mark.parametrize("method", AT_LOAD)
def test_weights_are_quantized_at_load(
    tmp_path: Path, new_engine: Callable[..., Harness], method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All linear layers but the LM head; close to the original; the texts are those of the weights they stand for."""
    llama = save_checkpoint(tmp_path / "plain", intermediate_size=128)
    with caplog.at_level(logging.INFO, "textgen_engine"):
        loaded = load(llama, quantize=method)
    assert f"21 of 21 linear layers {method}" in caplog.text and "LM head and embeddings as they are" in caplog.text
    assert len([module for module in loaded.model.modules() if isinstance(module, FusedGatedLayer)]) == 3
    folder = Path(shutil.copytree(llama, tmp_path / "meant"))
    original = load_file(llama / "model.safetensors")
    meant = dict(original)
    for index, layer in enumerate(loaded.model.model.layers):  # type: ignore[union-attr, arg-type]
        sizes = {"qkv": ("self_attn.", ("q", "k", "v")), "output": ("self_attn.", ("o",))}
        sizes |= {"gate_up": ("mlp.", ("gate", "up")), "down": ("mlp.", ("down",))}
        for attribute, (parent, names) in sizes.items():
            values = weights_of(getattr(layer, attribute))
            for name in names:
                key = f"model.layers.{index}.{parent}{name}_proj.weight"
                meant[key], values = values.split((len(original[key]), len(values) - len(original[key])))
    worst = max(float((meant[key] - tensor).abs().mean() / tensor.abs().mean()) for key, tensor in original.items())
    assert worst < {"bitsandbytes-nf4": 0.1, "bitsandbytes-fp4": 0.14, "fp8": 0.03}.get(method, 0.01)
    save_file({key: tensor.contiguous() for key, tensor in meant.items()}, folder / "model.safetensors")
    found = texts(new_engine(llama, quantize=method))
    if method != "int8":  # whose activations are rounded as well
        assert found == texts(new_engine(folder))


def weights_of(layer: QuantizedLinear) -> torch.Tensor:
    if isinstance(layer, IntegerLinear):
        return layer.integers() * layer.scales[:, None]
    assert isinstance(layer, CodedLinear)
    return layer.dequantized()


@pytest.mark.parametrize("method", AT_LOAD)
def test_without_compiled_kernels_the_reference_serves(llama: Path, method: str, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "textgen_engine"):
        compiled, plain = load(llama, quantize=method), load(llama, quantize=method, compiled=False)
    assert "weights are dequantized for every product" in caplog.text
    for one, other in zip(compiled.model.modules(), plain.model.modules(), strict=True):
        if isinstance(one, QuantizedLinear):
            x = torch.randn(2, one.in_features, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(one(x), other(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "method"),
    [("mixtral", "eetq"), ("qwen3_moe", "int8"), ("mixtral", "fp8"), ("mixtral", "bitsandbytes-nf4")],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_experts_are_quantized(
    tmp_path: Path, new_engine: Callable[..., Harness], family: str, method: str, compiled: bool
) -> None:
    """Each expert as a layer of its own: what comes out is what the weights they stand for give."""
    folder = save_checkpoint(tmp_path / "plain", family, **EXPERT_SIZES)
    loaded, stock = load(folder, quantize=method, compiled=compiled), load(folder, compiled=False)
    quantized = [module for module in loaded.model.modules() if isinstance(module, ExpertLayers)]
    plain = [module for module in stock.model.modules() if has_known_form(module)]
    assert len(quantized) == len(plain) == 2
    for ours, theirs in zip(quantized, plain, strict=True):
        assert not list(ours.named_parameters())
        for name, layers in (("gate_up_proj", ours.gate_up), ("down_proj", ours.down)):
            meant = torch.stack([weights_of(layer) for layer in layers])  # type: ignore[arg-type]
            original = getattr(theirs, name).data
            assert float((meant - original).abs().mean() / original.abs().mean()) < (0.1 if "nf4" in method else 0.03)
            original.copy_(meant)
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
        weights, index = torch.rand(7, 4, generator=torch.Generator().manual_seed(1)).topk(2)
        with torch.inference_mode():
            expected, found = theirs(x, index, weights), ours(x, index, weights)
        tolerance = 0.03 if method == "int8" else 1e-4
        torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)
    if compiled:
        assert all(len(text) == 12 for text in texts(new_engine(folder, quantize=method)))


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "gpt_neox", "phi3", "gemma3"])
def test_other_families(checkpoint: Callable[[str], Path], new_engine: Callable[..., Harness], family: str) -> None:
    """Biases, layers that are not joined, routers and joined experts, which stay as they are."""
    assert all(len(text) == 12 for text in texts(new_engine(checkpoint(family), quantize="eetq")))


def test_quantized_at_load_in_shards_as_wholly_read(tmp_path: Path) -> None:
    """4-bit codes of a known block: each weight becomes the nearest entry of the table, times the block's largest."""
    method = FourBit("bitsandbytes-nf4")
    weight = torch.linspace(-2, 2, 64)[None]
    parts = method.quantize(weight)
    table = method.replacement(torch.nn.Linear(64, 1), "x").table  # type: ignore[union-attr]
    assert table is not None and float(parts["scales"]) == 2.0
    nearest = (weight.view(-1, 1) / 2 - table).abs().argmin(1)
    assert torch.equal(unpack_nibbles(parts["weight"])[0].long(), nearest)


# ---- what is refused -------------------------------------------------------------------------------------------------


def with_settings(folder: Path, target: Path, **settings: Any) -> Path:
    copy = Path(shutil.copytree(folder, target))
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    return copy


REFUSED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "another method": ({"quant_method": "gptq", "bits": 4}, "awq", "QUANTIZE=awq contradicts the checkpoint.*gptq"),
    "quantized twice": ({"quant_method": "gptq", "bits": 4}, "eetq", "QUANTIZE=eetq contradicts the checkpoint"),
    "3 bits": ({"quant_method": "gptq", "bits": 3}, None, "gptq with 3 bits is not served; 4 and 8 are"),
    "marlin": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        None,
        "checkpoint_format 'marlin' is not served; gptq and gptq_v2 are",
    ),
    "a group size that does not fit": (
        {"quant_method": "gptq", "bits": 4, "group_size": 48},
        None,
        "group_size 48 does not divide the 64 inputs of model.layers.0",
    ),
    "awq gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, None, "packing 'gemv' is not served; gemm is"),
    "8 bits for 4": (
        {**BNB, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes-fp4",
        "QUANTIZE=bitsandbytes-fp4 contradicts the checkpoint.*bitsandbytes",
    ),
    "an unknown method": ({"quant_method": "hqq"}, "eetq", "QUANTIZE=eetq contradicts the checkpoint.*hqq"),
    "two schemes": (
        {**CT, "format": "mixed-precision", "config_groups": {"a": {}, "b": {}}},
        None,
        "'mixed-precision' with 2 config_groups is not served",
    ),
    "asymmetric": (
        scheme("pack-quantized", num_bits=4, strategy="group", symmetric=False),
        None,
        "4 bits by group, asymmetric, is not served",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_or_is_not_served_is_refused(llama: Path, tmp_path: Path, case: str) -> None:
    settings, asked, reason = REFUSED[case]
    folder = packers.repack(llama, tmp_path, settings, packers.gptq(4, 32)) / "packed"
    with pytest.raises(ModelLoadError, match=reason):
        load(folder, quantize=asked)


def test_plain_weights_are_no_gptq(llama: Path) -> None:
    with pytest.raises(ModelLoadError, match="QUANTIZE=gptq needs a checkpoint whose weights are so quantized"):
        load(llama, quantize="gptq")


def test_a_model_without_plain_linear_layers_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ModelLoadError, match="QUANTIZE=eetq: GPT2LMHeadModel has no linear layer that it applies to"):
        load(checkpoint("gpt2"), quantize="eetq")


def test_a_missing_scale_is_named(llama: Path, tmp_path: Path) -> None:
    settings, pack = STORED["gptq 4 bits"]
    folder = packers.repack(llama, tmp_path, settings, pack) / "packed"
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.scales"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.scales"):
        load(folder)


@pytest.mark.parametrize("method", ["int8", "eetq"])
def test_weights_of_another_shape_are_named(llama: Path, tmp_path: Path, method: str) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 100}))
    with pytest.raises(ModelLoadError, match=r"mlp\.\w+_proj\.weight of shape \[\d+, \d+\], the model's is"):
        load(folder, quantize=method)


# ---- the KV cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8_e4m3fn", "fp8_e5m2"])
def test_a_cache_of_8_bit_floats(llama: Path, new_engine: Callable[..., Harness], kind: str) -> None:
    """A quarter of the memory; batched = alone, and chunked = whole, though chunks read back what was rounded."""
    whole, chunked = new_engine(kv_cache_dtype=kind), new_engine(kv_cache_dtype=kind, tokens_per_step=16)
    cache = whole.engine._runner.cache
    assert cache.keys[0].dtype.itemsize == 1
    found = texts(whole)
    assert found == texts(chunked)
    if kind == "fp8_e4m3fn":
        same = sum(a[:1] == b[:1] for a, b in zip(found, texts(new_engine()), strict=True))
        assert same >= 3, "first tokens rarely differ"


def test_large_values_do_not_overflow_the_cache() -> None:
    from textgen_engine.attention.paging import as_stored

    cache = torch.empty(1, dtype=torch.float8_e4m3fn)
    assert as_stored(torch.tensor([1e6, -1e6, 0.5]), cache).tolist() == [448.0, -448.0, 0.5]
