"""penalties.py and filters.py against transformers' logits processors, and OpenAI's formula in plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from textgen_engine.sampling.filters import Filters, candidates, needs_mass, weigh
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.penalties import Penalties
from textgen_engine.sampling.randomness import hashed_ids
from textgen_engine.sampling.rows import RowSet

CPU = torch.device("cpu")
VOCAB = 211
PROMPT = (3, 4, 5, 3, 8)
OUTPUT = (9, 9, 10, 4, 9)


def random_logits(num_rows: int, spread: float = 3.0) -> Tensor:
    return torch.randn((num_rows, VOCAB), generator=torch.Generator().manual_seed(11)) * spread


def penalized(
    params: Sequence[SamplingParams], logits: Tensor, output_ids: Sequence[int] = OUTPUT, counted: Sequence[int] = ()
) -> Tensor:
    """Logits after penalties.py; `counted` are tokens produced one by one after the slots were added."""
    penalties = Penalties(
        vocab_size=VOCAB,
        device=CPU,
        watermark_gamma=0.5,
        watermark_delta=2.0,
        id_hashes=hashed_ids(VOCAB, CPU),
    )
    slots = list(range(len(params)))
    for slot, one in zip(slots, params, strict=True):
        penalties.add(slot, one, prompt_ids=PROMPT, output_ids=output_ids, suppressed_ids=(), suppressed_until=0)
    plan = penalties.plan(slots)
    for token_id in counted:
        penalties.count(plan, torch.full((len(slots),), token_id))
    edited = logits.clone()
    penalties.apply(edited, plan, np.full(len(slots), len(output_ids) + len(counted), dtype=np.int64))
    return edited


def filtered(params: Sequence[SamplingParams], logits: Tensor, count: int = VOCAB) -> Tensor:
    """Logits over temperature, minus the largest, -inf where filters.py takes a token out. [n, vocab] float32."""
    filters = Filters.of(params, VOCAB, CPU)
    needing = RowSet([i for i, one in enumerate(params) if needs_mass(one, VOCAB)], len(params), CPU)
    found = candidates(logits, filters, weigh(logits, filters, needing), count)
    assert found.decided.all()
    whole = torch.full(logits.shape, -torch.inf, dtype=torch.float64)
    return whole.scatter_(1, found.ids, found.scaled).float()


HISTORY = torch.tensor([[*PROMPT, *OUTPUT]])


# Every option below is checked in a batch whose other rows use other options.
NEIGHBOURS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.7, presence_penalty=0.5, watermark=True, logit_bias=((3, 9.0),)),
    SamplingParams(repetition_penalty=0.6, frequency_penalty=1.5, allowed_token_ids=(1, 2, 3)),
    SamplingParams(bad_words=((9, 1), (2,), (4, 9, 9)), logit_bias=((4, -9.0),)),
]


def among_neighbours(params: SamplingParams, logits: Tensor) -> Tensor:
    """The row of `params`, computed in the middle of a batch and alone; both must be the same bits."""
    batch = random_logits(5)
    batch[2] = logits
    row = penalized([*NEIGHBOURS[:2], params, *NEIGHBOURS[2:]], batch)[2]
    assert torch.equal(row, penalized([params], logits[None])[0])
    return row


@pytest.mark.parametrize("penalty", [0.3, 0.9, 1.1, 1.3, 5.0])
def test_repetition_penalty(penalty: float) -> None:
    logits = random_logits(1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(HISTORY, logits.clone())[0]
    found = among_neighbours(SamplingParams(repetition_penalty=penalty), logits[0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    untouched = [i for i in range(VOCAB) if i not in {*PROMPT, *OUTPUT}]
    assert torch.equal(found[untouched], logits[0, untouched])


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 0.7), (2.0, -2.0), (-0.3, 1.1)])
def test_frequency_and_presence_penalty_are_openais(frequency: float, presence: float) -> None:
    logits = random_logits(1)[0]
    expected = logits.tolist()
    for token_id, count in Counter(OUTPUT).items():  # the prompt does not count
        expected[token_id] -= count * frequency + (count > 0) * presence
    found = among_neighbours(SamplingParams(frequency_penalty=frequency, presence_penalty=presence), logits)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_counting_step_by_step_equals_starting_with_the_output() -> None:
    params = [
        SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.2, watermark=True),
        SamplingParams(),
        SamplingParams(bad_words=((10, 4, 9, 7),), repetition_penalty=0.7),
    ]
    logits = random_logits(3)
    assert torch.equal(penalized(params, logits), penalized(params, logits, output_ids=(), counted=OUTPUT))


@pytest.mark.parametrize(
    "words", [((7,),), ((4, 9, 7),), ((9, 7), (9, 8)), ((7,), (10, 4, 9, 7)), ((4, 7),), ((3, 8, 9, 9, 10, 4, 9, 6),)]
)
def test_bad_words(words: tuple[tuple[int, ...], ...]) -> None:
    logits = random_logits(1)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    expected = processor(HISTORY, logits.clone())[0]
    assert torch.equal(among_neighbours(SamplingParams(bad_words=words), logits[0]), expected)


def test_bad_words_reach_back_into_the_prompt() -> None:
    logits = random_logits(1)
    words = ((3, 8, 7), (8, 6))
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    expected = processor(torch.tensor([PROMPT]), logits.clone())
    assert torch.equal(penalized([SamplingParams(bad_words=words)], logits, output_ids=()), expected)


def test_logit_bias() -> None:
    logits = random_logits(1)
    biases = ((3, 5.0), (9, -100.0), (200, 0.25))
    processor = SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in biases])
    expected = processor(HISTORY, logits.clone())[0]
    assert torch.equal(among_neighbours(SamplingParams(logit_bias=biases), logits[0]), expected)


def test_allowed_token_ids() -> None:
    logits = random_logits(1)
    allowed = (1, 2, 77, 210)
    forbidden = [i for i in range(VOCAB) if i not in allowed]
    expected = SuppressTokensLogitsProcessor(forbidden)(HISTORY, logits.clone())[0]
    assert torch.equal(among_neighbours(SamplingParams(allowed_token_ids=allowed), logits[0]), expected)


def test_ids_that_the_model_does_not_have_are_no_error() -> None:
    logits = random_logits(1)
    params = SamplingParams(
        logit_bias=((VOCAB, 1.0),), bad_words=((VOCAB + 1,), (1, VOCAB)), allowed_token_ids=(*range(VOCAB), VOCAB + 2)
    )
    assert torch.equal(penalized([params], logits, output_ids=[VOCAB + 7]), logits)


def reference(params: SamplingParams, logits: Tensor) -> Tensor:
    """transformers' warpers in our order, on a row."""
    warpers = [TemperatureLogitsWarper(params.temperature)] if params.temperature != 1.0 else []
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1.0 else []
    warpers += [TypicalLogitsWarper(params.typical_p)] if params.typical_p < 1.0 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p > 0.0 else []
    scores = logits[None].clone()
    for warper in warpers:
        scores = warper(HISTORY, scores)
    return scores[0]


FILTERS = [
    SamplingParams(),
    *(SamplingParams(top_k=k) for k in (1, 2, 17, VOCAB - 1, VOCAB)),
    *(SamplingParams(top_p=p) for p in (1e-6, 0.1, 0.5, 0.9, 0.999)),
    *(SamplingParams(typical_p=p) for p in (1e-6, 0.1, 0.5, 0.9, 0.999)),
    *(SamplingParams(min_p=p) for p in (1e-5, 0.01, 0.3, 1.0)),
    *(SamplingParams(temperature=t, top_p=0.8) for t in (0.3, 0.9, 2.5)),
    SamplingParams(top_k=30, top_p=0.8),
    SamplingParams(top_k=30, typical_p=0.8),
    SamplingParams(top_p=0.9, typical_p=0.6, temperature=1.4),
    SamplingParams(typical_p=0.3, min_p=0.2),
    SamplingParams(top_p=0.9, min_p=0.05),
    SamplingParams(temperature=0.8, top_k=50, top_p=0.95, typical_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("forbid", [False, True])
def test_filters_together_agree_with_transformers(spread: float, forbid: bool) -> None:
    logits = random_logits(len(FILTERS), spread)
    if forbid:
        logits[:, 50:] = -torch.inf
    found = filtered(FILTERS, logits)
    for i, params in enumerate(FILTERS):
        expected = reference(params, logits[i])
        assert torch.equal(found[i].isneginf(), expected.isneginf()), params
        torch.testing.assert_close(found[i].softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-7)
        assert torch.equal(found[i], filtered([params], logits[i : i + 1])[0])


def test_top_k_keeps_exactly_k_at_a_tie() -> None:
    logits = torch.zeros((1, VOCAB))
    kept = filtered([SamplingParams(top_k=7)], logits).isfinite()[0].nonzero()[:, 0]
    assert kept.tolist() == list(range(7))


def test_top_p_at_an_exact_border() -> None:
    logits = torch.zeros((4, VOCAB))
    logits[:, 8:] = -torch.inf
    params = [SamplingParams(top_p=p) for p in (0.5, 0.5001, 0.125, 1e-12)]
    assert filtered(params, logits).isfinite().sum(-1).tolist() == [4, 5, 1, 1]


@pytest.mark.parametrize("count", [1, 4, 40, 150])
def test_undecided_rows_say_so(count: int) -> None:
    """Where `decided`, few candidates give what all give."""
    for spread in (0.01, 1.0, 4.0):
        logits = random_logits(len(FILTERS), spread)
        filters = Filters.of(FILTERS, VOCAB, CPU)
        needing = RowSet([i for i, one in enumerate(FILTERS) if needs_mass(one, VOCAB)], len(FILTERS), CPU)
        mass = weigh(logits, filters, needing)
        few, every = candidates(logits, filters, mass, count), candidates(logits, filters, mass, VOCAB)
        assert every.decided.all()
        for i in few.decided.nonzero()[:, 0]:
            assert torch.equal(few.scaled[i], every.scaled[i, :count])
            assert every.scaled[i, count:].isneginf().all()
