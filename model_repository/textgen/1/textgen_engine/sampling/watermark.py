"""The green list of the watermark: which tokens are favoured after a given token. Integers only, no torch.

Owns the definition, so that a detector can repeat it anywhere: it needs the token ids, `gamma` and this file.
The batched torch version is `randomness.green_bits`; a test holds the two together.

Source: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", algorithm 2 (left hash, soft list) and the
z-score of section 4. One difference: the paper permutes the vocabulary and takes exactly `gamma * vocab_size` ids;
here each id is green when a hash of (previous id, id) falls below `gamma`, so a list needs no vocabulary size and no
permutation. The expected share of green tokens, and so the z-score, is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_MASK = 0xFFFFFFFF
ID_SALT = 0x9E3779B9  # separates the hash of an id from the id itself; the golden ratio as a 32-bit fraction
PREVIOUS_SALT = 0x7F4A7C15  # separates "previous id" from "id", so that a token is not tied to its own repetition
GREEN_MULTIPLIER = 0x21F0AAAD


def mix32(value: int) -> int:
    """A bijection on 32-bit integers in which every input bit reaches every output bit ("lowbias32", C. Wellons)."""
    value &= _MASK
    value ^= value >> 16
    value = (value * 0x21F0AAAD) & _MASK
    value ^= value >> 15
    value = (value * 0xD35A2D97) & _MASK
    value ^= value >> 15
    return value


def green_threshold(gamma: float) -> int:
    """The 31-bit number below which a hash means green; `gamma` in (0, 1) is the share of green tokens."""
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"watermark gamma must be between 0 and 1, both excluded; given: {gamma!r}")
    return min(round(gamma * 2**31), 2**31 - 1)


def is_green(previous_id: int, token_id: int, gamma: float) -> bool:
    """Whether `token_id` is on the green list that follows `previous_id`."""
    mixed = mix32(token_id ^ ID_SALT) ^ mix32(previous_id ^ PREVIOUS_SALT)
    mixed = (mixed * GREEN_MULTIPLIER) & _MASK
    mixed ^= mixed >> 15
    mixed = (mixed * GREEN_MULTIPLIER) & _MASK
    return (mixed >> 1) < green_threshold(gamma)


def z_score(token_ids: Sequence[int], gamma: float) -> float:
    """How many standard deviations more green tokens than chance; above 4 is a one in 30,000 false alarm.

    Counts each distinct (previous, token) pair once, as the paper advises: a repeated pair is no new evidence.
    Returns 0.0 for fewer than two tokens.
    """
    pairs = set(itertools.pairwise(token_ids))
    if not pairs:
        return 0.0
    num_green = sum(is_green(previous, token, gamma) for previous, token in pairs)
    return (num_green - gamma * len(pairs)) / math.sqrt(len(pairs) * gamma * (1.0 - gamma))
