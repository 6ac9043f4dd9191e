"""scripts/textgen_coverage: a sample of the sweep that `make test-models` runs over all models, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from textgen_coverage import page
from textgen_coverage.check import Verdict, try_model
from textgen_coverage.recipes import model_types


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "model_type",
    ["arcee", "glm4_moe", "longcat_flash", "mimo_v2_flash", "roberta", "seed_oss", "whisper"],
)
def test_works(model_type: str, tmp_path: Path) -> None:
    verdict = try_model(model_type, tmp_path)
    assert (verdict.outcome, verdict.reason) == ("works", "")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_next", "Qwen3NextGatedDeltaNet"),
        ("lfm2", "Lfm2ShortConv"),
        ("glm_moe_dsa", "GlmMoeDsaIndexer"),
        ("minimax_m3_vl_text", "block_indices"),
        ("inkling_text", "position_bias"),
    ],
)
def test_is_refused_by_name(model_type: str, reason: str, tmp_path: Path) -> None:
    verdict = try_model(model_type, tmp_path)
    assert verdict.outcome == "refused" and reason in verdict.reason


def test_every_model_has_been_tried_and_none_answers_wrongly() -> None:
    verdicts = page.read_results()
    assert [verdict.model_type for verdict in verdicts] == model_types()
    assert not [verdict for verdict in verdicts if verdict.outcome in ("differs", "fails")]


def test_the_page_is_current() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "run python scripts/model_coverage.py --write llama"


def test_a_share_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict("a", "works"), Verdict("b", "refused", "it has X, which carry state outside the KV cache")]
    assert "whose layers are attention alone, 1 work: 100 %" in page._summary(verdicts)
