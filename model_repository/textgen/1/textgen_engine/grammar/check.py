"""Does a text obey a grammar? Answered without a model: a matcher walks the text as it would walk a model's output.

Owns the walk (`check_text`) and the answer's form (`GrammarVerdict`). The text is split into tokens of the vocabulary,
the longest first; where the grammar refuses a token a shorter one is tried, so the place of the first fault is exact
to the character, whatever the tokenizer's own split of the text would be.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from textgen_engine.grammar.base import CompiledGrammar
from textgen_engine.grammar.vocabulary import Vocabulary, unpack_bits

# Longer tokens (runs of blanks, mostly) are walked in parts: a look-up for every length has to stay cheap.
_MAX_TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class TextVerdict:
    """accepted: None where the walk was not finished. accepted_prefix: characters that the grammar takes, from the
    text's beginning. reason: why not accepted, in words."""

    accepted: bool | None
    accepted_prefix: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class GrammarVerdict:
    """What `grammar_check` answers. error: why the grammar is not supported. text: None where none was to check."""

    supported: bool
    backend: str | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None
    text: TextVerdict | None = None

    def to_json(self) -> str:
        """One flat object: supported, backend, warnings, error, accepted, accepted_prefix, reason."""
        fields = asdict(self)
        text = fields.pop("text") or asdict(TextVerdict(None, 0))
        return json.dumps({**fields, **text}, ensure_ascii=False)


class TextSplitter:
    """Splits bytes into tokens of a vocabulary that stand for text. Built once, then only read."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        is_text = unpack_bits(vocabulary.text_row)
        self._ids: dict[bytes, int] = {}
        for token_id, content in enumerate(vocabulary.token_bytes):
            if content and len(content) <= _MAX_TOKEN_BYTES and token_id < is_text.size and is_text[token_id]:
                self._ids.setdefault(content, token_id)

    def tokens_at(self, content: bytes, start: int) -> Iterator[tuple[int, int]]:
        """(token id, its length in bytes) of every token that stands at `start`, the longest first."""
        for length in range(min(_MAX_TOKEN_BYTES, len(content) - start), 0, -1):
            token_id = self._ids.get(content[start : start + length])
            if token_id is not None:
                yield token_id, length


def check_text(
    compiled: CompiledGrammar,
    splitter: TextSplitter,
    text: str,
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> TextVerdict:
    """Walk `text` to its end, to the first fault, or until the time is up. Raises Overloaded where the backend has no
    matcher left."""
    content = text.encode()
    late_s = clock() + timeout_s
    matcher = compiled.matcher()
    try:
        position = 0
        while position < len(content):
            if clock() > late_s:
                walked = _num_characters(content, position)
                return TextVerdict(None, walked, f"the check was ended after {timeout_s:g} s, at character {walked}")
            was_complete = matcher.is_complete()
            for token_id, length in splitter.tokens_at(content, position):
                if matcher.advance([token_id]) == 1:
                    position += length
                    break
            else:
                return _fault(content, position, matcher.error(), was_complete)
        accepted = matcher.can_stop()
        failure = matcher.error()  # a matcher in another process may say so only now
        if failure is not None:
            return TextVerdict(None, len(text), failure)
        return TextVerdict(accepted, len(text), None if accepted else "the text ends before the grammar is complete")
    finally:
        matcher.close()


def _fault(content: bytes, position: int, failure: str | None, was_complete: bool) -> TextVerdict:
    walked = _num_characters(content, position)
    if failure is not None:
        return TextVerdict(None, walked, failure)
    if was_complete:
        return TextVerdict(False, walked, f"the grammar is complete at character {walked}, and nothing may follow")
    character = content.decode()[walked]
    return TextVerdict(False, walked, f"{character!r} at character {walked} is not allowed there")


def _num_characters(content: bytes, num_bytes: int) -> int:
    """Whole characters in the first `num_bytes` bytes."""
    return len(content[:num_bytes].decode(errors="ignore"))
