"""Strict JSON in and out: what a schema or tool list may look like as text, before anyone reads its meaning.

Stricter than `json.loads`: duplicate keys, NaN, Infinity and lone surrogates are refused, and so is nesting that would
exhaust the interpreter's stack, each with the place where it stands.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from textgen_engine.errors import GrammarError

_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def parse_json(text: str, *, what: str, max_bytes: int, max_nesting: int) -> Any:
    """The value of a JSON text. Raises GrammarError naming `what`, and line and column where the text is broken."""
    _check_size(text, what, max_bytes)
    depth = 0
    for bracket in _BRACKETS.finditer(text):
        if bracket[0] in "[{":
            depth += 1
            if depth > max_nesting:
                raise GrammarError(f"{what}: nested deeper than {max_nesting} at position {bracket.start()}")
        elif bracket[0] in "]}":
            depth -= 1

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise GrammarError(f"{what}: the key {twice!r:.100} occurs twice in one object")
        return result

    def no_constant(name: str) -> NoReturn:
        raise GrammarError(f"{what}: {name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise GrammarError(f"{what}: not valid JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # ValueError: an integer of more digits than Python converts
        raise GrammarError(f"{what}: not readable JSON: {str(error)[:100]}") from None


def canonical_json(value: Any, *, what: str, max_bytes: int, max_nesting: int) -> str:
    """One compact text per value, key order kept. Raises GrammarError for a size, depth or value no JSON has."""
    _check_depth(value, what, max_nesting)
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"{what}: not JSON: {str(error)[:200]}") from None
    _check_size(text, what, max_bytes)
    return text


def _check_size(text: str, what: str, max_bytes: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise GrammarError(f"{what}: lone surrogate at position {error.start}") from None
    if size > max_bytes:
        raise GrammarError(f"{what}: {size} bytes; at most {max_bytes} are allowed")


def _check_depth(value: Any, what: str, max_nesting: int) -> None:
    level, depth = [value], 0
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
        if depth > max_nesting + 1:
            raise GrammarError(f"{what}: nested deeper than {max_nesting}")
