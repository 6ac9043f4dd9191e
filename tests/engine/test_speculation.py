"""Tokens guessed ahead change the speed and nothing else: every answer equals the one without guesses, to the token.

Random models seldom repeat themselves, so beside the real lookup there is an oracle: it guesses from the answer known
beforehand, spoilt here and there, so that every number of guesses comes true in some step.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from textgen_engine.adapters.spec import AdapterSpec
from textgen_engine.config import LoraConfig
from textgen_engine.request import GenerationRequest, OutputParams, StoppingParams
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sequence import Sequence
from textgen_engine.speculation import Speculator

from .adapters.folders import linear_sizes, save_adapter
from .test_random_parameters import (
    GRAMMARS,
    TIGHT,
    Arrival,
    assert_equal_to_solo,
    configure,
    random_crowd,
    run_alone,
    run_crowd,
)
from .tiny import VOCAB_SIZE, Answer, Harness, make_config, make_request, script_logits

NewEngine = Callable[..., Harness]


@pytest.fixture
def engines() -> Iterator[list[Harness]]:
    opened: list[Harness] = []
    yield opened
    for harness in opened:
        harness.close()


def opened(engines: list[Harness], *arguments: Any, **options: Any) -> Harness:
    engines.append(Harness(configure(*arguments, **options)))
    return engines[-1]


def consult(harness: Harness, solo: dict[str, Answer], rng: random.Random, most: int = 4) -> None:
    """Let the engine guess what the solo run said, one token in five wrong."""

    def guess(sequence: Sequence, room: int) -> tuple[int, ...]:
        told = solo[sequence.request.request_id].ids(sequence.choice)
        coming = told[sequence.num_output_tokens :][: min(most, room)]
        return tuple(rng.randrange(VOCAB_SIZE) if rng.random() < 0.2 else token_id for token_id in coming)

    harness.engine._steps._speculator.guess = guess  # type: ignore[method-assign]
    harness.engine._steps._speculator.note = lambda *_: None  # type: ignore[method-assign]


def counts(harness: Harness) -> tuple[int, int]:
    """Tokens guessed, and how many of them came true."""
    steps = [report.metrics for report in harness.reports if report.metrics]
    return sum(step.num_guessed_tokens for step in steps), sum(step.num_guessed_right for step in steps)


# ---- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "jump_forward"), [(10, True), (11, False)], ids=["jump-forward", "token by token"])
def test_random_crowds_equal_their_solo_runs_without_guesses(
    engines: list[Harness], llama: Path, seed: int, jump_forward: bool
) -> None:
    """Parameters, grammars, ends and cancellations of every kind, with room and without."""
    crowd = random_crowd(seed, 24, GRAMMARS)
    solo = run_alone(opened(engines, llama, prefix_caching=False, jump_forward=jump_forward), crowd)
    for options in ({}, TIGHT):
        guessing = opened(engines, llama, guesses=4, jump_forward=jump_forward, **options)
        consult(guessing, solo, random.Random(seed))
        answers = run_crowd(guessing, crowd)
        assert_equal_to_solo(crowd, answers, solo)
        num_guessed, num_right = counts(guessing)
        assert num_guessed > num_right > 40, "guesses must have been right, and wrong"
        assert (guessing.num_preemptions > 0) == bool(options)
        for arrival in crowd:  # what is reported of each token is the same, too
            name = arrival.request.request_id
            if answers[name].error is None and solo[name].error is None:
                assert answers[name].details() == solo[name].details(), arrival.request


def test_the_lookup_in_a_crowd(engines: list[Harness], llama: Path) -> None:
    """With prompts that repeat themselves, so that something is found."""
    rng = random.Random(3)
    crowd = []
    for index in range(10):
        phrase = [rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randint(2, 6))]
        sampling = SamplingParams(
            do_sample=index % 2 == 1,
            seed=index,
            allowed_token_ids=tuple(phrase),
            repetition_penalty=rng.choice([1.0, 1.1]),
            frequency_penalty=rng.choice([0.0, 0.2]),
            watermark=index % 5 == 4,
        )
        request = make_request(f"r{index}", phrase * 4, 40, sampling=sampling, arrival_s=time.monotonic())
        crowd.append(Arrival(request, rng.randrange(10)))
    solo = run_alone(opened(engines, llama, prefix_caching=False), crowd)
    for options in ({}, TIGHT):
        guessing = opened(engines, llama, guesses=5, **options)
        assert_equal_to_solo(crowd, run_crowd(guessing, crowd), solo)
        num_guessed, num_right = counts(guessing)
        assert num_guessed > num_right > 20


def test_with_adapters(new_engine: NewEngine, llama: Path, tmp_path: Path) -> None:
    sizes = linear_sizes(llama)
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / name, sizes, ["q_proj", "down_proj", "lm_head"], seed=seed)
    lora = LoraConfig(tuple(AdapterSpec(name, str(tmp_path / name)) for name in "ab"))
    rng = random.Random(1)
    prompts = [[rng.randrange(2, VOCAB_SIZE) for _ in range(20)] for _ in range(6)]
    names = ("a", "b", None)
    requests = [make_request(f"r{row}", prompt, 24, adapter_id=names[row % 3]) for row, prompt in enumerate(prompts)]
    plain = new_engine(lora=lora).run(requests)
    guessing = new_engine(lora=lora, guesses=4)
    consult(guessing, plain, rng)
    answers = guessing.run(requests)
    assert [answer.ids() for answer in answers.values()] == [answer.ids() for answer in plain.values()]
    assert counts(guessing)[1] > 40


# ---- what it does to steps, cache and counts -----------------------------------------------------------------------


def repeating(harness: Harness) -> None:
    """A model that says 10 11 12 13 14 10 11 ..., whatever the prompt."""
    script_logits(harness, lambda token_id, _: 10 + (token_id - 9) % 5 if 10 <= token_id < 15 else 10)


def test_a_text_that_repeats_takes_fewer_steps(new_engine: NewEngine) -> None:
    harness = new_engine(guesses=4)
    repeating(harness)
    request = make_request("r", [3, 4, 5], 60, output=OutputParams(token_details=True, logprobs=True))
    answer = harness.run_alone(request)
    assert answer.ids() == [10 + index % 5 for index in range(60)]
    assert len(answer.details()) == 60
    steps = [report for report in harness.reports if report.metrics and report.metrics.batch_size]
    assert len(steps) < 60 / 3
    last = answer.outputs[-1]
    assert (last.num_guessed_tokens, last.num_guessed_right) == counts(harness)
    assert last.num_guessed_tokens == last.num_guessed_right, "it says just what was guessed"
    assert max(len(output.token_ids) for output in answer.outputs) == 5
    plain = new_engine()
    repeating(plain)
    assert plain.run_alone(request).text() == answer.text()
    assert counts(plain) == (0, 0) and plain.answers["r"].outputs[-1].num_guessed_tokens == 0


@pytest.mark.parametrize(
    ("stopping", "num_tokens"),
    [
        (StoppingParams(), 23),
        (StoppingParams(stop_token_ids=(13,), min_new_tokens=17), 20),
        (StoppingParams(stop_token_ids=(12,), min_new_tokens=30), 23),
    ],
)
def test_ends_in_the_midst_of_guesses(new_engine: NewEngine, stopping: StoppingParams, num_tokens: int) -> None:
    texts = []
    for guesses in (0, 4):
        harness = new_engine(guesses=guesses)
        repeating(harness)
        answer = harness.run_alone(make_request("r", [3, 4, 5], 23, stopping=stopping))
        texts.append((answer.ids(), answer.text(), answer.reason()))
    assert texts[0] == texts[1]
    assert len(texts[0][0]) == num_tokens


def test_accepted_guesses_are_in_the_prefix_cache(new_engine: NewEngine) -> None:
    """Their blocks hold the right keys and values: what continues from them says the same."""
    rng = random.Random(4)
    prompt = [rng.randrange(2, VOCAB_SIZE) for _ in range(20)]
    plain = new_engine(block_size=4)
    solo = plain.run([make_request("r", prompt, 40, ignore_eos_token=True)])
    guessing = new_engine(block_size=4, guesses=4)
    consult(guessing, solo, rng)
    text = guessing.run_alone(make_request("r", prompt, 40, ignore_eos_token=True)).ids()
    assert text == solo["r"].ids()
    again = make_request("again", [*prompt, *text], 20, ignore_eos_token=True)
    solo["again"] = plain.run_alone(again)
    answer = guessing.run_alone(again)
    assert answer.ids() == solo["again"].ids()
    assert answer.outputs[0].num_cached_tokens >= 56 - 4


def test_guesses_yield_to_rows_that_are_sure(new_engine: NewEngine) -> None:
    """Neither the token budget nor the bound on rows is passed, and nobody waits for a guess."""
    harness = new_engine(guesses=8, tokens_per_step=16, max_sequences=12)
    repeating(harness)
    harness.submit(*(make_request(f"r{index}", [3, 4, index + 20], 30) for index in range(12)))
    most = 0
    schedule = harness.engine._scheduler.schedule

    def watched() -> Any:
        nonlocal most
        batch = schedule()
        most = max(most, batch.num_tokens)
        return batch

    harness.engine._scheduler.schedule = watched  # type: ignore[method-assign]
    harness.until_idle()
    assert most == 16
    assert all(len(answer.ids()) == 30 for answer in harness.answers.values())


# ---- the lookup ----------------------------------------------------------------------------------------------------


def sequence_of(*token_ids: int) -> Sequence:
    return Sequence(GenerationRequest("r", tuple(token_ids)))


def test_guesses() -> None:
    speculator = Speculator(4)
    assert speculator.guess(sequence_of(1, 2, 3, 4, 5, 6, 7, 1, 2, 3), 10) == (4, 5, 6, 7)
    assert speculator.guess(sequence_of(1, 2, 3, 4, 5, 6, 7, 1, 2, 3), 2) == (4, 5)
    assert speculator.guess(sequence_of(1, 2, 3, 4, 5, 6, 7, 1, 2, 3), 0) == ()
    assert speculator.guess(sequence_of(1, 2, 5, 1, 2, 6, 9, 1, 2), 10) == (6, 9, 1, 2), "the latest occurrence"
    assert speculator.guess(sequence_of(8, 1, 2, 5, 9, 1, 2, 6, 8, 1, 2), 1) == (5,), "the longer n-gram"
    assert speculator.guess(sequence_of(7, 1, 2, 1, 2), 10) == (1, 2, 1, 2), "a text that repeats itself goes on so"
    for nothing in (sequence_of(1), sequence_of(1, 1), sequence_of(1, 2, 3, 4), sequence_of(4, 1, 2, 4, 1, 3, 1)):
        assert speculator.guess(nothing, 10) == ()


def test_guesses_follow_a_growing_sequence() -> None:
    """What was indexed stays valid; the n-grams of new tokens join it."""
    rng = random.Random(0)
    speculator = Speculator(3)
    sequence = sequence_of(1, 2)
    for _ in range(300):
        fresh = Sequence(sequence.request, token_ids=list(sequence.token_ids))
        assert speculator.guess(sequence, 10) == Speculator(3).guess(fresh, 10)
        sequence.token_ids += [rng.randrange(5) for _ in range(rng.randint(1, 3))]


def test_wrong_guesses_make_fewer() -> None:
    speculator = Speculator(8)
    sequence = sequence_of(*range(1, 20), 1, 2, 3)

    def num_guesses() -> int:
        return len(speculator.guess(sequence, 100))

    assert num_guesses() == 8
    lengths = []
    for num_right in (0, 0, 0, 0, 1, 2, 2, 8, 5):
        guessed = num_guesses()
        lengths.append(guessed)
        speculator.note(sequence, guessed, min(num_right, guessed))
    assert lengths == [8, 4, 2, 1, 1, 2, 4, 4, 8]
    assert num_guesses() == 8
    speculator.forget(sequence)
    assert num_guesses() == 8


def test_off_by_default(llama: Path) -> None:
    assert not Speculator(make_config(llama).scheduler.num_guesses).is_on
