"""Overlapped steps (a step is launched before the last one is read) equal plain ones, and lose or leak nothing.

Crowds with grammars, choices, cancellations and preemptions are in test_random_parameters.py, which runs them both
ways.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from textgen_engine.batch import BatchInputs
from textgen_engine.request import FinishReason, GenerationRequest, OutputParams, StoppingParams
from textgen_engine.sampling.params import SamplingParams

from .test_engine_equalities import LOGPROB_TOLERANCE, PROMPTS, SAMPLING
from .tiny import Answer, Harness, make_request, script_logits

NewEngine = Callable[..., Harness]
ALL_SCORES = OutputParams(logprobs=True, top_n_tokens=2, prompt_logprobs=True)


def everything(prefix: str = "r") -> list[GenerationRequest]:
    """Every way to choose and to end, some of it with scores."""
    kinds: list[dict[str, Any]] = [
        {"sampling": params, "output": output}
        for params in SAMPLING.values()
        for output in (OutputParams(), ALL_SCORES)
    ]
    kinds += [
        {"stopping": StoppingParams(stop=("e",))},
        {"stopping": StoppingParams(min_new_tokens=12, stop_token_ids=tuple(range(2, 200)))},
        {"ignore_eos_token": True},
        {"sampling": SamplingParams(do_sample=True, seed=3, watermark=True), "n": 3},
        {"sampling": SamplingParams(do_sample=True, seed=4, typical_p=0.4), "best_of": 2},
        {"max_new_tokens": 1},
        {"max_new_tokens": None},
    ]
    requests = []
    for index, kind in enumerate(kinds):
        prompt = PROMPTS[index % len(PROMPTS)]
        requests.append(make_request(f"{prefix}{index}", prompt, kind.pop("max_new_tokens", 10 + index), **kind))
    return requests


def told(answer: Answer) -> list[Any]:
    """All that the client is told, whatever steps it came in."""
    assert answer.error is None
    choices = sorted({output.choice for output in answer.outputs})
    return [
        (
            *(answer.ids(choice), answer.text(choice), answer.reason(choice)),
            [(d.id, d.text, [t.id for t in d.top]) for d in answer.details(choice)],
        )
        for choice in choices
    ]


def logprobs(answer: Answer) -> list[float]:
    details = [detail for output in answer.outputs for detail in (*output.details, *(output.prompt_details or ()))]
    return [d.logprob for detail in details for d in (detail, *detail.top) if d.logprob is not None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens_per_step": 24, "block_size": 4},
        {"block_size": 4, "num_blocks": 60, "max_total_tokens": 150},
        {"prefix_caching": False, "max_sequences": 4},
    ],
    ids=["wide", "chunks", "preempting", "few slots"],
)
def test_overlapped_equals_plain(new_engine: NewEngine, options: dict[str, Any]) -> None:
    options = {"max_total_tokens": 150} | options
    plain, overlapped = (new_engine(**options, overlap=overlap) for overlap in (False, True))
    answers = [harness.run(everything()) for harness in (plain, overlapped)]
    for expected, found in zip(*(one.values() for one in answers), strict=True):
        assert told(found) == told(expected)
        assert logprobs(found) == pytest.approx(logprobs(expected), abs=LOGPROB_TOLERANCE)
    if options.get("num_blocks"):
        assert overlapped.num_preemptions > 0, "the cache was meant to be too small"


def test_a_step_is_launched_before_the_last_is_read(new_engine: NewEngine) -> None:
    """And its input ids are right all the same: they come from the tokens on the device."""
    harness = new_engine(overlap=True)
    script_logits(harness)
    known: list[int] = []
    forward = harness.engine._runner.forward

    def watched(inputs: BatchInputs, copies: Iterable[tuple[int, int]]) -> torch.Tensor:
        known.append(len(harness.answers["a"].ids()))
        return forward(inputs, copies)

    harness.engine._runner.forward = watched  # type: ignore[method-assign]
    found = harness.run_alone(make_request("a", PROMPTS[0], 6, ignore_eos_token=True)).ids()
    assert known == [0, 0, 1, 2, 3, 4], "one token behind, and no step after the last token"
    plain = new_engine()
    script_logits(plain)
    assert found == plain.run_alone(make_request("a", PROMPTS[0], 6, ignore_eos_token=True)).ids()


def test_what_ends_unforeseen_costs_one_row_and_harms_nobody(new_engine: NewEngine) -> None:
    """Its slot and its blocks are taken over while the row in flight still writes to them."""
    steps = {}
    for overlap in (False, True):
        harness = new_engine(overlap=overlap, max_sequences=1, num_blocks=8, max_total_tokens=60, prefix_caching=False)
        script_logits(harness, lambda token_id, position: 0 if position == 9 else 2 + (token_id + position) % 500)
        requests = [make_request(f"r{index}", PROMPTS[0], 40) for index in range(3)]
        answers = harness.run(requests)
        assert len({tuple(answer.ids()) for answer in answers.values()}) == 1
        assert all(answer.reason() is FinishReason.EOS_TOKEN for answer in answers.values())
        steps[overlap] = sum(1 for report in harness.reports if report.metrics and report.metrics.batch_size)
    assert steps[True] == steps[False] + 3


def test_cancelled_in_flight(new_engine: NewEngine) -> None:
    harness = new_engine(overlap=True)
    alone = new_engine().run_alone(make_request("b", PROMPTS[3], 20)).ids()
    harness.submit(make_request("a", PROMPTS[2], 200, ignore_eos_token=True), make_request("b", PROMPTS[3], 20))
    harness.step(4)
    harness.engine.cancel("a")
    harness.step()
    assert harness.answers["a"].num_last == 1
    assert harness.engine._scheduler.running and len(harness.engine._scheduler.running) == 1
    harness.until_idle()
    assert harness.answers["b"].ids() == alone


@pytest.mark.parametrize("lost", ["launch", "reading"])
def test_a_failure_reaches_whom_it_concerns(new_engine: NewEngine, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that fails is tried again without a neighbour in flight; a step that cannot be read is lost."""
    harness = new_engine(overlap=True)
    script_logits(harness)
    harness.submit(make_request("a", PROMPTS[0], 12, ignore_eos_token=True))
    harness.step(3)
    engine = harness.engine
    target, name = (engine._runner, "forward") if lost == "launch" else (engine._steps, "_take_tokens")
    right = getattr(target, name)

    def fail_once(*arguments: Any) -> Any:
        monkeypatch.setattr(target, name, right)
        raise RuntimeError("out of something")

    monkeypatch.setattr(target, name, fail_once)
    harness.submit(make_request("later", PROMPTS[1], 12, ignore_eos_token=True))
    if lost == "launch":
        harness.until_idle()
        assert len(harness.answers["a"].ids()) == 12 and harness.answers["a"].error is None
    else:
        harness.step(2)
        assert harness.answers["a"].error is not None
        harness.until_idle()
    assert len(harness.answers["later"].ids()) == 12 and harness.answers["later"].error is None
