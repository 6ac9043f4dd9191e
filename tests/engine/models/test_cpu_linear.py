"""The turned product equals the plain one, at every row count around its limits."""

from __future__ import annotations

import pytest
import torch

from textgen_engine.models.cpu_linear import CpuLinear, replace_linears


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 32, 48, 49, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = torch.nn.Linear(96, 130, bias=bias)
    x = torch.randn(1, rows, 96)
    torch.testing.assert_close(CpuLinear(linear)(x), linear(x), atol=1e-5, rtol=1e-5)


def test_replaces_plain_linears_and_keeps_tied_weights() -> None:
    class Special(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False), Special(20, 4))
    model[1].weight = model[0].weight
    assert replace_linears(model) == 1
    assert type(model[1]) is CpuLinear
    assert model[1].weight is model[0].weight
    assert type(model[2]) is Special
