"""textgen_compare: the figures of a run, and ratios that are made within a round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from textgen_compare.engines import Engine, Setting, all_engines
from textgen_compare.figures import Record, common_prefix, figures, prefill_tokens_per_s
from textgen_compare.report import as_markdown, plot


def test_figures_of_two_requests() -> None:
    records = [Record(10, 0.0, [1.0, 1.1, 1.2]), Record(30, 1.0, [2.0, 2.3])]
    made = figures(records, stolen_percent=1, foreign_percent=2)
    assert made.output_tokens_per_s == pytest.approx(5 / 2.3)
    assert made.ttft_p50_ms == pytest.approx(1000)
    assert made.inter_token_p99_ms == pytest.approx(300)
    assert made.num_requests == 2
    assert prefill_tokens_per_s(records) == pytest.approx(40 / 2.3)


def test_a_request_without_a_token_makes_a_run_invalid() -> None:
    with pytest.raises(ValueError, match=r"requests \[1\] gave no token"):
        figures([Record(1, 0.0, [1.0]), Record(1, 0.0)], stolen_percent=0, foreign_percent=0)


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1], []) == 0


def _run(engine: str, number: int, rate: float) -> dict[str, Any]:
    level = {"output_tokens_per_s": rate, "stolen_percent": 0.0, "foreign_percent": 1.0}
    return {"engine": engine, "round": number, "cold_start_s": 100 / rate, "levels": {"1": level}}


def test_ratios_are_of_one_round_and_above_one_where_we_are_better(tmp_path: Path) -> None:
    ours, rival = "triton-textgen", "other"
    report = {
        "model": "m",
        "machine": {"processor": "p", "cores": 2, "memory_gib": 24},
        "date": "2026-01-01",
        "rounds": 2,
        "concurrency": [1],
        "new_tokens": 64,
        "prompts": [3, 4],
        "versions": {ours: "1", rival: "2"},
        "precisions": {ours: "float32", rival: "float32"},
        "skipped": {"third": "not installed"},
        "common_prefix": {rival: 64.0},
        # A second round at half speed for both: the ratio stays 2.
        "runs": [_run(ours, 0, 20), _run(rival, 0, 10), _run(ours, 1, 10), _run(rival, 1, 5)],
    }
    page = as_markdown(json.loads(json.dumps(report)))
    assert "| other | 7.5 (5.0 to 10.0) | 2.00 (2.00 to 2.00) |" in page
    assert "| other | 15.0 (10.0 to 20.0) | 2.00 (2.00 to 2.00) |" in page  # the start: ours is the shorter
    assert "- third: skipped: not installed" in page
    said: list[str] = []
    plot(report, tmp_path / "compare.png", said.append)
    assert (tmp_path / "compare.png").exists() or "matplotlib is not installed" in said[0]


def test_what_is_not_installed_says_how_to_get_it(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path, tmp_path / "log", 2)
    reasons = {engine.name: engine.missing() for engine in all_engines(setting) if isinstance(engine, Engine)}
    assert reasons["triton-textgen"] is None
    assert all(
        "make rivals" in (reasons[name] or "") for name in ("vLLM", "llama.cpp", "OpenVINO GenAI", "CTranslate2")
    )
