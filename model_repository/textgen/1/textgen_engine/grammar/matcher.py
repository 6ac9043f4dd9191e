"""`TextMatcher`: the part of every matcher that no library does alike: where a text may end, and what is no text.

A backend's matcher fills in four small methods on text tokens. This class keeps end-of-sequence ids, special tokens,
ids beyond the tokenizer and dead ends out of their hands, so that all backends behave the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from textgen_engine.grammar.base import MaskRow
from textgen_engine.grammar.vocabulary import Vocabulary

DEAD_END = "the grammar leaves no token of this vocabulary to go on with"


class TextMatcher(ABC):
    """Implements base.GrammarMatcher over the hooks below."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._ended = False  # an end-of-sequence id was taken
        self._error: str | None = None

    # What a backend provides. None of them sees an end-of-sequence id.

    @abstractmethod
    def _fill_text(self, row: MaskRow) -> None:
        """Write the library's row; bits of special tokens and unknown ids do not matter. May call `fail`."""

    @abstractmethod
    def _advance_text(self, token_ids: Sequence[int]) -> int:
        """Take text tokens; return how many were taken."""

    @abstractmethod
    def _rollback_text(self, num_tokens: int) -> None: ...

    @abstractmethod
    def _may_end(self) -> bool: ...

    @abstractmethod
    def _must_end(self) -> bool: ...

    def _forced_text(self) -> list[int]:
        return []

    # base.GrammarMatcher

    def ready(self) -> bool:
        return True

    def fill(self, row: MaskRow) -> None:
        if not self._ended and self._error is None:
            self._fill_text(row)
        self.finish_row(row)

    def finish_row(self, row: MaskRow) -> None:
        """Turn the library's row into ours, in place (called by `fill`, and after a fill of many rows at once)."""
        if self._ended or self._error is not None:
            row[:] = self._vocabulary.eos_row
            return
        np.bitwise_and(row, self._vocabulary.text_row, out=row)
        if self.can_stop():
            np.bitwise_or(row, self._vocabulary.eos_row, out=row)
        elif not row.any():
            self.fail(DEAD_END)
            row[:] = self._vocabulary.eos_row

    def advance(self, token_ids: Sequence[int]) -> int:
        if self._ended or self._error is not None:
            return 0
        ids = list(token_ids)
        eos = set(self._vocabulary.eos_token_ids)
        special = self._vocabulary.special_token_ids
        num_text = next((i for i, token_id in enumerate(ids) if token_id in special), len(ids))
        num_taken = self._advance_text(ids[:num_text]) if num_text else 0
        if num_taken == num_text < len(ids) and ids[num_text] in eos and self.can_stop():
            self._ended = True
            num_taken += 1
        return num_taken

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens >= 0
        if num_tokens and self._ended:
            self._ended = False
            num_tokens -= 1
        if num_tokens:
            self._rollback_text(num_tokens)

    def forced(self) -> list[int]:
        if self._ended or self._error is not None:
            return []
        forced = []
        for token_id in self._forced_text():
            if token_id in self._vocabulary.special_token_ids:
                break
            forced.append(token_id)
        return forced

    def is_complete(self) -> bool:
        return self._ended or (self._error is None and self._may_end() and self._must_end())

    def can_stop(self) -> bool:
        return self._ended or (self._error is None and self._may_end())

    def error(self) -> str | None:
        return self._error

    def close(self) -> None:
        return None

    def fail(self, message: str) -> None:
        """End this matcher's life for a reason; the first reason stays."""
        if self._error is None:
            self._error = message
