"""The turned product and the packed kernel equal the plain product, at every row count around their limits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from textgen_engine.kernels.cpu import CpuKernels, load_kernels
from textgen_engine.models.cpu_linear import CpuLinear, PackedLinear, replace_linears


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 32, 48, 49, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = torch.nn.Linear(96, 130, bias=bias)
    x = torch.randn(1, rows, 96)
    torch.testing.assert_close(CpuLinear(linear)(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 32, 48, 49])
@pytest.mark.parametrize(("depth", "outputs"), [(96, 130), (19, 3), (576, 1537)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_compiled_kernel_equals_linear(rows: int, depth: int, outputs: int, bias: bool) -> None:
    kernels = load_kernels(num_threads=2)
    if kernels is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(rows)
    linear = torch.nn.Linear(depth, outputs, bias=bias)
    x = torch.randn(1, rows, 2 * depth)[..., ::2]
    torch.testing.assert_close(PackedLinear(linear, kernels)(x), linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("outputs", "depth"), [(1, 1), (31, 7), (32, 16), (33, 17), (70, 130), (100, 577), (576, 64)])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_packed_weight_is_the_turned_one(
    kernels: CpuKernels, outputs: int, depth: int, dtype: torch.dtype, shift: int
) -> None:
    """To the bit, with zeros where there is nothing, also where neither of the two begins at a whole vector."""
    weight = (torch.randn(outputs * depth + shift) * 20).to(dtype)[shift:].view(outputs, depth)
    together = 4 // dtype.itemsize
    blocks, steps = -(-outputs // kernels.block), -(-depth // together)
    padded = torch.zeros(blocks * kernels.block, steps * together, dtype=dtype)
    padded[:outputs, :depth] = weight
    expected = padded.view(blocks, kernels.block, steps, together).transpose(1, 2)
    room = torch.full((expected.numel() + together * shift,), 7, dtype=dtype)[together * shift :]
    found = kernels.pack(weight, lambda shape, _: room.view(shape))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 7, 49])
@pytest.mark.parametrize(("depth", "outputs"), [(96, 130), (19, 3), (576, 1537)])
def test_bfloat16_weights(rows: int, depth: int, outputs: int) -> None:
    """Products of numbers rounded to bfloat16 are exact in float32; only the order of additions differs."""
    kernels = load_kernels(num_threads=2)
    if kernels is None or torch.bfloat16 not in kernels.dtypes:
        pytest.skip("no compiler, or a processor without bfloat16")
    torch.manual_seed(rows)
    linear = torch.nn.Linear(depth, outputs, dtype=torch.bfloat16)
    x = torch.randn(1, rows, depth)
    packed = PackedLinear(linear, kernels)
    expected = functional.linear(x.bfloat16().float(), linear.weight.float(), linear.bias.float())
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(packed.weight, linear.weight)
    assert torch.equal(packed(x[:, :1]), packed(x)[:, :1])
    assert packed(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(("depth", "outputs"), [(96, 130), (2500, 64)])  # the second is added up in two parts
def test_a_row_is_the_same_in_any_batch(depth: int, outputs: int) -> None:
    kernels = load_kernels(num_threads=2)
    if kernels is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(1)
    layer, x = PackedLinear(torch.nn.Linear(depth, outputs), kernels), torch.randn(300, depth)
    whole = layer(x)
    for rows in (1, 2, 13, 32, 150):
        assert torch.equal(layer(x[:rows]), whole[:rows])
        assert torch.equal(layer(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_weight_lies_in_memory_once(dtype: torch.dtype) -> None:
    kernels = load_kernels(num_threads=2)
    if kernels is None or dtype not in kernels.dtypes:
        pytest.skip("no compiler, or a processor without bfloat16")
    model = torch.nn.Sequential(torch.nn.Embedding(200, 96), torch.nn.Linear(96, 200, bias=False)).to(dtype)
    model[1].weight = model[0].weight
    weight = model[0].weight.detach().clone()
    assert replace_linears(model, kernels) == 1
    assert not list(model.parameters())  # but the one packed copy
    assert torch.equal(model[1].weight, weight)
    assert torch.equal(model[0](torch.tensor([[0, 199], [31, 32]])), weight[torch.tensor([[0, 199], [31, 32]])])
    with pytest.raises(IndexError, match="199"):
        model[0](torch.tensor([200]))


def test_without_a_compiler_pytorch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("textgen_engine.kernels.cpu_build._FLAGS", ("--nobody-built-this",))
    assert load_kernels(num_threads=1) is None
    model = torch.nn.Sequential(torch.nn.Linear(8, 20))
    assert replace_linears(model, None) == 1
    assert type(model[0]) is CpuLinear


def test_replaces_plain_linears_and_keeps_tied_weights() -> None:
    class Special(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False), Special(20, 4))
    model[1].weight = model[0].weight
    assert replace_linears(model) == 1
    assert type(model[1]) is CpuLinear
    assert model[1].weight is model[0].weight
    assert type(model[2]) is Special
