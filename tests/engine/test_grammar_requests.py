"""Requests with a grammar in the engine's loop: forced tokens are counted, and a mere check is answered beside it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from textgen_engine.errors import Cancelled, DeadlineExceeded
from textgen_engine.grammar import GrammarSpec
from textgen_engine.request import FinishReason, GenerationRequest, GrammarCheck

from .tiny import Harness, make_config, make_request

pytest.importorskip("llguidance")

NewEngine = Callable[..., Harness]
PROMPT = list(range(10, 30))
PHRASE = GrammarSpec("regex", "the quick brown fox [0-9]", "llguidance")


def check_request(request_id: str, grammar: GrammarSpec, text: str | None = None, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id, (), grammar=grammar, grammar_check=GrammarCheck(text), arrival_s=time.monotonic(), **fields
    )


def wait_for_answers(harness: Harness, timeout_s: float = 60.0) -> None:
    """Step until nothing is live; compilations and checks run beside the loop."""
    late_s = time.monotonic() + timeout_s
    while not all(answer.num_last for answer in harness.answers.values()):
        assert time.monotonic() < late_s, "never answered"
        if not harness.engine.step():
            time.sleep(0.002)
    harness.until_idle()


def total(harness: Harness, name: str) -> int:
    return sum(getattr(report.metrics, name) for report in harness.reports if report.metrics)


@pytest.mark.parametrize("jump_forward", [True, False])
def test_forced_tokens_are_counted(llama: Path, jump_forward: bool) -> None:
    config = make_config(llama)
    harness = Harness(replace(config, grammar=replace(config.grammar, jump_forward=jump_forward)))
    try:
        harness.submit(make_request("free", PROMPT, 5), make_request("bound", PROMPT, 64, grammar=PHRASE))
        wait_for_answers(harness)
        bound = harness.answers["bound"]
        assert bound.text().startswith("the quick brown fox ")
        assert bound.reason() is FinishReason.EOS_TOKEN
        num_tokens = len(bound.ids())
        assert total(harness, "num_generated_tokens") == len(harness.answers["free"].ids()) + num_tokens
        # Sampled are at most the first token of the phrase, the digit, and the end.
        num_forced = total(harness, "num_forced_tokens")
        assert num_forced == 0 if not jump_forward else num_tokens - 3 <= num_forced < num_tokens
        assert not jump_forward or num_forced > 0
    finally:
        harness.close()


def test_checks_are_answered_without_generating(new_engine: NewEngine) -> None:
    harness = new_engine()
    harness.submit(
        check_request("compiles", PHRASE),
        check_request("accepted", PHRASE, "the quick brown fox 7"),
        check_request("refused", PHRASE, "the quick red fox"),
        check_request("unsupported", GrammarSpec("regex", "(", "llguidance"), "x"),
        check_request("not enabled", GrammarSpec("regex", "a", "nonesuch")),
        make_request("neighbour", PROMPT, 8),
    )
    wait_for_answers(harness)
    verdicts = {}
    for request_id, answer in harness.answers.items():
        assert answer.error is None
        if request_id != "neighbour":
            assert len(answer.outputs) == 1 and not answer.ids() and answer.reason() is None
            verdicts[request_id] = json.loads(answer.text())
    assert harness.started == ["neighbour"]
    assert total(harness, "num_generated_tokens") == len(harness.answers["neighbour"].ids())
    nothing = {"accepted": None, "accepted_prefix": 0, "reason": None}
    compiled = {"supported": True, "backend": "llguidance", "warnings": [], "error": None}
    assert verdicts["compiles"] == compiled | nothing
    assert verdicts["accepted"] == compiled | {"accepted": True, "accepted_prefix": 21, "reason": None}
    reason = "'r' at character 10 is not allowed there"
    assert verdicts["refused"] == compiled | {"accepted": False, "accepted_prefix": 10, "reason": reason}
    assert verdicts["unsupported"]["supported"] is False
    assert "regex" in verdicts["unsupported"]["error"]
    assert "not enabled" in verdicts["not enabled"]["error"]


def test_a_check_can_be_cancelled_and_be_late(new_engine: NewEngine) -> None:
    harness = new_engine()
    harness.submit(check_request("cancelled", PHRASE, "the"))
    harness.engine.cancel("cancelled")
    harness.submit(replace(check_request("late", PHRASE, "the"), deadline_s=time.monotonic() - 1))
    wait_for_answers(harness)
    assert isinstance(harness.answers["cancelled"].error, Cancelled)
    assert isinstance(harness.answers["late"].error, DeadlineExceeded)


def test_a_long_check_does_not_hold_up_a_neighbour(new_engine: NewEngine) -> None:
    """The neighbour runs to its end while the engine waits for the check, which a latch keeps from beginning."""
    harness = new_engine()
    constraints: Any = harness.engine._constraints
    latch = threading.Event()
    constraints._check_thread.submit(latch.wait)
    harness.submit(check_request("check", PHRASE, "the quick brown fox 7"), make_request("neighbour", PROMPT, 8))
    harness.until(lambda: bool(harness.answers["neighbour"].num_last))
    assert not harness.answers["check"].num_last
    latch.set()
    wait_for_answers(harness)
    assert json.loads(harness.answers["check"].text())["accepted"] is True


class SlowMatcher:
    """Allows one token, three times; each next mask takes a while, and nothing may be asked meanwhile."""

    def __init__(self, token_id: int, num_words: int) -> None:
        self._token_id, self._num_words = token_id, num_words
        self._num_left, self._num_polls = 3, 0

    def ready(self) -> bool:
        self._num_polls -= 1
        return self._num_polls < 0

    def _assert_ready(self) -> None:
        assert self._num_polls < 0, "asked before it was ready: every sequence would wait for the answer"

    def fill(self, row: Any) -> None:
        self._assert_ready()
        row[:] = 0
        row[self._token_id >> 5] = 1 << (self._token_id & 31)

    def advance(self, token_ids: list[int]) -> int:
        assert token_ids == [self._token_id]
        self._num_left -= 1
        self._num_polls = 6
        return 1

    def is_complete(self) -> bool:
        self._assert_ready()
        return self._num_left == 0

    def can_stop(self) -> bool:
        return self.is_complete()

    def forced(self) -> list[int]:
        return []

    def error(self) -> None:
        return None

    def close(self) -> None:
        pass


def test_a_slow_matcher_holds_up_nobody(new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = new_engine()
    compiler = harness.engine._constraints._compiler

    class Compiled:
        warnings = ()

        def matcher(self) -> SlowMatcher:
            return SlowMatcher(40, compiler.masks.num_words)

    class Handle:
        compile_s = None

        def done(self) -> bool:
            return True

        def result(self) -> Compiled:
            return Compiled()

    monkeypatch.setattr(compiler, "submit", lambda spec: Handle())
    harness.submit(
        make_request("slow", PROMPT, 20, grammar=PHRASE), make_request("free", PROMPT, 20, ignore_eos_token=True)
    )
    harness.until_idle()
    assert harness.answers["slow"].ids() == [40, 40, 40]
    assert harness.answers["slow"].reason() is FinishReason.EOS_TOKEN
    assert len(harness.answers["free"].ids()) == 20
    # The free one was through after 20 steps, the slow one took some 6 turns of the loop for each of its tokens.
    order = [output.request_id for report in harness.reports for output in report.outputs]
    assert order.index("free") < len(order) - 1
    assert [name for name in order if name == "slow"][:2] == ["slow", "slow"]
    first, second = [i for i, name in enumerate(order) if name == "slow"][:2]
    assert second - first > 4, "the free one went on meanwhile"
