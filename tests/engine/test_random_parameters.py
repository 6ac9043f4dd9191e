"""Random requests in random company: every row equals its solo run.

A crowd of requests with parameters of every kind arrives at random steps, some are cancelled on the way, in engines
that batch, chunk, share prefixes and preempt. Each request's tokens, texts, ends and seeds must be those it gets alone
in an engine that does none of this. The crowds are drawn from fixed seeds, so a failure repeats. The engines are
batch-invariant: otherwise a crowd of thousands of tokens now and then holds one that stands at the border of a filter
(min_p, top_p) to the seventh digit, and the order of a sum decides.
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from textgen_engine.config import EngineConfig
from textgen_engine.errors import Cancelled
from textgen_engine.grammar import GrammarSpec
from textgen_engine.request import FinishReason, GenerationRequest, OutputParams, StoppingParams
from textgen_engine.sampling.params import SamplingParams

from .tiny import EOS_ID, VOCAB_SIZE, Answer, Harness, make_config, make_request

LLGUIDANCE = "llguidance"
REGEXES = [
    "(the|quick|brown)( (fox|lazy dog)){1,3}",
    "[a-f]{3,12}",
    "a stream of [0-9]{2}(\\.[0-9])? tokens",
    ".{0,20}",
]
GRAMMARS = [GrammarSpec("regex", pattern, LLGUIDANCE) for pattern in REGEXES] + [
    GrammarSpec("choice", '["text","tokens","the quick brown fox"]', LLGUIDANCE),
    GrammarSpec(
        "json_schema",
        '{"type":"object","properties":{"stream":{"enum":["text","tokens"]},"dog":{"type":"boolean"}},'
        '"required":["stream","dog"],"additionalProperties":false}',
        LLGUIDANCE,
        "none",
    ),
]
# Prompts begin with one of these, so that the prefix cache has something to find.
_rng = random.Random(2024)
PREFIXES = [[_rng.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in (0, 16, 37, 48)]
MAX_TOTAL = 110
TIGHT: dict[str, Any] = {"block_size": 4, "num_blocks": 36, "tokens_per_step": 24, "max_sequences": 6}


@dataclass(frozen=True)
class Arrival:
    """A request, the step it arrives at, and the one it is cancelled at, if any."""

    request: GenerationRequest
    step: int
    cancel_step: int | None = None


def configure(model: Path, *, jump_forward: bool = True, **options: Any) -> EngineConfig:
    config = make_config(model, max_total_tokens=MAX_TOTAL, batch_invariant=True, **options)
    return replace(config, grammar=replace(config.grammar, jump_forward=jump_forward))


@pytest.fixture
def engines() -> Iterator[list[Harness]]:
    """Engines to be closed when the test ends."""
    opened: list[Harness] = []
    yield opened
    for harness in opened:
        harness.close()


def opened(engines: list[Harness], config: EngineConfig) -> Harness:
    engines.append(Harness(config))
    return engines[-1]


# ---- crowds --------------------------------------------------------------------------------------------------------


def some_ids(rng: random.Random, most: int) -> tuple[int, ...]:
    return tuple(rng.sample(range(2, VOCAB_SIZE), rng.randint(1, most)))


def random_sampling(rng: random.Random) -> SamplingParams:
    """Each option is off in most requests, so that all of them meet in some."""

    def one_of(off: Any, *values: Any) -> Any:
        return rng.choice(values) if rng.random() < 0.35 else off

    allowed = (EOS_ID, *some_ids(rng, 300)) if rng.random() < 0.15 else None
    biases = tuple(sorted((token_id, rng.uniform(-20, 4)) for token_id in some_ids(rng, 8)))
    return SamplingParams(
        do_sample=rng.random() < 0.7,
        seed=rng.choice([0, 1, 2**63, rng.randrange(2**64)]),
        temperature=one_of(1.0, 0.2, 0.8, 1.7),
        top_k=one_of(0, 1, 7, 100, VOCAB_SIZE),
        top_p=one_of(1.0, 0.2, 0.9),
        typical_p=one_of(1.0, 0.3, 0.95),
        min_p=one_of(0.0, 0.02, 0.2),
        repetition_penalty=one_of(1.0, 0.8, 1.4),
        frequency_penalty=one_of(0.0, -0.6, 1.1),
        presence_penalty=one_of(0.0, -0.4, 1.5),
        logit_bias=one_of((), biases),
        allowed_token_ids=allowed,
        bad_words=one_of((), (some_ids(rng, 2), some_ids(rng, 3))),
        watermark=rng.random() < 0.15,
    )


def random_request(rng: random.Random, request_id: str, grammars: list[GrammarSpec]) -> GenerationRequest:
    """One request; grammars: those to choose from, for about a third of the requests."""
    prompt = [*rng.choice(PREFIXES), *(rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randint(1, 30)))]
    sampling = random_sampling(rng)
    n = rng.choice([1, 1, 1, 2, 3]) if sampling.do_sample else 1
    best_of = rng.randint(n, 3) if sampling.do_sample and rng.random() < 0.3 else n
    max_new_tokens = rng.randint(1, 30)
    stopping = StoppingParams(
        min_new_tokens=rng.choice([0, 0, rng.randint(0, max_new_tokens)]),
        stop=tuple(rng.sample(["e", "th", " a", "ck b", "of t", "xyz"], rng.choice([0, 0, 1, 3]))),
        stop_token_ids=some_ids(rng, 12) if rng.random() < 0.2 else (),
        ignore_eos_token=rng.random() < 0.3,
        include_stop_str_in_output=rng.random() < 0.5,
    )
    output = OutputParams(
        logprobs=rng.random() < 0.3,
        top_n_tokens=rng.choice([0, 0, 0, 3]),
        prompt_logprobs=rng.random() < 0.15,
        token_details=rng.random() < 0.3,
    )
    return make_request(
        request_id,
        prompt,
        max_new_tokens,
        sampling=sampling,
        stopping=stopping,
        output=output,
        n=n,
        best_of=best_of,
        bad_words=("dog",) if rng.random() < 0.1 else (),
        grammar=rng.choice(grammars) if grammars and rng.random() < 0.35 else None,
        priority=rng.choice([0, 0, -5, 5]),
        arrival_s=time.monotonic(),
        stream=rng.random() < 0.5,
    )


def random_crowd(seed: int, count: int, grammars: list[GrammarSpec]) -> list[Arrival]:
    rng = random.Random(seed)
    crowd = []
    for index in range(count):
        step = rng.randrange(20)
        cancel_step = step + rng.randrange(10) if rng.random() < 0.3 else None
        crowd.append(Arrival(random_request(rng, f"r{index}", grammars), step, cancel_step))
    return crowd


# ---- runs ----------------------------------------------------------------------------------------------------------


def step_until_answered(harness: Harness, timeout_s: float = 120.0) -> None:
    """Grammars compile beside the loop, so that steps without work may come in between."""
    late_s = time.monotonic() + timeout_s
    while not all(answer.num_last for answer in harness.answers.values()):
        assert time.monotonic() < late_s, "never answered"
        if not harness.engine.step():
            time.sleep(0.001)
        harness.engine.check_integrity()
    harness.until_idle()


def run_crowd(harness: Harness, crowd: list[Arrival]) -> dict[str, Answer]:
    for step in range(max(max(arrival.step, arrival.cancel_step or 0) for arrival in crowd) + 1):
        harness.submit(*(arrival.request for arrival in crowd if arrival.step == step))
        for arrival in crowd:
            if arrival.cancel_step == step:
                harness.engine.cancel(arrival.request.request_id)
        harness.step()
    step_until_answered(harness)
    return harness.answers


def run_alone(harness: Harness, crowd: list[Arrival]) -> dict[str, Answer]:
    for arrival in crowd:
        harness.submit(arrival.request)
        step_until_answered(harness)
    return harness.answers


def told(answer: Answer, num_choices: int) -> list[Any]:
    """All that must not depend on the company: tokens, text, end and seed of each choice, or the error."""
    if answer.error is not None:
        return [type(answer.error), str(answer.error)]
    ends = {output.choice: output for output in answer.outputs if output.finish_reason is not None}
    return [
        (answer.ids(choice), answer.text(choice), answer.reason(choice), ends[choice].seed, ends[choice].warnings)
        for choice in range(num_choices)
    ]


def assert_equal_to_solo(crowd: list[Arrival], answers: dict[str, Answer], solo: dict[str, Answer]) -> int:
    """Compare every answer; a cancelled one is a beginning of its solo run. Returns how many were cut short."""
    num_cut = 0
    for arrival in crowd:
        request = arrival.request
        answer, alone = answers[request.request_id], solo[request.request_id]
        num_choices = max(request.n, request.best_of)
        if isinstance(answer.error, Cancelled):
            assert arrival.cancel_step is not None
            num_cut += 1
            for choice in range(num_choices):
                # A request that fails on its own account may be cancelled before it comes to that.
                beginning = alone.ids(choice)[: len(answer.ids(choice))]
                assert answer.ids(choice) == beginning, request
                assert alone.text(choice).startswith(answer.text(choice)), request
        else:
            assert told(answer, num_choices) == told(alone, num_choices), request
    return num_cut


# ---- tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_every_row_equals_its_solo_run(engines: list[Harness], llama: Path, seed: int) -> None:
    """In a roomy engine and in one where all is scarce: slots, blocks, and tokens in a step. Steps overlap in both, but
    not in the solo run."""
    crowd = random_crowd(seed, 24, GRAMMARS)
    solo = run_alone(opened(engines, configure(llama, prefix_caching=False)), crowd)
    succeeded = [arrival for arrival in crowd if solo[arrival.request.request_id].error is None]
    assert len(succeeded) > 16, "most of the requests must make sense"
    roomy = opened(engines, configure(llama, overlap=True))
    assert_equal_to_solo(crowd, run_crowd(roomy, crowd), solo)
    tight = opened(engines, configure(llama, **TIGHT, overlap=seed != 1))
    answers = run_crowd(tight, crowd)
    assert assert_equal_to_solo(crowd, answers, solo) > 0, "some must be cut short"
    assert tight.num_preemptions > 0, "the cache was meant to be too small"
    assert sum(output.num_cached_tokens for answer in answers.values() for output in answer.outputs) > 0


@pytest.mark.parametrize("jump_forward", [True, False], ids=["jump-forward", "token by token"])
def test_constrained_rows_in_trouble(engines: list[Harness], llama: Path, jump_forward: bool) -> None:
    """Grammars with everything that could upset them: preemption, chunks, a shared prefix, best_of, min_new_tokens,
    ignore_eos_token, stop strings. The texts are those of the solo run without jump-forward, and obey."""
    rng = random.Random(7)
    crowd = []
    for index in range(24):
        stopping = StoppingParams(
            min_new_tokens=rng.choice([0, 4, 12]),
            stop=rng.choice([(), (), ("ck b", " d"), ("e",)]),
            ignore_eos_token=rng.random() < 0.5,
        )
        do_sample = rng.random() < 0.7
        request = make_request(
            f"g{index}",
            [*PREFIXES[3], *(rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randint(1, 20)))],
            rng.choice([6, 40]),
            sampling=SamplingParams(do_sample=do_sample, seed=index, temperature=1.5),
            stopping=stopping,
            best_of=rng.choice([1, 3]) if do_sample else 1,
            grammar=GRAMMARS[index % len(GRAMMARS)] if index % 5 else None,
            arrival_s=time.monotonic(),
        )
        crowd.append(Arrival(request, rng.randrange(15), None))
    solo = run_alone(opened(engines, configure(llama, prefix_caching=False, jump_forward=False)), crowd)
    tight = opened(engines, configure(llama, jump_forward=jump_forward, overlap=jump_forward, **TIGHT))
    answers = run_crowd(tight, crowd)
    assert_equal_to_solo(crowd, answers, solo)
    assert tight.num_preemptions > 0, "the cache was meant to be too small"
    num_forced = sum(report.metrics.num_forced_tokens for report in tight.reports if report.metrics)
    assert (num_forced > 0) == jump_forward

    reasons = set()
    for arrival in crowd:
        grammar, answer = arrival.request.grammar, answers[arrival.request.request_id]
        assert answer.error is None, answer.error
        for choice in range(arrival.request.best_of):
            reasons.add(answer.reason(choice))
            if grammar is None or answer.reason(choice) is not FinishReason.EOS_TOKEN:
                continue
            text = answer.text(choice)
            if grammar.kind == "regex":
                assert re.fullmatch(grammar.value, text), text
            elif grammar.kind == "choice":
                assert text in ("text", "tokens", "the quick brown fox")
            else:
                members = ('"stream":"(text|tokens)"', '"dog":(true|false)')
                forms = "|".join("{" + ",".join(order) + "}" for order in itertools.permutations(members))
                assert re.fullmatch(forms, text), text
    assert reasons == {FinishReason.LENGTH, FinishReason.EOS_TOKEN, FinishReason.STOP_SEQUENCE}
