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


@pytest.mark.parametrize("code", Code)
@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size"), [(64, 1, 32), (192, 7, 64), (576, 33, 576), (96, 130, 32)]
)
def test_coded_weights(kernels: CpuKernels, code: Code, inputs: int, outputs: int, group_size: int) -> None:
    for with_offsets in (False, True):
        layer = random_layer(code, inputs, outputs, group_size, with_offsets=with_offsets, with_bias=with_offsets)
        for num_rows in (1, 2, 5, 13, 48):
            x = torch.randn(num_rows, inputs, generator=torch.Generator().manual_seed(num_rows))
            expected = functional.linear(x, layer.dequantized(), layer.bias)
            layer.kernels = kernels
            compiled = layer(x)
            layer.kernels = None
            for found in (compiled, layer(x)):
                torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_half_bytes(kernels: CpuKernels, name: str) -> None:
    layer = random_layer(Code.NIBBLE, 128, 40, 64, with_offsets=False, with_bias=False, table=TABLES[name])
    assert set(layer.dequantized().div(layer.scales.repeat_interleave(64, 1)).view(-1).tolist()) != set()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    expected = functional.linear(x, layer.dequantized())
    layer.kernels = kernels
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_all_floats_of_8_bits(kernels: CpuKernels) -> None:
    """Every code, the smallest ones too, becomes the float it stands for."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # no numbers
    layer = CodedLinear(256, 1, None, code=Code.FLOAT8, group_size=256)
    layer.fill(codes.view(torch.float8_e4m3fn)[None], torch.ones(1, 1))
    layer.kernels = kernels
    for one in range(0, 256, 48):
        x = functional.one_hot(torch.arange(one, min(one + 48, 256)), 256).float()
        assert torch.equal(layer(x)[:, 0], codes.view(torch.float8_e4m3fn).float()[one : one + 48])


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 1), (100, 7), (576, 33), (1536, 130)])
def test_integer_weights(kernels: CpuKernels, inputs: int, outputs: int) -> None:
    """Exact integers: the compiled kernel and the reference differ in nothing but the last bits of a scaled sum."""
    generator = torch.Generator().manual_seed(inputs)
    layer = IntegerLinear(inputs, outputs, torch.randn(outputs, generator=generator))
    codes, layer.scales = quantize_rows(torch.randn(outputs, inputs, generator=generator))
    layer.weight, layer.sums = codes.to(torch.int8), codes.sum(1).to(torch.int32)
    packed = copy.deepcopy(layer)
    packed.kernels = kernels
    packed.pack()
    for num_rows in (1, 3, 8, 20, 70):
        x = torch.randn(num_rows, inputs, generator=generator)
        x[0] = 0
        expected = layer(x)
        torch.testing.assert_close(packed(x), expected, atol=1e-4, rtol=1e-5)
        assert torch.equal(packed(x)[:1], packed(x[:1])), "neighbours do not matter"


def test_half_bytes_pack_and_unpack() -> None:
    codes = torch.randint(0, 16, (5, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
