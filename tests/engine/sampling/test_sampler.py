"""sampler.py: a row's tokens depend on its own logits, parameters, seed, choice and position only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.sampler import GrammarRows, SampledTokens, Sampler, prompt_logprobs

CPU = torch.device("cpu")
VOCAB = 333  # neither a multiple of 32 nor of a vector width


@dataclass(frozen=True)
class Row:
    """One sequence: what it asked and what came before. grammar: [num_words] int32, the same in every step."""

    params: SamplingParams
    choice: int = 0
    prompt_ids: Sequence[int] = (1, 2, 3)
    output_ids: Sequence[int] = ()
    suppressed_ids: Sequence[int] = ()
    suppressed_until: int = 0
    want_logprobs: bool = False
    top_n_tokens: int = 0
    grammar: Tensor | None = None


def add(sampler: Sampler, slot: int, row: Row) -> None:
    asked = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    del asked["grammar"]
    sampler.add(slot, asked.pop("params"), **asked)


def step(
    sampler: Sampler, rows: Sequence[Row], slots: Sequence[int], logits: Tensor, positions: Sequence[int]
) -> SampledTokens:
    masked = [(i, row.grammar) for i, row in enumerate(rows) if row.grammar is not None]
    bitmask = None
    if masked:
        bitmask = GrammarRows(torch.tensor([i for i, _ in masked]), torch.stack([bits for _, bits in masked]))
    return sampler.sample(logits, slots, positions, bitmask)


def run(
    rows: Sequence[Row], logits: Tensor, slots: Sequence[int] | None = None, vocab_size: int = VOCAB
) -> list[list[int]]:
    """Token ids per row. logits: [num_steps, num_rows, at least vocab_size]."""
    slots = list(range(len(rows))) if slots is None else slots
    sampler = Sampler(vocab_size=vocab_size, num_slots=max(slots) + 1, device=CPU)
    for slot, row in zip(slots, rows, strict=True):
        add(sampler, slot, row)
    steps = [
        step(sampler, rows, slots, logits[i], [len(row.output_ids) + i for row in rows]).token_ids
        for i in range(len(logits))
    ]
    return torch.stack(steps, dim=1).tolist()


def random_logits(seed: int, *shape: int, spread: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def packed(allowed: Sequence[int], num_words: int) -> Tensor:
    words = [0] * num_words
    for token_id in allowed:
        words[token_id // 32] |= 1 << (token_id % 32)
    return torch.tensor([word - (1 << 32) if word >= 1 << 31 else word for word in words], dtype=torch.int32)


# ---- any row, in any company -----------------------------------------------------------------------------------------

IDS = st.integers(0, VOCAB - 1)
SAMPLING_PARAMS = st.builds(
    SamplingParams,
    do_sample=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([1e-9, 0.1, 0.7, 1.0, 1.5, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 50, 300, VOCAB, VOCAB + 5]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.5, 0.9, 0.999999]),
    typical_p=st.sampled_from([1.0, 1.0, 1e-9, 0.3, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 1e-4, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.2]),
    presence_penalty=st.sampled_from([0.0, 0.3, -1.0]),
    logit_bias=st.lists(st.tuples(IDS, st.sampled_from([-100.0, 2.5])), max_size=4).map(tuple),
    allowed_token_ids=st.one_of(st.none(), st.lists(IDS, min_size=1, max_size=40).map(tuple)),
    bad_words=st.lists(st.lists(IDS, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
    watermark=st.booleans(),
)
ROWS = st.builds(
    Row,
    params=SAMPLING_PARAMS,
    choice=st.integers(0, 3),
    prompt_ids=st.lists(IDS, min_size=1, max_size=6),
    suppressed_ids=st.lists(IDS, max_size=3),
    suppressed_until=st.integers(0, 3),
    want_logprobs=st.booleans(),
    top_n_tokens=st.integers(0, 5),
    grammar=st.one_of(st.none(), st.lists(IDS, min_size=1, max_size=200).map(lambda ids: packed(ids, 11))),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(ROWS, min_size=2, max_size=9),
    seed=st.integers(0, 2**32),
    padding=st.integers(0, 40),
    flat=st.booleans(),
    data=st.data(),
)
def test_every_row_equals_its_solo_run(
    rows: list[Row], seed: int, padding: int, flat: bool, data: st.DataObject
) -> None:
    logits = random_logits(seed, 3, len(rows), VOCAB + padding)
    if flat:  # many exact ties
        logits = logits.round()
    slots = data.draw(st.permutations(range(20)))[: len(rows)]
    together = run(rows, logits, slots)
    for i, row in enumerate(rows):
        assert together[i] == run([row], logits[:, i : i + 1, :VOCAB])[0]


def test_reported_logprobs_equal_those_alone() -> None:
    rows = [Row(SamplingParams(), want_logprobs=True, top_n_tokens=n) for n in (0, 3, 5)]
    rows.insert(1, Row(SamplingParams(do_sample=True, seed=1)))
    logits = random_logits(5, len(rows), VOCAB)
    sampler = Sampler(vocab_size=VOCAB, num_slots=8, device=CPU)
    for slot, row in enumerate(rows):
        add(sampler, slot, row)
        add(sampler, slot + 4, row)
    together = step(sampler, rows, range(4), logits, [0] * 4)
    assert together.logprobs is not None and together.top_ids is not None and together.top_logprobs is not None
    for i, row in enumerate(rows):
        alone = step(sampler, [row], [i + 4], logits[i : i + 1], [0])
        assert (alone.logprobs is not None) == row.want_logprobs
        if alone.logprobs is not None:
            assert together.logprobs[i] == alone.logprobs[0]
        if alone.top_ids is not None and alone.top_logprobs is not None:
            assert alone.top_ids.shape == (1, row.top_n_tokens)
            assert torch.equal(together.top_ids[i, : row.top_n_tokens], alone.top_ids[0])
            assert torch.equal(together.top_logprobs[i, : row.top_n_tokens], alone.top_logprobs[0])


FILTERED = [
    SamplingParams(do_sample=True, seed=1, top_p=0.5, temperature=1.5),
    SamplingParams(do_sample=True, seed=2, top_p=0.95),
    SamplingParams(do_sample=True, seed=3, top_p=0.95, min_p=0.02),
    SamplingParams(do_sample=True, seed=4, typical_p=0.3),
    SamplingParams(do_sample=True, seed=5, typical_p=0.95),
    SamplingParams(do_sample=True, seed=6, typical_p=0.5, top_p=0.9, min_p=0.05),
    SamplingParams(do_sample=True, seed=7, top_k=40, typical_p=0.5, top_p=0.9),
    SamplingParams(do_sample=True, seed=8, top_k=700),
    SamplingParams(do_sample=True, seed=9, top_k=3000, top_p=0.9),
    SamplingParams(do_sample=True, seed=10, min_p=0.2),
    SamplingParams(do_sample=True, seed=11, min_p=1e-6),
    SamplingParams(do_sample=True, seed=12, typical_p=0.9, min_p=0.5),
    SamplingParams(do_sample=True, seed=13, temperature=0.2, top_p=0.9),
]


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_few_candidates_give_what_a_whole_sort_gives(
    spread: float, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = random_logits(7, 4, len(FILTERED), 6000, spread=spread)
    logits = logits.round() if rounded else logits
    rows = [Row(params) for params in FILTERED]
    quick = run(rows, logits, vocab_size=6000)
    monkeypatch.setattr("textgen_engine.sampling.sampler._NUM_CANDIDATES", 6000)
    assert quick == run(rows, logits, vocab_size=6000)


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_seed_choice_and_position_all_matter() -> None:
    base = SamplingParams(do_sample=True, seed=5)
    rows = [
        Row(base),
        Row(dataclasses.replace(base, seed=6)),
        Row(base, choice=1),
        Row(base, output_ids=[0] * 40),
        Row(base),
    ]
    logits = torch.zeros((40, len(rows), VOCAB))
    tokens = run(rows, logits)
    assert tokens[0] == tokens[4]
    assert all(tokens[0] != other for other in tokens[1:4])
    assert len(set(tokens[0])) > 25


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_works(seed: int) -> None:
    logits = torch.zeros((20, 1, VOCAB))
    tokens = run([Row(SamplingParams(do_sample=True, seed=seed))], logits)[0]
    assert tokens == run([Row(SamplingParams(do_sample=True, seed=seed))], logits)[0]
    assert len(set(tokens)) > 10


def test_a_slot_used_again_starts_fresh() -> None:
    params = SamplingParams(
        do_sample=True, seed=3, repetition_penalty=2.0, presence_penalty=1.0, bad_words=((1, 2),), watermark=True
    )
    logits = random_logits(1, 6, 1, VOCAB)
    sampler = Sampler(vocab_size=VOCAB, num_slots=1, device=CPU)
    texts = []
    for _ in range(2):
        add(sampler, 0, Row(params))
        texts.append([step(sampler, [Row(params)], [0], logits[i], [i]).token_ids.item() for i in range(6)])
        sampler.remove(0)
    assert texts[0] == texts[1]


def test_preemption_changes_nothing() -> None:
    everything = SamplingParams(
        do_sample=True,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=0.2,
        bad_words=((1,), (2, 3), (4, 5, 6)),
        watermark=True,
        logit_bias=((9, 2.0),),
    )
    rows = [
        Row(
            dataclasses.replace(everything, seed=i, top_p=0.9 if i % 2 else 1.0),
            suppressed_ids=[7],
            suppressed_until=5,
        )
        for i in range(4)
    ]
    logits = random_logits(3, 8, len(rows), VOCAB)
    undisturbed = run(rows, logits)
    sampler = Sampler(vocab_size=VOCAB, num_slots=12, device=CPU)
    slots = [0, 1, 2, 3]
    for slot, row in zip(slots, rows, strict=True):
        add(sampler, slot, row)
    tokens: list[list[int]] = [[] for _ in rows]
    for i in range(8):
        if i in (2, 5):  # two of the four are preempted and come back in other slots
            for j in (1, 3):
                sampler.remove(slots[j])
            for j in (1, 3):
                slots[j] += 4
                add(sampler, slots[j], dataclasses.replace(rows[j], output_ids=list(tokens[j])))
        for j, token in enumerate(step(sampler, rows, slots, logits[i], [i] * 4).token_ids.tolist()):
            tokens[j].append(token)
    assert tokens == undisturbed


def test_rows_may_come_and_go_between_steps() -> None:
    rows = [Row(SamplingParams(do_sample=True, seed=i, frequency_penalty=0.5)) for i in range(3)]
    logits = random_logits(4, 3, 3, VOCAB)
    expected = run(rows, logits)
    sampler = Sampler(vocab_size=VOCAB, num_slots=3, device=CPU)
    for slot, row in enumerate(rows):
        add(sampler, slot, row)
    seen: list[list[int]] = [[], [], []]
    for batch in ([0, 1], [2], [2, 0], [1], [1, 2, 0]):
        positions = [len(seen[j]) for j in batch]
        part = torch.stack([logits[position, j] for position, j in zip(positions, batch, strict=True)])
        found = step(sampler, [rows[j] for j in batch], batch, part, positions)
        for j, token in zip(batch, found.token_ids.tolist(), strict=True):
            seen[j].append(token)
    assert seen == expected


# ---- masks and corners -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 64, 70])
@pytest.mark.parametrize("wider", [0, 1, 58])
def test_bitmask_layout(vocab_size: int, wider: int) -> None:
    num_words = -(-vocab_size // 32)
    logits = torch.full((1, vocab_size + wider), 0.0)
    logits[:, vocab_size:] = 1e9  # padding must never win
    for token_id in range(vocab_size):
        for sampled in (False, True):
            row = Row(SamplingParams(do_sample=sampled, seed=1), grammar=packed([token_id], num_words))
            assert run([row], logits[None], vocab_size=vocab_size) == [[token_id]]


def test_ids_beyond_the_bitmask_are_forbidden() -> None:
    logits = torch.arange(100.0)[None, None]
    row = Row(SamplingParams(), grammar=packed(range(64), 2))
    assert run([row], logits, vocab_size=100) == [[63]]


def test_bitmask_wider_than_the_vocabulary() -> None:
    row = Row(SamplingParams(), grammar=torch.full((20,), -1, dtype=torch.int32))
    assert run([row], torch.arange(40.0)[None, None], vocab_size=40) == [[39]]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(do_sample=True, seed=1),
        SamplingParams(do_sample=True, seed=1, temperature=1e-30),
        SamplingParams(do_sample=True, seed=1, top_k=5, top_p=0.5, typical_p=0.5, min_p=0.5),
        SamplingParams(do_sample=True, seed=1, typical_p=0.5),
        SamplingParams(do_sample=True, seed=1, top_p=1e-9),
        SamplingParams(do_sample=True, seed=1, min_p=1.0, repetition_penalty=1.5, frequency_penalty=2.0),
    ],
)
def test_one_allowed_token_is_chosen_whatever_the_filters(params: SamplingParams) -> None:
    logits = random_logits(2, 3, 1, VOCAB)
    logits[..., 200] = -1e4
    row = Row(dataclasses.replace(params, allowed_token_ids=(200,)))
    assert run([row], logits) == [[200] * 3]
    masked = Row(params, grammar=packed([200], 11))
    assert run([masked], logits) == [[200] * 3]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(allowed_token_ids=(5,)),
        SamplingParams(allowed_token_ids=(5,), do_sample=True, seed=1),
        SamplingParams(allowed_token_ids=(5,), do_sample=True, seed=1, top_p=0.9, typical_p=0.9),
    ],
)
def test_all_forbidden_gives_token_0_and_says_so(params: SamplingParams) -> None:
    rows = [Row(dataclasses.replace(params, bad_words=((5,),)), want_logprobs=True), Row(params)]
    sampler = Sampler(vocab_size=VOCAB, num_slots=2, device=CPU)
    for slot, row in enumerate(rows):
        add(sampler, slot, row)
    found = step(sampler, rows, [0, 1], random_logits(1, 2, VOCAB), [0, 0])
    assert found.token_ids.tolist() == [0, 5]
    assert found.exhausted is not None and found.exhausted.tolist() == [True, False]
    assert found.logprobs is not None and not found.logprobs.isnan().any()


def test_logits_are_left_unchanged() -> None:
    logits = random_logits(1, 2, VOCAB)
    before = logits.clone()
    sampler = Sampler(vocab_size=VOCAB, num_slots=2, device=CPU)
    params = SamplingParams(do_sample=True, seed=1, repetition_penalty=2.0, logit_bias=((1, 5.0),), watermark=True)
    rows = [Row(params), Row(params)]
    for slot, row in enumerate(rows):
        add(sampler, slot, row)
    step(sampler, rows, [0, 1], logits, [0, 0])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    logits = random_logits(1, 2, 1, VOCAB).to(dtype)
    row = Row(SamplingParams(do_sample=True, seed=1, top_p=0.9))
    assert run([row], logits) == run([row], logits.float())


def test_suppressed_ids_until_their_position() -> None:
    logits = torch.zeros((4, 1, VOCAB))
    logits[..., [7, 8, 9]] = torch.tensor([3.0, 2.0, 1.0])
    row = Row(SamplingParams(), suppressed_ids=[7, 8], suppressed_until=2)
    assert run([row], logits) == [[9, 9, 7, 7]]


def test_greedy_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros((1, 2, VOCAB))
    logits[..., [50, 60]] = 4.0
    params = SamplingParams(do_sample=True, seed=9, top_k=1)
    assert run([Row(SamplingParams()), Row(params)], logits) == [[50], [50]]


def test_errors_of_the_caller() -> None:
    sampler = Sampler(vocab_size=VOCAB, num_slots=2, device=CPU)
    add(sampler, 0, Row(SamplingParams()))
    with pytest.raises(ValueError, match="slot 0 is taken"):
        add(sampler, 0, Row(SamplingParams()))
    with pytest.raises(ValueError, match="between 0 and 1; given: 2"):
        add(sampler, 2, Row(SamplingParams()))
    with pytest.raises(ValueError, match="seed"):
        add(sampler, 1, Row(SamplingParams(do_sample=True)))
    with pytest.raises(ValueError, match="twice"):
        sampler.sample(torch.zeros((2, VOCAB)), [0, 0], [0, 0])


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(8, 1, VOCAB + 3)
    sampler = Sampler(vocab_size=VOCAB, num_slots=1, device=CPU)
    params = SamplingParams(do_sample=True, seed=1, temperature=0.3, top_k=5, logit_bias=((17, 50.0),))
    add(sampler, 0, Row(params, want_logprobs=True))
    found = sampler.sample(logits, [0], [0])
    assert found.token_ids.tolist() == [17]
    assert found.logprobs is not None and found.top_ids is None
    assert found.logprobs[0] == torch.log_softmax(logits[:, :VOCAB], -1)[0, 17]


def test_top_n_are_exactly_n_with_ties_by_id() -> None:
    logits = torch.zeros((1, VOCAB))
    logits[0, [9, 100, 30]] = 2.0
    sampler = Sampler(vocab_size=VOCAB, num_slots=1, device=CPU)
    add(sampler, 0, Row(SamplingParams(), top_n_tokens=5))
    found = sampler.sample(logits, [0], [0])
    assert found.top_ids is not None and found.top_logprobs is not None and found.logprobs is not None
    assert found.top_ids.tolist() == [[9, 30, 100, 0, 1]]
    assert found.token_ids.tolist() == [9]
    assert found.top_logprobs[0, 0] == found.logprobs[0]


def test_prompt_logprobs_in_chunks() -> None:
    logits, targets = random_logits(9, 10, VOCAB), torch.arange(10)
    whole = prompt_logprobs(logits, targets, 3)
    expected = torch.log_softmax(logits, -1)
    assert torch.equal(whole.logprobs, expected[torch.arange(10), targets])
    assert whole.top_ids is not None and torch.equal(whole.top_ids, expected.topk(3).indices)
    parts = [prompt_logprobs(logits[i : i + 3], targets[i : i + 3], 3) for i in range(0, 10, 3)]
    assert torch.equal(whole.logprobs, torch.cat([part.logprobs for part in parts]))
    assert prompt_logprobs(logits, targets, 0).top_ids is None
