"""`MaskFiller`: the rows of one batch, filled together into one packed array.

Only constrained rows exist in the array; the rows of free sequences are neither made nor touched. Applying the bits to
logits is the sampler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from textgen_engine.grammar.base import GrammarMatcher, MaskRow
from textgen_engine.grammar.vocabulary import Vocabulary


class RowGroup(Protocol):
    """A backend that fills many rows faster together than one by one."""

    def fill_rows(self, matchers: Sequence[GrammarMatcher], rows: MaskRow, row_ids: Sequence[int]) -> None:
        """Fill `rows[row_ids[i]]` ([num_rows, num_words], C order) for each matcher, finished."""
        ...


@runtime_checkable
class Grouped(Protocol):
    """A matcher whose backend is a RowGroup."""

    group: Any


@dataclass(frozen=True)
class GrammarMask:
    """The constrained rows of one batch.

    rows: int64 [n], their places in the batch's logits. bits: int32 [n, num_words].
    errors: (index into rows, text) of matchers that failed; their rows allow the end-of-sequence ids only, and the
    caller fails those requests.
    """

    rows: np.ndarray[Any, np.dtype[np.int64]]
    bits: MaskRow
    errors: Sequence[tuple[int, str]]


class MaskFiller:
    """Fills masks for one engine. One thread at a time; it may be another one than the engine's."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    @property
    def num_words(self) -> int:
        return self._vocabulary.num_words

    def fill(self, work: Sequence[tuple[int, GrammarMatcher]], out: MaskRow | None = None) -> GrammarMask:
        """Fill one row per (row of the logits, matcher).

        out: int32 [>= len(work), num_words] in C order to write into (pinned memory); its first len(work) rows become
        `bits`. Allocated where None.
        """
        num_rows = len(work)
        bits = np.empty((num_rows, self.num_words), dtype=np.int32) if out is None else out[:num_rows]
        groups: dict[int, tuple[RowGroup, list[GrammarMatcher], list[int]]] = {}
        alone: list[int] = []
        for index, (_, matcher) in enumerate(work):
            if isinstance(matcher, Grouped):
                _, members, row_ids = groups.setdefault(id(matcher.group), (matcher.group, [], []))
                members.append(matcher)
                row_ids.append(index)
            else:
                alone.append(index)
        for group, members, row_ids in groups.values():
            if len(members) == 1:
                members[0].fill(bits[row_ids[0]])
            else:
                group.fill_rows(members, bits, row_ids)
        for index in alone:
            work[index][1].fill(bits[index])
        errors = [(index, text) for index, (_, matcher) in enumerate(work) if (text := matcher.error()) is not None]
        return GrammarMask(np.array([row for row, _ in work], dtype=np.int64), bits, errors)
