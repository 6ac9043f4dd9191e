"""benchmark/perf_analyzer.py: what it makes of a profile export, and the prompts it sends."""

from __future__ import annotations

from typing import Any

import pytest
from benchmark.perf_analyzer import BenchmarkError, evaluate, prompts

MS = 1_000_000


def _request(start_ms: int, *responses: tuple[int, int]) -> dict[str, Any]:
    """One recorded request; responses are (arrival in ms, tokens in it)."""
    return {
        "timestamp": start_ms * MS,
        "response_timestamps": [when * MS for when, _ in responses],
        "response_outputs": [{"text_output": "x", "num_output_tokens": count} for _, count in responses],
    }


def _export(*requests: dict[str, Any]) -> dict[str, Any]:
    return {"experiments": [{"requests": list(requests)}]}


def test_gaps_are_spread_over_the_tokens_they_brought() -> None:
    level = evaluate(_export(_request(0, (50, 1), (90, 4))), concurrency=1, output_tokens=5)
    assert level.time_to_first_token.p50_ms == 50
    assert level.inter_token.p50_ms == 10
    assert level.inter_token.count == 4
    assert level.response_gap.max_ms == 40
    assert level.tokens_per_response == 2.5


def test_throughput_spans_all_requests() -> None:
    level = evaluate(_export(_request(0, (100, 1), (500, 1)), _request(500, (600, 1), (1000, 1))), 1, output_tokens=2)
    assert level.output_tokens_per_s == pytest.approx(4.0)
    assert level.num_requests == 2


def test_an_empty_last_response_is_no_token() -> None:
    level = evaluate(_export(_request(0, (50, 1), (60, 1), (99, 0))), concurrency=1, output_tokens=2)
    assert level.response_gap.count == 1


def test_a_request_that_ended_early_makes_the_measurement_invalid() -> None:
    with pytest.raises(BenchmarkError, match="gave 2 tokens instead of 3"):
        evaluate(_export(_request(0, (50, 1), (60, 1))), concurrency=1, output_tokens=3)


def test_prompts_differ_from_the_first_words_on() -> None:
    texts = list(prompts())
    assert len(set(texts)) == len(texts) > 128
    assert len({text[:120] for text in texts}) == len(texts)
