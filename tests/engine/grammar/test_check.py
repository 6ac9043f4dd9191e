"""check.py: a text is walked as a model's output would be, and the first fault is found to the character."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest

from textgen_engine.grammar import Vocabulary
from textgen_engine.grammar.check import GrammarVerdict, TextSplitter, TextVerdict, check_text

from .conftest import Walker

REGEX = {"type": "regex", "value": r"(?:abc|x{3})-[0-9]{1,3}"}
BYTES = {"type": "regex", "value": r"(?:à|日本)-[0-9]"}  # characters that the tokenizer has no tokens for
SCHEMA = {
    "type": "json",
    "value": {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def splitter(vocabulary: Vocabulary) -> TextSplitter:
    return TextSplitter(vocabulary)


@pytest.mark.parametrize(
    ("grammar", "text", "accepted", "accepted_prefix", "reason"),
    [
        (REGEX, "abc-42", True, 6, None),
        (REGEX, "abc-", False, 4, "the text ends before the grammar is complete"),
        (REGEX, "abc-4x", False, 5, "'x' at character 5 is not allowed there"),
        (REGEX, "ab-4", False, 2, "'-' at character 2 is not allowed there"),
        (REGEX, "xxxx", False, 3, "'x' at character 3 is not allowed there"),
        (REGEX, "", False, 0, "the text ends before the grammar is complete"),
        (REGEX, "abc-1<|end|>", False, 5, "'<' at character 5 is not allowed there"),
        (BYTES, "日本-4", True, 4, None),
        (BYTES, "日-4", False, 1, "'-' at character 1 is not allowed there"),
        # è and à share their first byte: the walk stops inside the character.
        (BYTES, "è-4", False, 0, "'è' at character 0 is not allowed there"),
        (SCHEMA, '{"age": 36}', True, 11, None),
        (SCHEMA, '{"age": 36.5}', False, 10, "'.' at character 10 is not allowed there"),
        (SCHEMA, '{"name": "Ada"}', False, 2, "'n' at character 2 is not allowed there"),
        (SCHEMA, '{"age": 36} x', False, 11, "the grammar is complete at character 11, and nothing may follow"),
    ],
)
def test_verdicts(
    walker: Walker, splitter: TextSplitter, grammar: Any, text: str, accepted: bool, accepted_prefix: int, reason: str
) -> None:
    if grammar is BYTES and walker.backend.name == "lmfe":
        pytest.skip("lmfe refuses such a grammar")
    compiled = walker.compile(grammar)
    found = check_text(compiled, splitter, text, timeout_s=30.0)
    assert (found.accepted, found.accepted_prefix) == (accepted, accepted_prefix)
    assert found.reason == reason


def test_special_tokens_written_out_are_text(llguidance_walker: Walker, splitter: TextSplitter) -> None:
    compiled = llguidance_walker.compile({"type": "regex", "value": r"a.*"})
    assert check_text(compiled, splitter, "a<|end|>b", timeout_s=30.0).accepted is True


def test_a_long_walk_ends_in_time(llguidance_walker: Walker, splitter: TextSplitter) -> None:
    compiled = llguidance_walker.compile({"type": "regex", "value": r"[0-9]*"})
    ticks = count()
    found = check_text(compiled, splitter, "5" * 1000, timeout_s=20, clock=lambda: float(next(ticks)))
    assert found.accepted is None
    assert 0 < found.accepted_prefix < 1000
    assert found.reason is not None and found.reason.startswith("the check was ended after 20 s, at character ")


def test_the_answer_as_json() -> None:
    assert json.loads(GrammarVerdict(False, error="no").to_json()) == {
        "supported": False,
        "backend": None,
        "warnings": [],
        "error": "no",
        "accepted": None,
        "accepted_prefix": 0,
        "reason": None,
    }
    verdict = GrammarVerdict(True, "llguidance", ("w",), text=TextVerdict(False, 3, "é"))
    fields = json.loads(verdict.to_json())
    assert (fields["accepted"], fields["accepted_prefix"], fields["reason"]) == (False, 3, "é")
    assert (fields["backend"], fields["warnings"]) == ("llguidance", ["w"])
