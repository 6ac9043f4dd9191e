"""kernels/coded_linear.py against the dequantizing form, and who gets it."""

from __future__ import annotations

import pytest
import torch

from textgen_engine.models.quantization.bitsandbytes_4bit import TABLES
from textgen_engine.models.quantization.linear import Code, CodedLinear, choose_gpu_kernel


def layer_of(code: Code, num_inputs: int, num_outputs: int, group_size: int, kind: str) -> CodedLinear:
    """Random codes. kind: what stands beside them: a table of 16, offsets, or nothing; and a bias, with offsets."""
    generator = torch.Generator().manual_seed(num_inputs + num_outputs)
    bias = torch.randn(num_outputs, generator=generator) if kind == "offsets" else None
    table = TABLES["bitsandbytes-nf4"] if kind == "table" else None
    layer = CodedLinear(num_inputs, num_outputs, bias, code=code, group_size=group_size, table=table)
    width = num_inputs // 2 if code is Code.NIBBLE else num_inputs
    if code is Code.FLOAT8:
        weight = torch.randn(num_outputs, width, generator=generator).mul(30).to(torch.float8_e4m3fn)
    else:
        weight = torch.randint(0, 256, (num_outputs, width), generator=generator).to(torch.uint8)
        weight = weight.view(torch.int8) if code is Code.INT8 else weight
    scales = torch.rand(num_outputs, num_inputs // group_size, generator=generator) * 0.05
    offsets = torch.randn(scales.shape, generator=generator) * 0.1 if kind == "offsets" else None
    return layer.fill(weight, scales, offsets)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.INT8, "nothing"),
        (Code.INT8, "offsets"),
        (Code.NIBBLE, "table"),
        (Code.NIBBLE, "offsets"),
        (Code.FLOAT8, "nothing"),
    ],
)
@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "num_outputs", "group_size"), [(1, 64, 32, 64), (5, 192, 50, 32), (33, 96, 7, 96)]
)
def test_equals_the_dequantizing_form(
    device: torch.device, code: Code, kind: str, num_rows: int, num_inputs: int, num_outputs: int, group_size: int
) -> None:
    from textgen_engine.kernels.coded_linear import coded_linear

    layer = layer_of(code, num_inputs, num_outputs, group_size, kind).to(device)
    layer.bring(device)
    x = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        expected = layer(x)
        layer.gpu_kernel = coded_linear
        found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


def test_many_rows_are_multiplied_by_dequantized_weights() -> None:
    layer = layer_of(Code.INT8, 64, 8, 64, "nothing")
    layer.gpu_kernel = lambda *_: pytest.fail("called")
    assert layer(torch.randn(65, 64)).shape == (65, 8)


def test_who_gets_it() -> None:
    pytest.importorskip("triton")
    from textgen_engine.kernels.coded_linear import coded_linear

    chosen = {capability: choose_gpu_kernel(capability) for capability in (None, (7, 5), (8, 0), (8, 9), (9, 0))}
    assert chosen == {None: None, (7, 5): None, (8, 0): coded_linear, (8, 9): coded_linear, (9, 0): coded_linear}
