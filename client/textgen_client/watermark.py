"""Does a text carry the watermark of a server (`watermark=true`)? Counts "green" tokens and says how unlikely that is.

Repeats the server's definition of green in plain integers, so that a detector needs the token ids and `gamma` alone:
neither the model nor the server's code. (A test holds the two together.) `Client.tokenize` gives the ids of a text.

Source: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", section 4 (one-proportion z-test).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

DEFAULT_GAMMA = 0.5
# One false alarm in 30,000 texts.
MIN_Z_SCORE = 4.0

_MASK = 0xFFFFFFFF
_ID_SALT = 0x9E3779B9
_PREVIOUS_SALT = 0x7F4A7C15
_GREEN_MULTIPLIER = 0x21F0AAAD


@dataclass(frozen=True, slots=True)
class WatermarkScore:
    """num_pairs: distinct (previous id, id) pairs of the text; a repeated pair is no new evidence. num_green: those
    whose second id was favoured after the first. gamma: the share that is green by chance."""

    num_pairs: int
    num_green: int
    gamma: float

    @property
    def z_score(self) -> float:
        """Standard deviations above chance; 0 for a text without pairs."""
        if not self.num_pairs:
            return 0.0
        deviation = math.sqrt(self.num_pairs * self.gamma * (1.0 - self.gamma))
        return (self.num_green - self.gamma * self.num_pairs) / deviation

    @property
    def p_value(self) -> float:
        """Probability that a text without the watermark scores so high (normal approximation: from 30 pairs on)."""
        return 0.5 * math.erfc(self.z_score / math.sqrt(2.0))

    @property
    def detected(self) -> bool:
        return self.z_score > MIN_Z_SCORE


def detect_watermark(token_ids: Iterable[int], *, gamma: float = DEFAULT_GAMMA) -> WatermarkScore:
    """Score the ids of a text, the prompt left out as far as known. gamma: the server's `WATERMARK_GAMMA`.

    Raises ValueError for a gamma that is not between 0 and 1, and for ids that are none.
    """
    threshold = _green_threshold(gamma)
    ids = list(token_ids)
    if not all(isinstance(token_id, int) and 0 <= token_id <= _MASK for token_id in ids):
        raise ValueError("token ids must be integers between 0 and 2**32 - 1")
    pairs = set(itertools.pairwise(ids))
    num_green = sum(_green_hash(previous, token) < threshold for previous, token in pairs)
    return WatermarkScore(len(pairs), num_green, gamma)


def is_green(previous_id: int, token_id: int, gamma: float = DEFAULT_GAMMA) -> bool:
    """Whether the server favours `token_id` after `previous_id`."""
    return _green_hash(previous_id, token_id) < _green_threshold(gamma)


def _green_threshold(gamma: float) -> int:
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"gamma must be between 0 and 1, both excluded; given: {gamma!r}")
    return min(round(gamma * 2**31), 2**31 - 1)


def _green_hash(previous_id: int, token_id: int) -> int:
    """31 bits, evenly spread."""
    mixed = _mix32(token_id ^ _ID_SALT) ^ _mix32(previous_id ^ _PREVIOUS_SALT)
    mixed = (mixed * _GREEN_MULTIPLIER) & _MASK
    mixed ^= mixed >> 15
    return ((mixed * _GREEN_MULTIPLIER) & _MASK) >> 1


def _mix32(value: int) -> int:
    """A bijection on 32-bit integers in which every input bit reaches every output bit ("lowbias32", C. Wellons)."""
    value &= _MASK
    value ^= value >> 16
    value = (value * 0x21F0AAAD) & _MASK
    value ^= value >> 15
    value = (value * 0xD35A2D97) & _MASK
    return value ^ (value >> 15)
