"""kernels/paged_decode.py against its reference, and the reference against attention/sdpa.py.

float32 with sums of at most a few hundred terms: 2e-5. bfloat16 weights are rounded before they are multiplied: 2e-2.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from textgen_engine.attention.base import AttentionMetadata, Scoring
from textgen_engine.attention.sdpa import SdpaBackend

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Anything that a block holds behind the end of its sequence, or that nobody owns.
STALE = float("nan")


def make_cache(
    lengths: list[int],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    device: torch.device,
    seed: int = 0,
) -> dict[str, Any]:
    """query, keys, values, block_tables and seq_lens of random content, in shuffled blocks."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in lengths]
    free = list(range(sum(counts) + 2))
    rng.shuffle(free)
    tables = torch.zeros(len(lengths), max(*counts, 1), dtype=torch.int64)
    keys = torch.full((len(free), kv_heads, block_size, dim), STALE)
    values = torch.full((len(free), kv_heads, block_size, value_dim or dim), STALE)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for index in range(count):
            block, filled = free.pop(), min(block_size, length - index * block_size)
            tables[row, index] = block
            keys[block, :, :filled] = torch.randn(kv_heads, filled, dim, generator=generator)
            values[block, :, :filled] = torch.randn(kv_heads, filled, value_dim or dim, generator=generator)
    query = torch.randn(len(lengths), heads, dim, generator=generator)
    return {
        "query": query.to(device, dtype),
        "keys": keys.to(device, cache_dtype or dtype),
        "values": values.to(device, cache_dtype or dtype),
        "block_tables": tables.to(device),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device),
    }


def compare(cache: dict[str, Any], scoring: Scoring, num_runs: int = 1, **scales: float) -> None:
    from textgen_engine.kernels.paged_decode import paged_decode, paged_decode_reference

    found = paged_decode(**cache, scoring=scoring, num_runs=num_runs, **scales)
    expected = paged_decode_reference(**cache, scoring=scoring, **scales)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[cache["query"].dtype], rtol=0)


LENGTHS = [1, 70, 16, 33]


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_head_sizes(device: torch.device, dim: int) -> None:
    compare(make_cache([37, 5], heads=2, kv_heads=1, dim=dim, device=device), Scoring(dim**-0.5), num_runs=2)


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
def test_block_sizes(device: torch.device, block_size: int) -> None:
    cache = make_cache(LENGTHS, heads=2, kv_heads=2, dim=16, block_size=block_size, device=device)
    compare(cache, Scoring(0.25))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (7, 1), (20, 1)])
def test_heads_that_share_keys(device: torch.device, heads: int, kv_heads: int) -> None:
    compare(make_cache([50, 3], heads=heads, kv_heads=kv_heads, dim=16, device=device), Scoring(0.25), num_runs=2)


@pytest.mark.parametrize("num_runs", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 40},
        {"chunk_size": 24},
        {"soft_cap": 2.0},
        {"sliding_window": 20, "soft_cap": 5.0, "chunk_size": 33},
    ],
    ids=str,
)
def test_scorings(device: torch.device, options: dict[str, Any], num_runs: int) -> None:
    """Each also with sinks and slopes, which no other option may disturb."""
    cache = make_cache([1, 64, 101], heads=4, kv_heads=1, dim=16, device=device)
    generator = torch.Generator().manual_seed(1)
    compare(cache, Scoring(0.3, **options), num_runs)
    sinks = torch.randn(4, generator=generator).to(device)
    slopes = torch.rand(4, generator=generator).to(device) * 0.2
    compare(cache, Scoring(0.3, sinks=sinks, alibi_slopes=slopes, **options), num_runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(device: torch.device, dtype: torch.dtype) -> None:
    compare(make_cache([70, 9], heads=4, kv_heads=2, dim=64, dtype=dtype, device=device), Scoring(0.125), num_runs=2)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_cache_of_8_bit_floats(device: torch.device, cache_dtype: torch.dtype) -> None:
    """The scale is part of what is compared: without it the result would be off by factors."""
    cache = make_cache(
        [70, 9], heads=4, kv_heads=2, dim=16, dtype=torch.bfloat16, cache_dtype=cache_dtype, device=device
    )
    compare(cache, Scoring(0.25), num_runs=2, key_scale=0.5, value_scale=3.0)


def test_values_narrower_than_keys(device: torch.device) -> None:
    compare(make_cache(LENGTHS, heads=4, kv_heads=4, dim=48, value_dim=24, device=device), Scoring(0.2), num_runs=2)


def test_a_row_without_keys_gives_zeros(device: torch.device) -> None:
    from textgen_engine.kernels.paged_decode import paged_decode

    cache = make_cache([0, 20], heads=2, kv_heads=1, dim=16, device=device)
    for scoring in (Scoring(0.25), Scoring(0.25, sinks=torch.ones(2, device=device))):
        found = paged_decode(**cache, scoring=scoring, num_runs=2)
        assert not found[0].any() and torch.isfinite(found).all()


def test_reference_equals_the_backend(device: torch.device) -> None:
    from textgen_engine.kernels.paged_decode import paged_decode_reference

    cache = make_cache(LENGTHS, heads=4, kv_heads=2, dim=16, device=device)
    scoring = Scoring(0.25, sliding_window=30, soft_cap=3.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0], device=device))
    expected = paged_decode_reference(**cache, scoring=scoring)
    keys, values = (cache[name].nan_to_num() for name in ("keys", "values"))
    last = [length - 1 for length in LENGTHS]
    blocks = torch.stack([cache["block_tables"][row, position // 16] for row, position in enumerate(last)])
    offsets = torch.tensor([position % 16 for position in last], device=device)
    metadata = AttentionMetadata(4, [1] * 4, LENGTHS, cache["block_tables"], blocks, offsets, [keys], [values])
    backend = SdpaBackend()
    backend.prepare(metadata)
    key, value = keys[blocks, :, offsets], values[blocks, :, offsets]
    torch.testing.assert_close(backend.run(0, cache["query"], key, value, metadata, scoring), expected)


def test_number_of_runs(device: torch.device) -> None:
    from textgen_engine.kernels.paged_decode import MAX_RUNS, choose_num_runs

    assert choose_num_runs(1, 8, 100_000, 132) == MAX_RUNS
    assert choose_num_runs(256, 8, 100_000, 132) == 1
    assert choose_num_runs(1, 8, 300, 132) == 2, "no runs of a few keys"
