"""Compiled kernels for quantized weights against what the weights stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.models.quantization.bitsandbytes_4bit import TABLES
from textgen_engine.models.quantization.linear import (
    Code,
    CodedLinear,
    IntegerLinear,
    pack_nibbles,
    quantize_rows,
    unpack_nibbles,
)


def random_layer(
    code: Code,
    inputs: int,
    outputs: int,
    group_size: int,
    *,
    with_offsets: bool,
    with_bias: bool,
    table: torch.Tensor | None = None,
) -> CodedLinear:
    generator = torch.Generator().manual_seed(inputs + outputs)
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    layer = CodedLinear(inputs, outputs, bias, code=code, group_size=group_size, table=table)
    if code is Code.FLOAT8:
        weight = (torch.randn(outputs, inputs, generator=generator) * 100).to(torch.float8_e4m3fn)
    else:
        width = inputs // 2 if code is Code.NIBBLE else inputs
        weight = torch.randint(0, 256, (outputs, width), generator=generator, dtype=torch.uint8)
        weight = weight.view(layer.weight.dtype)
    groups = inputs // group_size
    scales = torch.rand(outputs, groups, generator=generator) + 0.1
    return layer.fill(weight, scales, torch.randn(outputs, groups, generator=generator) if with_offsets else None)


def packed(layer: CodedLinear, kernels: CpuKernels) -> CodedLinear:
    """The same layer in the kernels' form."""
    layer = copy.deepcopy(layer)
    layer.kernels = kernels
    layer.pack()
    assert layer.for_kernels is not None
    return layer


SHAPES = [(64, 1, 32), (192, 7, 64), (576, 33, 576), (96, 130, 32), (320, 48, 8), (160, 64, 40)]


@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), SHAPES)
def test_coded_weights(kernels: CpuKernels, code: Code, inputs: int, outputs: int, group_size: int) -> None:
    for with_offsets in (False, True):
        plain = random_layer(code, inputs, outputs, group_size, with_offsets=with_offsets, with_bias=with_offsets)
        layer = packed(plain, kernels)
        assert torch.equal(layer.dequantized(), plain.dequantized()), "packing loses nothing"
        for num_rows in (1, 2, 5, 13, 48, 200):
            x = torch.randn(num_rows, inputs, generator=torch.Generator().manual_seed(num_rows))
            expected = functional.linear(x, plain.dequantized(), plain.bias)
            for found in (layer(x), plain(x)):
                torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
            assert torch.equal(layer(x)[-1:], layer(x[-1:])), "neighbours do not matter"
        assert layer(torch.ones(0, inputs)).shape == (0, outputs)  # an expert that no token chose


@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), SHAPES)
def test_coded_weights_beside_rows_in_bfloat16(
    kernels: CpuKernels, code: Code, inputs: int, outputs: int, group_size: int
) -> None:
    """Weights become bfloat16 where the processor multiplies it, by rows of it; sums are not rounded before the end."""
    plain = random_layer(code, inputs, outputs, group_size, with_offsets=True, with_bias=True)
    layer = packed(plain, kernels)
    weight = plain.dequantized()
    if torch.bfloat16 in kernels.dtypes:
        weight = weight.bfloat16().float()
    for num_rows in (1, 5, 48):
        x = torch.randn(num_rows, inputs, generator=torch.Generator().manual_seed(num_rows)).bfloat16()
        expected = functional.linear(x.float(), weight, plain.bias)
        found = layer(x)
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.float(), expected, atol=2e-5 * float(expected.abs().max()), rtol=2**-8)


@pytest.mark.parametrize("num_gaps", [0, 32])
def test_an_order_of_inputs(kernels: CpuKernels, num_gaps: int) -> None:
    """Codes in another order than the inputs, and with gaps among them."""
    generator = torch.Generator().manual_seed(0)
    plain = random_layer(Code.NIBBLE, 96 + num_gaps, 40, 32, with_offsets=True, with_bias=True)
    plain.in_features = 96
    plain.order = torch.cat((torch.randperm(96, generator=generator), torch.full((num_gaps,), 96)))
    plain.order = plain.order[torch.randperm(96 + num_gaps, generator=generator)]
    layer = packed(plain, kernels)
    for num_rows in (1, 30):
        x = torch.randn(num_rows, 96, generator=generator)
        torch.testing.assert_close(layer(x), plain(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_half_bytes(kernels: CpuKernels, name: str) -> None:
    layer = random_layer(Code.NIBBLE, 128, 40, 64, with_offsets=False, with_bias=False, table=TABLES[name])
    assert set(layer.dequantized().div(layer.scales.repeat_interleave(64, 1)).view(-1).tolist()) != set()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    expected = functional.linear(x, layer.dequantized())
    torch.testing.assert_close(packed(layer, kernels)(x), expected, atol=1e-4, rtol=1e-4)


def test_all_floats_of_8_bits(kernels: CpuKernels) -> None:
    """Every code, the smallest ones too, becomes the float it stands for."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # no numbers
    layer = CodedLinear(256, 1, None, code=Code.FLOAT8, group_size=256)
    layer.fill(codes.view(torch.float8_e4m3fn)[None], torch.ones(1, 1))
    layer = packed(layer, kernels)
    assert torch.equal(layer(torch.eye(256))[:, 0], codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 1), (100, 7), (576, 33), (1536, 130)])
def test_integer_weights(kernels: CpuKernels, inputs: int, outputs: int) -> None:
    """Exact integers: the compiled kernel and the reference differ in nothing but the last bits of a scaled sum."""
    generator = torch.Generator().manual_seed(inputs)
    layer = IntegerLinear(inputs, outputs, torch.randn(outputs, generator=generator))
    codes, layer.scales = quantize_rows(torch.randn(outputs, inputs, generator=generator))
    layer.weight, layer.sums = codes.to(torch.int8), codes.sum(1).to(torch.int32)
    compiled = copy.deepcopy(layer)
    compiled.kernels = kernels
    compiled.pack()
    for num_rows in (1, 3, 8, 20, 70):
        x = torch.randn(num_rows, inputs, generator=generator)
        x[0] = 0
        expected = layer(x)
        torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-5)
        assert torch.equal(compiled(x)[:1], compiled(x[:1])), "neighbours do not matter"


def test_half_bytes_pack_and_unpack() -> None:
    codes = torch.randint(0, 16, (5, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
