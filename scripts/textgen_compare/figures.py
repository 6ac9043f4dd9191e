"""What one run measured: records of requests in, figures out. Pure functions of times."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Record:
    """One request: seconds on one clock. times: arrival of each output token."""

    num_prompt_tokens: int
    submitted: float
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Figures:
    """One run of one engine at one concurrency.

    output_tokens_per_s includes the time that prompts took. decode_step_ms: lower quartile of the gaps between tokens,
    a step that carries no prompt. stolen_percent, foreign_percent: processor time that the host withheld, and that
    processes other than the engine and this one used.
    """

    output_tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    inter_token_p50_ms: float
    inter_token_p99_ms: float
    decode_step_ms: float
    seconds: float
    num_requests: int
    stolen_percent: float
    foreign_percent: float


def figures(records: Sequence[Record], *, stolen_percent: float, foreign_percent: float) -> Figures:
    """The figures of a run. Raises ValueError when a request gave no token."""
    silent = [number for number, record in enumerate(records) if not record.times]
    if silent:
        raise ValueError(f"requests {silent} gave no token")
    began = min(record.submitted for record in records)
    ended = max(record.times[-1] for record in records)
    first = [record.times[0] - record.submitted for record in records]
    gaps = [later - sooner for record in records for sooner, later in itertools.pairwise(record.times)] or [0.0]
    return Figures(
        output_tokens_per_s=sum(len(record.times) for record in records) / (ended - began),
        ttft_p50_ms=1e3 * statistics.median(first),
        ttft_p99_ms=1e3 * quantile(first, 0.99),
        inter_token_p50_ms=1e3 * statistics.median(gaps),
        inter_token_p99_ms=1e3 * quantile(gaps, 0.99),
        decode_step_ms=1e3 * quantile(gaps, 0.25),
        seconds=ended - began,
        num_requests=len(records),
        stolen_percent=stolen_percent,
        foreign_percent=foreign_percent,
    )


def prefill_tokens_per_s(records: Sequence[Record]) -> float:
    """Rate of a run in which each request asked for one token."""
    began = min(record.submitted for record in records)
    ended = max(record.times[-1] for record in records)
    return sum(record.num_prompt_tokens for record in records) / (ended - began)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Leading tokens that two outputs share."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return sum(1 for _ in pairs)
