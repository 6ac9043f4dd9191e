"""`SamplingParams`: how one request's tokens are chosen. Frozen, plain values, no torch.

Ranges are checked where names and JSON values are read (parameters/), once, before a request is queued.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; the defaults change nothing and choose greedily.

    do_sample: False chooses the most likely token. seed: 64-bit unsigned; always set when do_sample.
    temperature > 0; top_k: 0 is off; top_p, typical_p: 1.0 is off; min_p: 0.0 is off.
    repetition_penalty > 0 (CTRL, over prompt and output; 1.0 is off); frequency_penalty and presence_penalty in
    [-2, 2] (OpenAI's, over output only; 0.0 is off). logit_bias: (token id, bias) pairs.
    allowed_token_ids: None allows all. bad_words: token id sequences that must not be completed.
    watermark: Kirchenbauer et al.'s green list, strength set by the server.
    """

    do_sample: bool = False
    seed: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    watermark: bool = False
