"""A step between its launch and its reading: what is on its way back from the device, and what it leaves pending there.

Overlapped steps (the option `overlap_steps`) keep one such step in flight:

    device  | step 1 ----------| step 2 ----------| step 3 ----------|
    host    | launch 1, 2 | wait | read 1, launch 3 | wait | read 2, launch 4 | ...

A sequence's token is pending from its sampling to its reading. The next step takes it on the device; what the host
would have made of it comes one step late, so that a sequence that ends has a row in one step too many, whose token
nobody takes. A grammar's next mask needs the token: before such a sequence's next step the last one is read. Whatever a
row in flight still writes, and whoever owns its block or slot by then, later steps write later.

Who launches and who reads is the engine's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textgen_engine.batch import PendingTokens
from textgen_engine.errors import EngineError
from textgen_engine.sampling.sampler import PromptLogprobs, SampledTokens
from textgen_engine.scheduler import ScheduledBatch, ScheduledSequence
from textgen_engine.sequence import Sequence
from textgen_engine.transfer import HostCopy


@dataclass(slots=True)
class Round:
    """One call of the sampler: the token of each of some sequences. copy: `tokens` on their way to the host. errors:
    what ends a sequence instead."""

    sequences: list[Sequence]
    tokens: SampledTokens
    copy: HostCopy[SampledTokens]
    errors: dict[Sequence, EngineError]


@dataclass(slots=True)
class Launched:
    """A step whose work is on the device since launched_s: what is needed to read it back.

    first: None where nothing is sampled. guesses: of each sequence that verifies some, where the logits rows behind
    them begin, and the guessed tokens. prepare_s: from the step's begin to launched_s.
    """

    batch: ScheduledBatch
    first: Round | None
    scored: list[tuple[ScheduledSequence, HostCopy[PromptLogprobs]]]
    launched_s: float
    prepare_s: float
    logits: torch.Tensor
    guesses: dict[Sequence, tuple[int, tuple[int, ...]]]

    @property
    def sampled(self) -> list[Sequence]:
        """Sequences with a pending token."""
        return [] if self.first is None else self.first.sequences

    @property
    def pending(self) -> PendingTokens | None:
        """Where their tokens are."""
        if self.first is None:
            return None
        return PendingTokens({sequence: row for row, sequence in enumerate(self.sampled)}, self.first.tokens.token_ids)


class ScoreReader:
    """Log-probabilities of one step on the host; read back once, and only if some row asked for them."""

    def __init__(self, scores: SampledTokens | PromptLogprobs) -> None:
        self._logprobs = None if scores.logprobs is None else scores.logprobs.tolist()
        self._top_ids = None if scores.top_ids is None else scores.top_ids.tolist()
        self._top_logprobs = None if scores.top_logprobs is None else scores.top_logprobs.tolist()

    def logprob(self, row: int) -> float | None:
        return None if self._logprobs is None else self._logprobs[row]

    def top(self, row: int, num: int) -> list[tuple[int, float]]:
        if not num or self._top_ids is None or self._top_logprobs is None:
            return []
        return list(zip(self._top_ids[row][:num], self._top_logprobs[row][:num], strict=True))


def can_repeat(batch: ScheduledBatch) -> bool:
    """Copied blocks may have been written over since, and what has advanced cannot be run again."""
    return not batch.copies and all(entry.sequence.num_computed == entry.start for entry in batch.entries)
