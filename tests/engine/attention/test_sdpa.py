"""`attention/sdpa.py`, `compiled.py` and `invariant.py` against attention written out densely, one query at a time.

Tolerance: float32 with sums of at most 300 terms of size 1, so 2e-5 absolute.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from textgen_engine.attention.base import AttentionBackend, AttentionMetadata, Scoring
from textgen_engine.attention.compiled import CompiledBackend
from textgen_engine.attention.invariant import InvariantBackend
from textgen_engine.attention.paging import store
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.kernels.cpu import load_kernels

TOLERANCE = 2e-5


@dataclass
class Step:
    """A step of random content; `keys[i]` and `values[i]` [seq_len, kv_heads, dim] are what sequence i must see."""

    metadata: AttentionMetadata
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def make_step(
    lengths: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    dim: int = 16,
    value_dim: int = 16,
    block_size: int = 4,
    seed: int = 0,
    stale: float = 1e4,
) -> Step:
    """lengths: (query_len, seq_len) of each sequence, decodes first. Whatever no sequence owns holds `stale`."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tables = [-(-seq_len // block_size) for _, seq_len in lengths]
    free = list(range(sum(tables) + 3))
    rng.shuffle(free)
    cache_keys = torch.full((len(free), kv_heads, block_size, dim), stale)
    cache_values = torch.full((len(free), kv_heads, block_size, value_dim), stale)
    block_tables = torch.zeros(len(lengths), max(tables), dtype=torch.int64)
    slots: list[tuple[int, int]] = []
    keys, values, new_keys, new_values = [], [], [], []
    for index, (query_len, seq_len) in enumerate(lengths):
        table = [free.pop() for _ in range(tables[index])]
        block_tables[index, : len(table)] = torch.tensor(table)
        key = torch.randn(seq_len, kv_heads, dim, generator=generator)
        value = torch.randn(seq_len, kv_heads, value_dim, generator=generator)
        for position in range(seq_len):
            block, offset = table[position // block_size], position % block_size
            if position < seq_len - query_len:
                cache_keys[block, :, offset] = key[position]
                cache_values[block, :, offset] = value[position]
            else:
                slots.append((block, offset))
        keys.append(key)
        values.append(value)
        new_keys.append(key[seq_len - query_len :])
        new_values.append(value[seq_len - query_len :])
    metadata = AttentionMetadata(
        num_decodes=sum(1 for query_len, _ in lengths if query_len == 1),
        query_lens=[query_len for query_len, _ in lengths],
        seq_lens=[seq_len for _, seq_len in lengths],
        block_tables=block_tables,
        slot_blocks=torch.tensor([block for block, _ in slots]),
        slot_offsets=torch.tensor([offset for _, offset in slots]),
        keys=[cache_keys],
        values=[cache_values],
    )
    query = torch.randn(len(slots), heads, dim, generator=generator)
    return Step(metadata, query, torch.cat(new_keys), torch.cat(new_values), keys, values)


def compiled() -> AttentionBackend:
    kernels = load_kernels(num_threads=2)
    if kernels is None:
        pytest.skip("no C++ compiler")
    return CompiledBackend(kernels)


BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "sdpa": SdpaBackend,
    "invariant": InvariantBackend,
    "compiled": compiled,
}


def run(step: Step, scoring: Scoring, kind: Callable[[], AttentionBackend] = SdpaBackend) -> torch.Tensor:
    backend = kind()
    backend.prepare(step.metadata)
    return backend.run(0, step.query, step.key, step.value, step.metadata, scoring)


def dense(step: Step, scoring: Scoring) -> torch.Tensor:
    """The formula of Scoring in float64, one query and one head at a time."""
    rows: list[torch.Tensor] = []
    heads = step.query.shape[1]
    for index, query_len in enumerate(step.metadata.query_lens):
        key, value = step.keys[index].double(), step.values[index].double()
        ratio = heads // key.shape[1]
        for position in range(len(key) - query_len, len(key)):
            first = scoring.first_visible(position)
            query = step.query[len(rows)].double()
            row = []
            for head in range(heads):
                scores = key[first : position + 1, head // ratio] @ query[head] * scoring.scale
                if scoring.soft_cap is not None:
                    scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
                if scoring.alibi_slopes is not None:
                    scores += scoring.alibi_slopes[head].double() * torch.arange(first - position, 1)
                visible = value[first : position + 1, head // ratio]
                if scoring.sinks is not None:
                    scores = torch.cat((scores, scoring.sinks[head : head + 1].double()))
                    visible = torch.cat((visible, torch.zeros_like(visible[:1])))
                row.append(torch.softmax(scores, 0) @ visible)
            rows.append(torch.stack(row))
    return torch.stack(rows)


MIXES = {
    "one decode": [(1, 1)],
    "decodes of one length": [(1, 9)] * 5,
    "many decodes": [(1, 3 + 17 * index) for index in range(9)],
    "decodes in several groups": [(1, 3), (1, 300), (1, 70), (1, 5), (1, 150), (1, 299)],
    "a whole prompt": [(13, 13)],
    "a chunk": [(5, 40)],
    "whole prompts and chunks": [(7, 7), (3, 20), (16, 16), (8, 8), (2, 129)],
    "decodes and chunks": [(1, 2), (1, 200), (1, 33), (6, 6), (4, 50)],
    "a decode of the first token beside a chunk": [(1, 1), (3, 3)],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("sliding_window", [None, 1, 8, 1000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dense_attention(mix: str, heads: int, kv_heads: int, sliding_window: int | None, backend: str) -> None:
    step = make_step(MIXES[mix], heads=heads, kv_heads=kv_heads)
    scoring = Scoring(0.25, sliding_window)
    found = run(step, scoring, BACKENDS[backend])
    torch.testing.assert_close(found.double(), dense(step, scoring), atol=TOLERANCE, rtol=0)


SCORINGS: dict[str, Callable[[int], Scoring]] = {
    "soft cap": lambda heads: Scoring(1.0, soft_cap=1.5),
    "sinks": lambda heads: Scoring(0.25, sinks=torch.linspace(-3, 5, heads)),
    "alibi": lambda heads: Scoring(0.25, alibi_slopes=2.0 ** -torch.arange(1.0, heads + 1)),
    "chunks": lambda heads: Scoring(0.25, chunk_size=5),
    "all of it": lambda heads: Scoring(
        1.0, 40, 32, 2.0, sinks=torch.linspace(-1, 1, heads), alibi_slopes=torch.linspace(0.1, 1, heads)
    ),
}


def in_bfloat16(step: Step) -> Step:
    """The same step with a cache in bfloat16, and with queries, keys and values that it can hold."""
    step = with_cache_of(step, torch.bfloat16)
    return replace(step, query=step.query.bfloat16().float())


def with_cache_of(step: Step, dtype: torch.dtype) -> Step:
    """The same step with a cache of another type, and with keys and values that it can hold."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        largest = torch.finfo(dtype).max
        return tensor.clamp(-largest, largest).to(dtype)

    metadata = step.metadata
    metadata.keys, metadata.values = ([rounded(cache) for cache in kind] for kind in (metadata.keys, metadata.values))
    key, value = rounded(step.key).float(), rounded(step.value).float()
    keys, values = ([rounded(tensor).float() for tensor in kind] for kind in (step.keys, step.values))
    return Step(metadata, step.query, key, value, keys, values)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 1)])
@pytest.mark.parametrize("sliding_window", [None, 1, 8])
@pytest.mark.parametrize(("dim", "value_dim", "block_size"), [(16, 48, 4), (64, 32, 16), (80, 64, 5)])
def test_a_cache_in_bfloat16(
    mix: str, heads: int, kv_heads: int, sliding_window: int | None, dim: int, value_dim: int, block_size: int
) -> None:
    """Each weight is rounded by at most 2^-9 of it, and values are at most 5."""
    step = in_bfloat16(
        make_step(MIXES[mix], heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, block_size=block_size)
    )
    scoring = Scoring(0.125, sliding_window)
    found = run(step, scoring, compiled)
    torch.testing.assert_close(found.double(), dense(step, scoring), atol=5 * 2**-9, rtol=0)


@pytest.mark.parametrize("kind", SCORINGS)
def test_what_layers_ask_for_of_a_cache_in_bfloat16(kind: str) -> None:
    step = in_bfloat16(make_step(MIXES["decodes and chunks"], heads=6, kv_heads=2, value_dim=32))
    scoring = SCORINGS[kind](6)
    found = run(step, scoring, compiled)
    torch.testing.assert_close(found.double(), dense(step, scoring), atol=5 * 2**-9, rtol=0)


FLOATS_OF_8_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("mix", ["one decode", "many decodes", "whole prompts and chunks", "decodes and chunks"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 1)])
@pytest.mark.parametrize(("dim", "value_dim", "block_size"), [(16, 48, 4), (64, 32, 16), (80, 64, 5)])
@pytest.mark.parametrize("dtype", FLOATS_OF_8_BITS)
@pytest.mark.parametrize("is_rounded", [False, True])
def test_a_cache_of_8_bits(
    mix: str,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    block_size: int,
    dtype: torch.dtype,
    is_rounded: bool,
) -> None:
    """It is read without a loss; in a model of bfloat16 weights are rounded, too, and so is what comes out."""
    step = with_cache_of(
        make_step(MIXES[mix], heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim, block_size=block_size),
        dtype,
    )
    scoring = Scoring(0.125, 8)
    expected = dense(step if not is_rounded else replace(step, query=step.query.bfloat16()), scoring)
    found = run(replace(step, query=step.query.bfloat16()) if is_rounded else step, scoring, compiled)
    torch.testing.assert_close(found.double(), expected, atol=10 * 2**-9 if is_rounded else TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", SCORINGS)
@pytest.mark.parametrize("dtype", FLOATS_OF_8_BITS)
def test_what_layers_ask_for_of_a_cache_of_8_bits(kind: str, dtype: torch.dtype) -> None:
    step = with_cache_of(make_step(MIXES["decodes and chunks"], heads=6, kv_heads=2, value_dim=32), dtype)
    scoring = SCORINGS[kind](6)
    found = run(step, scoring, compiled)
    torch.testing.assert_close(found.double(), dense(step, scoring), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", FLOATS_OF_8_BITS)
def test_floats_of_8_bits_are_written_as_pytorch_does(dtype: torch.dtype) -> None:
    """Bit by bit: numbers of all sizes, those half way between two codes, and what is too large."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[torch.isfinite(codes)].unique()
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.randint(-22, 18, (400,), generator=generator)
    between = (codes[1:] + codes[:-1]) / 2
    numbers = [codes, between, between * 1.0001, between * 0.9999, torch.randn(400, generator=generator) * sizes]
    all_of_them = torch.cat([*numbers, torch.tensor([math.inf, -math.inf, 1e30, -0.0])])
    rows = -(-len(all_of_them) // 16)
    key = torch.nn.functional.pad(all_of_them, (0, 16 * rows - len(all_of_them))).view(rows, 1, 16)
    written = []
    for how in ("pytorch", "compiled"):
        step = with_cache_of(make_step([(rows, rows)], heads=1, kv_heads=1, stale=0.0), dtype)
        step = replace(step, key=key, value=key.flip(0))
        if how == "pytorch":
            store(step.key, step.value, step.metadata.keys[0], step.metadata.values[0], step.metadata)
        else:
            run(step, Scoring(0.0), compiled)
        written.append([cache.view(torch.uint8) for cache in (step.metadata.keys[0], step.metadata.values[0])])
    for expected, found in zip(*written, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", FLOATS_OF_8_BITS)
@pytest.mark.parametrize("is_rounded", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_every_float_of_8_bits_is_read(dtype: torch.dtype, is_rounded: bool, num_tokens: int) -> None:
    """A token that sees itself alone receives its own value; a key that is no number makes the result none."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = torch.where(torch.isfinite(codes), codes, torch.zeros(()))
    step = with_cache_of(make_step([(num_tokens, num_tokens)], heads=1, kv_heads=1, value_dim=256), dtype)
    step = replace(step, value=numbers.expand(num_tokens, 1, 256))
    step = replace(step, query=step.query.bfloat16()) if is_rounded else step
    alone = Scoring(0.25, sliding_window=1)
    assert torch.equal(run(step, alone, compiled).float(), step.value)
    step.key[0, 0, 3] = math.nan
    assert torch.isnan(run(step, alone, compiled)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *FLOATS_OF_8_BITS])
def test_what_overflows_is_stored_as_a_number(dtype: torch.dtype) -> None:
    """A weight of 0 times it must be 0 for whoever may not see it."""
    step = with_cache_of(make_step([(6, 6)], heads=2, kv_heads=1), dtype)
    step.value[5] = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38] * 4)
    found = run(step, Scoring(0.25), compiled)
    assert torch.isfinite(step.metadata.values[0].float()).all()
    assert torch.isfinite(found[:5]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *FLOATS_OF_8_BITS])
def test_a_decode_is_the_same_in_any_batch(dtype: torch.dtype) -> None:
    """To the last bit, though many sequences are dealt to the threads otherwise than few."""
    step = with_cache_of(make_step(MIXES["many decodes"], heads=6, kv_heads=3), dtype)
    together = run(step, Scoring(0.25), compiled)
    metadata = step.metadata
    for index in range(len(metadata.seq_lens)):
        row = slice(index, index + 1)
        alone = AttentionMetadata(
            num_decodes=1,
            query_lens=[1],
            seq_lens=metadata.seq_lens[row],
            block_tables=metadata.block_tables[row],
            slot_blocks=metadata.slot_blocks[row],
            slot_offsets=metadata.slot_offsets[row],
            keys=metadata.keys,
            values=metadata.values,
        )
        one = Step(alone, step.query[row], step.key[row], step.value[row], [], [])
        assert torch.equal(run(one, Scoring(0.25), compiled), together[row])


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("heads", [2, 6, 14])
@pytest.mark.parametrize("kind", SCORINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_layers_ask_for_beyond_products(mix: str, heads: int, kind: str, backend: str) -> None:
    """With values of another size than keys."""
    step = make_step(MIXES[mix], heads=heads, kv_heads=2, value_dim=32)
    scoring = SCORINGS[kind](heads)
    found = run(step, scoring, BACKENDS[backend])
    torch.testing.assert_close(found.double(), dense(step, scoring), atol=TOLERANCE, rtol=0)


def test_long_chunks_run_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textgen_engine.attention.sdpa._TILE_SCORES", 6 * 60 * 7)
    step = make_step([(50, 60)], heads=6, kv_heads=2)
    scoring = SCORINGS["all of it"](6)
    torch.testing.assert_close(run(step, scoring).double(), dense(step, scoring), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", range(25))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    decodes = [(1, rng.choice([1, rng.randint(1, 20), rng.randint(50, 260)])) for _ in range(rng.randint(0, 6))]
    chunks = [(length, length + rng.choice([0, rng.randint(1, 60)])) for length in rng.choices(range(2, 40), k=3)]
    kv_heads = rng.choice([1, 2, 3])
    step = make_step(
        decodes + chunks[: rng.randint(0 if decodes else 1, 3)],
        heads=kv_heads * rng.choice([1, 2, 5]),
        kv_heads=kv_heads,
        dim=rng.choice([8, 20]),
        value_dim=rng.choice([8, 12]),
        block_size=rng.choice([1, 2, 16, 64]),
        seed=seed,
    )
    scoring = Scoring(1 / math.sqrt(step.query.shape[2]), rng.choice([None, rng.randint(1, 50)]))
    torch.testing.assert_close(run(step, scoring).double(), dense(step, scoring), atol=TOLERANCE, rtol=0)


def test_keys_and_values_are_stored_where_the_slots_say() -> None:
    step = make_step([(1, 6), (5, 9)], heads=2, kv_heads=1)
    before = step.metadata.keys[0].clone()
    run(step, Scoring(1.0))
    written = {(int(b), int(o)) for b, o in zip(step.metadata.slot_blocks, step.metadata.slot_offsets, strict=True)}
    for row, (block, offset) in enumerate(
        zip(step.metadata.slot_blocks.tolist(), step.metadata.slot_offsets.tolist(), strict=True)
    ):
        assert torch.equal(step.metadata.keys[0][block, :, offset], step.key[row])
        assert torch.equal(step.metadata.values[0][block, :, offset], step.value[row])
    for block in range(before.shape[0]):
        for offset in range(before.shape[2]):
            if (block, offset) not in written:
                assert torch.equal(step.metadata.keys[0][block, :, offset], before[block, :, offset])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_others_left_in_the_cache_reaches_nobody(bad: float) -> None:
    """The numbers of a request that overflowed stay in its blocks; the next owner of those must not notice."""
    lengths = [(1, 2), (1, 7), (1, 90), (1, 301), (6, 6), (4, 50)]
    expected = run(make_step(lengths, heads=4, kv_heads=2, stale=0.0), Scoring(0.25))

    overflowed = make_step([(1, 3), (5, 9)], heads=4, kv_heads=2)
    overflowed.key.fill_(bad)
    overflowed.value.fill_(bad)
    run(overflowed, Scoring(0.25))
    block, offset = int(overflowed.metadata.slot_blocks[0]), int(overflowed.metadata.slot_offsets[0])

    mark = 12345.0
    step = make_step(lengths, heads=4, kv_heads=2, stale=mark)
    for cache, left in (
        (step.metadata.keys[0], overflowed.metadata.keys),
        (step.metadata.values[0], overflowed.metadata.values),
    ):
        cache[cache == mark] = left[0][block, 0, offset, 0]
    assert torch.equal(run(step, Scoring(0.25)), expected)


def test_lengths_far_apart_do_not_pad_one_another() -> None:
    step = make_step([(1, 3), (1, 300), (1, 200), (1, 5)], heads=2, kv_heads=2)
    SdpaBackend().prepare(step.metadata)
    groups = step.metadata.plan.groups  # type: ignore[attr-defined]
    assert sorted(group.num_rows for group in groups) == [1, 1, 2]
    for group in groups:
        assert group.blocks.shape[1] * 4 < 2 * (int(group.positions.min()) + 1) + 64 + 4
