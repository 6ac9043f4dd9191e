"""`validate_grammar`: what a server would do with a grammar, said before anybody generates with it.

Compiles a request's grammar, reports warnings and what was rewritten, and walks a sample text through the masks, token
by token, as the engine does. For the client's and the command line's `validate`; uses no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from textgen_engine.grammar.base import CompiledGrammar, GrammarMatcher
from textgen_engine.grammar.vocabulary import Vocabulary


@dataclass(frozen=True)
class SampleVerdict:
    """accepted: the whole text is allowed and may end there. num_tokens_taken of num_tokens were allowed.

    accepted_text, refused_text: the sample, cut where the first token is refused (accepted_text is all of it, and
    refused_text empty, where the text is only incomplete). expected: some tokens that were allowed there, as text.
    """

    accepted: bool
    num_tokens: int
    num_tokens_taken: int
    accepted_text: str
    refused_text: str
    may_end: bool
    expected: Sequence[str]


@dataclass(frozen=True)
class GrammarReport:
    """The answer to a `validate` request, ready for JSON by `as_dict`."""

    backend: str
    kind: str
    warnings: Sequence[str]
    num_first_tokens: int
    forced_prefix: str
    sample: SampleVerdict | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def validate_grammar(
    compiled: CompiledGrammar,
    vocabulary: Vocabulary,
    *,
    backend: str,
    kind: str,
    sample_ids: Sequence[int] | None = None,
) -> GrammarReport:
    """Report on a compiled grammar (which is valid, or compiling would have raised) and on a tokenized sample.

    sample_ids: the sample text as the tokenizer splits it, without special tokens; None for no sample.
    """
    matcher = compiled.matcher()
    try:
        row = np.zeros(vocabulary.num_words, dtype=np.int32)
        matcher.fill(row)
        num_first = int(np.unpackbits(row.view(np.uint8)).sum())
        prefix = _text(vocabulary, matcher.forced())
        sample = None if sample_ids is None else _walk(matcher, row, vocabulary, list(sample_ids))
    finally:
        matcher.close()
    return GrammarReport(backend, kind, list(compiled.warnings), num_first, prefix, sample)


def _walk(matcher: GrammarMatcher, row: np.ndarray[Any, Any], vocabulary: Vocabulary, ids: list[int]) -> SampleVerdict:
    num_taken = matcher.advance(ids)
    may_end = matcher.can_stop()
    matcher.fill(row)
    allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
    text_ids = [int(i) for i in allowed if int(i) not in vocabulary.special_token_ids][:12]
    return SampleVerdict(
        accepted=num_taken == len(ids) and may_end,
        num_tokens=len(ids),
        num_tokens_taken=num_taken,
        accepted_text=_text(vocabulary, ids[:num_taken]),
        refused_text=_text(vocabulary, ids[num_taken:]),
        may_end=may_end,
        expected=[_text(vocabulary, [i]) for i in text_ids],
    )


def _text(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    pieces = vocabulary.token_bytes
    return b"".join(pieces[i] or b"" for i in ids if 0 <= i < len(pieces)).decode(errors="replace")
