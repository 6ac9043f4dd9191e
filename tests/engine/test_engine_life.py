"""`engine.py`: every request gets exactly one last output, on every path, and what it held comes back.

The harness refuses outputs after the last one and, when idle, any block or slot that is still held.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from textgen_engine.engine import Engine
from textgen_engine.errors import Cancelled, DeadlineExceeded, EngineFailure, PromptTooLong
from textgen_engine.messages import StepReport
from textgen_engine.request import FinishReason, GenerationRequest, OutputParams, StoppingParams
from textgen_engine.sampling.params import SamplingParams

from .tiny import EOS_ID, VOCAB_SIZE, Harness, make_config, make_request, make_tokenizer, script_logits

NewEngine = Callable[..., Harness]
PROMPT = list(range(10, 30))
SAMPLED = SamplingParams(do_sample=True, seed=7)


class Clock:
    """The engine's clock: real, and moved on by the test."""

    def __init__(self, real: Callable[[], float]) -> None:
        self._real = real
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return self._real() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(time.monotonic)
    monkeypatch.setattr("textgen_engine.engine.time.monotonic", made)
    return made


def speak(harness: Harness, text: str) -> list[int]:
    """Let the model say `text` after PROMPT, then the end, whatever it is asked; returns the text's ids."""
    ids: list[int] = make_tokenizer().encode(text, add_special_tokens=False)
    start = len(PROMPT) - 1
    script_logits(
        harness, lambda _, position: [*ids, EOS_ID][min(position - start, len(ids))] if position >= start else 2
    )
    return ids


# ---- how a choice ends ---------------------------------------------------------------------------------------------


def test_the_end_token_ends_the_text_and_is_not_shown(new_engine: NewEngine) -> None:
    harness = new_engine()
    ids = speak(harness, "the quick fox")
    answer = harness.run_alone(make_request("r", PROMPT, 50))
    assert answer.reason() is FinishReason.EOS_TOKEN
    assert answer.text() == "the quick fox" and answer.ids() == [*ids, EOS_ID]


def test_the_length_ends_the_text(new_engine: NewEngine) -> None:
    harness = new_engine()
    ids = speak(harness, "the quick fox jumps")
    answer = harness.run_alone(make_request("r", PROMPT, 3))
    assert answer.reason() is FinishReason.LENGTH and answer.ids() == ids[:3]


def test_an_end_token_on_the_last_place_is_an_end(new_engine: NewEngine) -> None:
    harness = new_engine()
    ids = speak(harness, "fox")
    answer = harness.run_alone(make_request("r", PROMPT, len(ids) + 1))
    assert answer.reason() is FinishReason.EOS_TOKEN


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text(new_engine: NewEngine, include: bool) -> None:
    harness = new_engine()
    speak(harness, "a stream of text.")
    stopping = StoppingParams(stop=("m of", "zzz"), include_stop_str_in_output=include)
    answer = harness.run_alone(make_request("r", PROMPT, 50, stopping=stopping))
    assert answer.reason() is FinishReason.STOP_SEQUENCE
    assert answer.text() == ("a stream of" if include else "a strea")


def test_what_was_held_back_for_a_stop_string_comes_when_the_length_ends_the_text(new_engine: NewEngine) -> None:
    harness = new_engine()
    ids = speak(harness, "abc")
    stopping = StoppingParams(stop=("abcd",))
    answer = harness.run_alone(make_request("r", PROMPT, len(ids), stopping=stopping))
    assert answer.reason() is FinishReason.LENGTH and answer.text() == "abc"


def test_a_stop_token_ends_the_text(new_engine: NewEngine) -> None:
    harness = new_engine()
    ids = speak(harness, "a quick fox")
    stopping = StoppingParams(stop_token_ids=(ids[2],), ignore_eos_token=True)
    answer = harness.run_alone(make_request("r", PROMPT, 50, stopping=stopping))
    assert answer.reason() is FinishReason.EOS_TOKEN and answer.ids() == ids[:3]
    assert answer.text() == make_tokenizer().decode(ids[:2])


def test_the_end_token_can_be_ignored(new_engine: NewEngine) -> None:
    harness = new_engine()
    ids = speak(harness, "fox")
    answer = harness.run_alone(make_request("r", PROMPT, len(ids) + 4, ignore_eos_token=True))
    assert answer.reason() is FinishReason.LENGTH
    assert answer.ids() == ids + [EOS_ID] * 4 and answer.text() == "fox"


def test_no_end_before_the_shortest_length(new_engine: NewEngine) -> None:
    harness = new_engine()
    ids = speak(harness, "fox")
    stopping = StoppingParams(min_new_tokens=len(ids) + 5)
    answer = harness.run_alone(make_request("r", PROMPT, 50, stopping=stopping))
    assert answer.reason() is FinishReason.EOS_TOKEN
    assert len(answer.ids()) == len(ids) + 6 and answer.ids().count(EOS_ID) == 1


@pytest.mark.parametrize("num_prompt", [1, 100, 119])
def test_without_a_limit_the_text_fills_what_one_request_may_use(new_engine: NewEngine, num_prompt: int) -> None:
    harness = new_engine(max_total_tokens=120, block_size=8, num_blocks=15)
    prompt = [5] * num_prompt
    answer = harness.run_alone(make_request("r", prompt, None, ignore_eos_token=True))
    assert answer.reason() is FinishReason.LENGTH
    assert len(answer.ids()) == 120 - num_prompt
    capped = harness.run_alone(make_request("capped", prompt, 500, ignore_eos_token=True))
    assert capped.ids() == answer.ids()


def test_a_prompt_beyond_the_limits_is_refused_and_does_not_wait_for_ever(new_engine: NewEngine) -> None:
    """The front checks first; but an engine that was restarted with less memory may have tightened its limits."""
    harness = new_engine(max_total_tokens=120, num_blocks=8)
    answers = harness.run([make_request("long", [5] * 120, 1), make_request("r", PROMPT, 4)])
    assert isinstance(answers["long"].error, PromptTooLong)
    assert len(answers["r"].ids()) == 4


# ---- cancel --------------------------------------------------------------------------------------------------------


def in_stage(harness: Harness, stage: str, **fields: Any) -> None:
    """Bring the request "r" into a stage, beside a neighbour that runs on."""
    harness.submit(make_request("neighbour", PROMPT, 30, ignore_eos_token=True))
    harness.step(2)
    harness.submit(make_request("r", [7] * 100, 30, ignore_eos_token=True, **fields))
    if stage == "arrived":
        return
    if stage == "waiting":
        harness.step()
        assert "r" not in harness.started
    else:
        harness.until(lambda: "r" in harness.started)
        assert not harness.answers["r"].outputs
    if stage == "decoding":
        harness.until(lambda: bool(harness.answers["r"].ids()))
        harness.step(2)


STAGES = {
    "arrived": {},
    "waiting": {"max_sequences": 1},
    "prefilling": {"tokens_per_step": 16},
    "decoding": {"tokens_per_step": 64},
}


@pytest.mark.parametrize("stage", STAGES)
def test_cancelled_at_any_stage_it_gives_everything_back_within_one_step(new_engine: NewEngine, stage: str) -> None:
    harness = new_engine(**STAGES[stage], num_blocks=40)
    in_stage(harness, stage)
    harness.engine.cancel("r")
    harness.step()
    answer = harness.answers["r"]
    assert isinstance(answer.error, Cancelled) and answer.num_last == 1
    assert harness.engine._rooms.blocks.num_used == harness.engine._rooms.blocks.blocks_for(
        harness.engine._scheduler.running[0].num_computed
    )
    assert len(harness.engine._scheduler.running) == 1 and not harness.engine._scheduler.waiting
    harness.until_idle()
    assert len(harness.answers["neighbour"].ids()) == 30


def test_a_cancel_that_comes_late_or_for_nobody_does_nothing(new_engine: NewEngine) -> None:
    harness = new_engine()
    harness.run_alone(make_request("r", PROMPT, 3))
    harness.engine.cancel("r")
    harness.engine.cancel("nobody")
    assert not harness.engine.step()
    assert not harness.reports[-1].outputs or harness.answers["r"].num_last == 1


def test_all_choices_of_a_cancelled_request_end(new_engine: NewEngine) -> None:
    harness = new_engine(max_sequences=3)
    harness.submit(make_request("r", PROMPT, 30, sampling=SAMPLED, ignore_eos_token=True, n=5))
    harness.step(4)
    harness.engine.cancel("r")
    harness.until_idle()
    assert isinstance(harness.answers["r"].error, Cancelled)


# ---- deadline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_deadline_passes(new_engine: NewEngine, clock: Clock, stage: str, stream: bool) -> None:
    harness = new_engine(**STAGES[stage], num_blocks=40)
    now_s = clock()
    in_stage(harness, stage, stream=stream, arrival_s=now_s, deadline_s=now_s + 1000)
    clock.ahead_s = 999
    harness.step()
    answer = harness.answers["r"]
    assert not answer.num_last
    clock.ahead_s = 1001
    harness.step()
    assert answer.num_last == 1
    if stream and answer.ids():
        assert answer.error is None and answer.reason() is FinishReason.TIMEOUT
        assert len(answer.ids()) < 30 and answer.text()
    else:
        assert isinstance(answer.error, DeadlineExceeded) and "1e+03 seconds" in str(answer.error)
    harness.until_idle()
    assert len(harness.answers["neighbour"].ids()) == 30


def test_a_deadline_ends_each_choice_and_the_request_once(new_engine: NewEngine, clock: Clock) -> None:
    harness = new_engine(max_sequences=2)
    deadline_s = clock() + 1000
    harness.submit(
        make_request("r", PROMPT, 30, sampling=SAMPLED, ignore_eos_token=True, n=3, stream=True, deadline_s=deadline_s)
    )
    harness.step(5)
    clock.ahead_s = 1001
    harness.until_idle()
    answer = harness.answers["r"]
    assert [answer.reason(choice) for choice in range(3)] == [FinishReason.TIMEOUT] * 3
    assert len(answer.ids(0)) == 5 and answer.ids(2) == [], "the third never found a slot"


# ---- failures ------------------------------------------------------------------------------------------------------


def fail_once(owner: object, method: str, at_call: int = 0) -> None:
    """Let one call of a method of the engine, or of one of its rooms, fail."""
    original = getattr(owner, method)
    calls = iter(range(1_000_000))

    def flaky(*args: Any, **keywords: Any) -> Any:
        if next(calls) == at_call:
            raise RuntimeError("the device caught fire")
        return original(*args, **keywords)

    setattr(owner, method, flaky)


@pytest.mark.parametrize(
    ("room", "method"),
    [
        ("runner", "forward"),
        ("sampler", "sample"),
        ("sampler", "add"),
        ("scheduler", "advance"),
        ("blocks", "register"),
    ],
)
@pytest.mark.parametrize("at_call", [0, 1])
def test_a_failed_step_fails_its_requests_only(
    new_engine: NewEngine, room: str, method: str, at_call: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = new_engine().run_alone(make_request("r", PROMPT, 6)).ids()
    harness = new_engine(max_sequences=2)
    fail_once(getattr(harness.engine._rooms, room), method, at_call)
    harness.submit(*(make_request(f"r{index}", PROMPT, 6) for index in range(4)))
    harness.until_idle()
    failed = [name for name, answer in harness.answers.items() if answer.error is not None]
    # What fails before anything has advanced is tried again, and succeeds.
    assert failed == ([] if method in ("forward", "advance") else ["r0", "r1"])
    for name in failed:
        assert isinstance(harness.answers[name].error, EngineFailure)
        assert "fire" not in str(harness.answers[name].error), "what went wrong inside is for the log"
    assert "the device caught fire" in caplog.text
    for name in harness.answers.keys() - set(failed):
        assert harness.answers[name].ids() == expected
    assert harness.run_alone(make_request("later", PROMPT, 6)).ids() == expected


def test_a_failure_while_results_are_read_back_leaves_no_half_ended_request(new_engine: NewEngine) -> None:
    """The first of the batch has its last token already when the second fails."""
    harness = new_engine()
    fail_once(harness.engine._steps._details, "describe", at_call=1)
    harness.submit(*(make_request(f"r{i}", PROMPT, 1, output=OutputParams(token_details=True)) for i in range(3)))
    harness.until_idle()
    assert [answer.error is None for answer in harness.answers.values()] == [True, False, False]


def test_a_lost_device_ends_the_process(new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After such an error every later step would fail as well; a new process is the only way out."""
    harness = new_engine()

    def lost(*_: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(harness.engine._runner, "forward", lost)
    harness.submit(make_request("r", PROMPT))
    with pytest.raises(torch.AcceleratorError):
        harness.engine.step()


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("out of memory"), RuntimeError("a bad kernel")]
)
def test_a_poisonous_request_fails_alone(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever its place in the batch, in its prompt or later; the others' texts are those they would have had."""
    poison = 7
    harness = new_engine()
    requests = [make_request(f"r{i}", [*PROMPT, 40 + i], 8, ignore_eos_token=True) for i in range(7)]
    expected = {name: answer.ids() for name, answer in harness.run(requests).items()}
    forward = harness.engine._runner.forward

    def fail_for_poison(inputs: Any, copies: Any) -> torch.Tensor:
        if poison in inputs.input_ids.tolist():
            raise error
        return forward(inputs, copies)

    monkeypatch.setattr(harness.engine._runner, "forward", fail_for_poison)
    for place in range(8):
        again = [make_request(f"r{i} {place}", [*PROMPT, 40 + i], 8, ignore_eos_token=True) for i in range(7)]
        again.insert(place, make_request(f"poison {place}", [5, poison, 6], 8, sampling=SAMPLED, n=2))
        answers = harness.run(again)
        failure = answers.pop(f"poison {place}").error
        assert isinstance(failure, EngineFailure) and type(error).__name__ in str(failure)
        assert {name.split()[0]: answer.ids() for name, answer in answers.items()} == expected


def test_a_step_too_large_for_the_memory_is_run_in_parts(
    new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = new_engine()
    requests = [make_request(f"r{i}", [*PROMPT, 40 + i], 8, ignore_eos_token=True) for i in range(7)]
    expected = {name: answer.ids() for name, answer in harness.run(requests).items()}
    forward, largest = harness.engine._runner.forward, 0

    def fail_for_many(inputs: Any, copies: Any) -> torch.Tensor:
        nonlocal largest
        if len(inputs.logits_rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        largest = max(largest, len(inputs.logits_rows))
        return forward(inputs, copies)

    monkeypatch.setattr(harness.engine._runner, "forward", fail_for_many)
    again = [make_request(f"r{i} again", [*PROMPT, 40 + i], 8, ignore_eos_token=True) for i in range(7)]
    answers = harness.run(again)
    assert {name.split()[0]: answer.ids() for name, answer in answers.items()} == expected
    assert largest == 2


def test_a_failed_step_takes_all_choices_of_its_requests(new_engine: NewEngine) -> None:
    harness = new_engine(max_sequences=2)
    fail_once(harness.engine._rooms.sampler, "sample", at_call=4)
    harness.submit(make_request("r", PROMPT, 10, sampling=SAMPLED, ignore_eos_token=True, n=4))
    harness.until_idle()
    assert isinstance(harness.answers["r"].error, EngineFailure)


# ---- choices and details -------------------------------------------------------------------------------------------


def test_best_of_reports_every_candidate_best_first_at_the_end(new_engine: NewEngine) -> None:
    harness = new_engine()
    request = make_request(
        "r", PROMPT, 8, sampling=SAMPLED, ignore_eos_token=True, best_of=4, output=OutputParams(token_details=True)
    )
    answer = harness.run_alone(request)
    assert len(answer.outputs) == 4 and all(output.finish_reason for output in answer.outputs)
    assert [output.choice for output in answer.outputs] == [0, 1, 2, 3]
    means = [sum(d.logprob or 0 for d in answer.details(choice)) / len(answer.ids(choice)) for choice in range(4)]
    assert means == sorted(means, reverse=True) and len(set(means)) == 4
    as_choices = harness.run_alone(make_request("n", PROMPT, 8, sampling=SAMPLED, ignore_eos_token=True, n=4))
    assert sorted(answer.ids(c) for c in range(4)) == sorted(as_choices.ids(c) for c in range(4))


def test_choices_end_one_by_one_and_the_request_with_the_last(new_engine: NewEngine) -> None:
    harness = new_engine()
    answer = harness.run_alone(make_request("r", PROMPT, 100, sampling=SamplingParams(do_sample=True, seed=3), n=4))
    ends = [index for index, output in enumerate(answer.outputs) if output.finish_reason is not None]
    assert len(ends) == 4 and ends[-1] == len(answer.outputs) - 1
    assert [output.is_last for output in answer.outputs] == [False] * ends[-1] + [True]


def test_a_request_says_where_it_stands(new_engine: NewEngine) -> None:
    harness = new_engine()
    before_s = time.monotonic()
    answer = harness.run_alone(make_request("r", PROMPT, 5, arrival_s=before_s, ignore_eos_token=True))
    assert harness.started == ["r"]
    assert harness.reports[0].started == ["r"], "said before the step that first touches it"
    assert {output.num_prompt_tokens for output in answer.outputs} == {len(PROMPT)}
    timings = answer.outputs[-1].timings
    assert timings is not None and timings.scheduled_s and timings.first_token_s and timings.finished_s
    assert before_s <= timings.scheduled_s <= timings.first_token_s <= timings.finished_s <= time.monotonic()
    metrics = [report.metrics for report in harness.reports if report.metrics is not None]
    assert sum(one.num_generated_tokens for one in metrics) == 5
    assert sum(one.num_prefill_tokens for one in metrics) == len(PROMPT)
    assert sum(len(one.time_to_first_token_s) for one in metrics) == 1
    assert sum(len(one.inter_token_s) for one in metrics) == 4
    gauges = metrics[-1].gauges
    assert (gauges.num_running, gauges.num_waiting, gauges.kv_cache_usage) == (0, 0, 0.0)


def test_text_pieces_joined_are_the_decoded_tokens(new_engine: NewEngine) -> None:
    """Tokens of random bytes: characters come whole, or as U+FFFD where they never will be."""
    harness = new_engine()
    answer = harness.run_alone(make_request("r", PROMPT, 60, sampling=SAMPLED, ignore_eos_token=True))
    special = {0, 1}
    whole = make_tokenizer().decode([i for i in PROMPT + answer.ids() if i not in special])
    assert whole.endswith(answer.text()[-20:])


# ---- the loop itself -----------------------------------------------------------------------------------------------


def test_the_loop_runs_in_a_thread_of_its_own_and_stops(llama: Any) -> None:
    done = threading.Event()
    reports: list[StepReport] = []

    def emit(report: StepReport) -> None:
        reports.append(report)
        if any(output.is_last for output in report.outputs):
            done.set()

    engine = Engine(make_config(llama), emit)
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        for index in range(3):
            done.clear()
            engine.submit(make_request(f"r{index}", PROMPT, 4))
            assert done.wait(30)
    finally:
        engine.stop()
        thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("seed", range(2))
def test_a_long_random_schedule_answers_everyone_once_and_leaks_nothing(
    new_engine: NewEngine, clock: Clock, seed: int
) -> None:
    """Two times a thousand requests: joining, leaving, cancelled, late, preempted, with one to three choices."""
    rng = random.Random(seed)
    harness = new_engine(
        block_size=4,
        num_blocks=rng.choice([40, 60]),
        max_sequences=8,
        tokens_per_step=rng.choice([16, 64]),
        max_total_tokens=100,
        ageing_s=2.0,
    )
    script_logits(
        harness, lambda token_id, position: (token_id * 7 + position) % VOCAB_SIZE if position % 9 else EOS_ID
    )
    alive: list[str] = []
    num_submitted = 0
    while num_submitted < 1000 or not all(answer.num_last for answer in harness.answers.values()):
        for _ in range(
            rng.choice([0, 1, 1, 2]) if num_submitted < 1000 and len(harness.engine._requests.by_id) < 30 else 0
        ):
            name = f"r{num_submitted}"
            num_submitted += 1
            alive.append(name)
            harness.submit(random_request(rng, name, clock()))
        if rng.random() < 0.15:
            harness.engine.cancel(rng.choice(alive[-20:]))
        clock.ahead_s += rng.choice([0.0, 0.05])
        harness.step()
    harness.until_idle()
    assert len(harness.answers) >= 1000
    endings = [type(answer.error).__name__ if answer.error else answer.reason() for answer in harness.answers.values()]
    assert set(endings) == {
        "Cancelled",
        "DeadlineExceeded",
        FinishReason.EOS_TOKEN,
        FinishReason.LENGTH,
        FinishReason.TIMEOUT,
    }
    assert harness.num_preemptions > 20
    assert harness.engine._rooms.blocks.num_available == harness.engine._rooms.blocks.num_blocks


def test_a_request_that_breaks_a_library_on_arrival_ends_alone(
    new_engine: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, an exception outside the step ended the engine's process, and the next one's, and the next one's."""
    harness = new_engine()

    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("half a character")

    monkeypatch.setattr(type(harness.engine._rooms.tokenizer), "encode", fail)
    harness.submit(
        make_request("before", [5, 6, 7], 4),
        make_request("poison", [5, 6, 7], 4, bad_words=("x",)),
        make_request("after", [5, 6, 7], 4),
    )
    harness.until_idle()
    assert isinstance(harness.answers["poison"].error, EngineFailure)
    assert len(harness.answers["before"].ids()) == len(harness.answers["after"].ids()) == 4


def random_request(rng: random.Random, name: str, now_s: float) -> GenerationRequest:
    n = rng.choice([1, 1, 1, 2, 3])
    return make_request(
        name,
        [rng.randint(2, 4)] * rng.choice([1, rng.randint(1, 20), rng.randint(1, 60)]),
        rng.choice([1, 5, 5, 10, 20, 20, None]),
        sampling=SamplingParams(do_sample=True, seed=rng.randrange(100), temperature=0.1) if n > 1 else None,
        n=n,
        ignore_eos_token=rng.random() < 0.5,
        stream=rng.random() < 0.5,
        arrival_s=now_s,
        deadline_s=now_s + rng.choice([0.2, 5.0]) if rng.random() < 0.3 else None,
        priority=rng.choice([0, 0, 1]),
    )
