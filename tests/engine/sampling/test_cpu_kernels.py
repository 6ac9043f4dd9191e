"""The compiled searches of the sampler find what PyTorch's operations find."""

from __future__ import annotations

import pytest
import torch

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.sampling import randomness
from textgen_engine.sampling.filters import largest
from textgen_engine.sampling.masks import GrammarRows, MaskApplier


@pytest.mark.parametrize(("size", "count"), [(1, 1), (37, 5), (300, 256), (5000, 8), (49152, 256), (49155, 4096)])
@pytest.mark.parametrize("kind", ["any", "ties", "mostly forbidden"])
def test_the_largest(kernels: CpuKernels, size: int, count: int, kind: str) -> None:
    logits = torch.randn(3, size + 5, generator=torch.Generator().manual_seed(size))[:, :size]
    if kind == "ties":
        logits = (logits * 3).round()
    elif kind == "mostly forbidden":
        logits = logits.masked_fill(torch.arange(size) % 7 != 0, -torch.inf)
    values, ids = kernels.largest(logits, count)
    expected_values, expected_ids = largest(logits, count)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)


def test_numbers_that_are_none(kernels: CpuKernels) -> None:
    """As many ids as asked for, each of the row."""
    logits = torch.full((2, 2000), torch.nan)
    logits[1, 7] = 1.0
    _, ids = kernels.largest(logits, 8)
    assert ids[1, 0] == 7
    assert all(len(set(row)) == 8 for row in ids.tolist())


@pytest.mark.parametrize("size", [40, 5001, 49152])
def test_the_finalists_of_the_race(kernels: CpuKernels, size: int) -> None:
    """All that the float64 race could choose: its best are among them."""
    generator = torch.Generator().manual_seed(size)
    logits = 5 * torch.randn(16, size, generator=generator)
    keys = torch.randint(-(2**31), 2**31 - 1, (16, 2), generator=generator).to(torch.int32)
    temperature = torch.rand(16, 1, generator=generator, dtype=torch.float64) + 0.2
    hashes = randomness.hashed_ids(size, torch.device("cpu"))
    top = logits.amax(-1, keepdim=True)
    ids = kernels.finalists(logits, top, temperature, hashes, keys, 8)
    noise = randomness.gumbel_noise(randomness.noise_bits(hashes, keys), torch.float64)
    exact = (logits.double() - top.double()) / temperature + noise
    best = exact.topk(4, dim=-1).indices
    assert all(set(wanted) <= set(found) for wanted, found in zip(best.tolist(), ids.tolist(), strict=True))
    # The noise itself, to float32's precision, through the scores' order on equal logits.
    flat = kernels.finalists(torch.zeros_like(logits), torch.zeros_like(top), torch.ones_like(top), hashes, keys, 8)
    assert torch.equal(flat[:, 0], noise.argmax(-1))


@pytest.mark.parametrize(("size", "num_words"), [(5, 1), (32, 1), (389, 13), (450, 13), (5000, 157), (400, 15)])
@pytest.mark.parametrize("share", [0.02, 0.98])
def test_what_a_grammar_forbids(kernels: CpuKernels, size: int, num_words: int, share: float) -> None:
    """Words that allow all, some and nothing; the last one in part; more words than tokens and fewer; strided rows."""
    generator = torch.Generator().manual_seed(size)
    allowed = torch.rand(3, num_words, 32, generator=generator) < share
    allowed[:, ::3] = share > 0.5
    bits = (allowed.long() << torch.arange(32)).sum(-1).to(torch.int32)
    wide = torch.randn(6, size + 3, generator=generator)
    expected = wide.clone()
    mask = GrammarRows(torch.tensor([4, 0, 3]), bits)
    MaskApplier(torch.device("cpu")).apply(expected[:, :size], mask)
    MaskApplier(torch.device("cpu"), kernels).apply(wide[:, :size], mask)
    assert torch.equal(wide, expected)
