"""Our int8, nf4 and fp4 against the bitsandbytes library itself, where it is installed (the `gpu` extra has it)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from textgen_engine.models.quantization.bitsandbytes_4bit import FourBit
from textgen_engine.models.quantization.eetq import WeightOnlyInt8
from textgen_engine.models.quantization.linear import CodedLinear

from ...tiny import Harness, make_request, save_checkpoint

bitsandbytes = pytest.importorskip("bitsandbytes")

WEIGHT = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) * 0.05


def ours(method: FourBit | WeightOnlyInt8) -> CodedLinear:
    layer = method.replacement(torch.nn.Linear(128, 96, bias=False), "layer")
    assert layer is not None
    parts = method.quantize(WEIGHT)
    return layer.fill(parts["weight"], parts["scales"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_are_the_librarys(kind: str) -> None:
    """To the last code but where a weight lies in the middle of two."""
    codes, state = bitsandbytes.functional.quantize_4bit(WEIGHT.clone(), quant_type=kind, blocksize=64)
    theirs = bitsandbytes.functional.dequantize_4bit(codes, state)
    found = ours(FourBit(f"bitsandbytes-{kind}")).dequantized()
    same = torch.isclose(found, theirs, atol=1e-6)
    assert float(same.float().mean()) > 0.999
    assert float((found - WEIGHT).abs().mean()) <= float((theirs - WEIGHT).abs().mean()) * 1.001


def test_8_bits_are_the_librarys() -> None:
    """The same codes and scales; its layer also rounds activations, so results differ by no more than that."""
    codes, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(WEIGHT.clone())
    layer = ours(WeightOnlyInt8("bitsandbytes"))
    assert int((layer.weight.int() - codes.int()).abs().max()) <= 1
    assert float((layer.weight == codes).float().mean()) > 0.999
    torch.testing.assert_close(layer.scales[:, 0], largest / 127)
    their_layer = bitsandbytes.nn.Linear8bitLt(128, 96, bias=False, has_fp16_weights=False)
    their_layer.weight = bitsandbytes.nn.Int8Params(WEIGHT.clone(), has_fp16_weights=False, requires_grad=False)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    theirs = their_layer.to("cpu")(x)
    torch.testing.assert_close(layer(x), theirs, atol=0.03 * float(theirs.abs().max()), rtol=0)


SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8 bits": {"load_in_8bit": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_transformers_and_the_library_saved_is_served(
    tmp_path: Path, new_engine: Callable[..., Harness], name: str
) -> None:
    """The texts are those of the weights that the library itself makes of the file."""
    plain = save_checkpoint(tmp_path / "plain", intermediate_size=128)
    config = BitsAndBytesConfig(**SETTINGS[name], bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "saved")
    meant = load_file(plain / "model.safetensors")
    for key, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            meant[f"{key}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            meant[f"{key}.weight"] = module.weight.data * (module.weight.SCB / 127)[:, None]
    save_file({key: value.contiguous() for key, value in meant.items()}, plain / "model.safetensors")
    request = make_request("one", [5, 6, 7, 8, 9], 12, ignore_eos_token=True)
    found, expected = (new_engine(tmp_path / folder).run_alone(request).ids() for folder in ("saved", "plain"))
    assert found == expected
