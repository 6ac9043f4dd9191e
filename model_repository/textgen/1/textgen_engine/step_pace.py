"""How many tokens of prompts a step may carry without keeping running streams waiting; learnt from the steps' times.

A step's time is taken as that of its decodes plus a cost for each token of a prompt (after Sarathi-Serve, Agrawal et
al. 2024, section 4, whose budget is profiled ahead instead of learnt). Knows counts and seconds, no sequences.
"""

from __future__ import annotations

import statistics
from collections import deque

# Medians of so many recent steps: one step that the machine delayed changes nothing.
_WINDOW = 15
# A chunk is never smaller: below, a prompt would hardly get on.
_MIN_TOKENS = 16
# The first chunk beside streams, when nothing is known of its cost yet.
_FIRST_TOKENS = 64


class StepPace:
    """stretch: how many times as long as its decodes alone a step with prompts may take; larger than 1."""

    def __init__(self, stretch: float) -> None:
        assert stretch > 1
        self._stretch = stretch
        self._decode_s: dict[int, deque[float]] = {}  # by num_decodes, rounded up to a power of two
        self._token_s: deque[float] = deque(maxlen=_WINDOW)

    def observe(self, num_decodes: int, num_prompt_tokens: int, step_s: float) -> None:
        """Learn from a step that was run."""
        if num_decodes and not num_prompt_tokens:
            self._decode_s.setdefault(_bucket(num_decodes), deque(maxlen=_WINDOW)).append(step_s)
        elif num_prompt_tokens:
            decode_s = self._decodes_s(num_decodes) if num_decodes else 0.0
            if decode_s is not None:
                self._token_s.append(max(step_s - decode_s, 0.0) / num_prompt_tokens)

    def prompt_tokens(self, num_decodes: int) -> int | None:
        """Most tokens of prompts beside so many decodes; None while the time of such decodes is unknown."""
        decode_s = self._decodes_s(num_decodes)
        if decode_s is None:
            return None
        if not self._token_s:
            return _FIRST_TOKENS
        token_s = max(statistics.median(self._token_s), 1e-9)
        return max(int((self._stretch - 1) * decode_s / token_s), _MIN_TOKENS)

    def _decodes_s(self, num_decodes: int) -> float | None:
        """Of the measured batches the nearest in size, the smaller of two: streams wait less rather than more."""
        bucket = _bucket(num_decodes)
        if not self._decode_s:
            return None
        nearest = min(self._decode_s, key=lambda known: (abs(known.bit_length() - bucket.bit_length()), known))
        return statistics.median(self._decode_s[nearest])


def _bucket(num_decodes: int) -> int:
    return 1 << (num_decodes - 1).bit_length()
