"""watermark.py of the client against the engine's own definition and its sampler."""

from __future__ import annotations

import random

import pytest
import torch

from textgen_client import WatermarkScore, detect_watermark
from textgen_client import watermark as client_side
from textgen_engine.sampling import watermark as engine_side
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.sampler import Sampler

VOCAB = 600


def sampled(watermarked: bool, gamma: float, num_tokens: int = 150) -> list[int]:
    """Token ids that the engine's sampler draws from random logits."""
    sampler = Sampler(
        vocab_size=VOCAB, num_slots=1, device=torch.device("cpu"), watermark_gamma=gamma, watermark_delta=2.0
    )
    params = SamplingParams(do_sample=True, seed=3, watermark=watermarked)
    sampler.add(0, params, choice=0, prompt_ids=[9], output_ids=[])
    logits = torch.randn((num_tokens, 1, VOCAB), generator=torch.Generator().manual_seed(5))
    return [int(sampler.sample(logits[step], [0], [step]).token_ids[0]) for step in range(num_tokens)]


@pytest.mark.parametrize("gamma", [0.01, 0.25, 0.5, 0.99])
def test_both_sides_agree(gamma: float) -> None:
    drawn = random.Random(1)
    pairs = [(drawn.randrange(2**bits), drawn.randrange(2**bits)) for bits in (4, 16, 31) for _ in range(2000)]
    for previous_id, token_id in pairs:
        assert client_side.is_green(previous_id, token_id, gamma) == engine_side.is_green(previous_id, token_id, gamma)
    ids = [drawn.randrange(50) for _ in range(500)]
    assert detect_watermark(ids, gamma=gamma).z_score == pytest.approx(engine_side.z_score(ids, gamma))


@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_a_watermark_is_found_and_plain_text_is_not(gamma: float) -> None:
    found = detect_watermark(sampled(True, gamma), gamma=gamma)
    assert found.z_score > 4
    assert found.detected
    assert found.p_value < 1e-4
    plain = detect_watermark(sampled(False, gamma), gamma=gamma)
    assert abs(plain.z_score) < 4
    assert not plain.detected
    assert plain.p_value > 1e-4


def test_few_tokens_say_nothing() -> None:
    for ids in ([], [5]):
        found = detect_watermark(ids)
        assert (found.num_pairs, found.z_score, found.p_value, found.detected) == (0, 0.0, 0.5, False)
    assert detect_watermark([1, 2] * 500).num_pairs == 2  # a repeated pair is no new evidence
    assert WatermarkScore(100, 75, 0.5).z_score == 5.0


def test_what_is_no_text_is_refused() -> None:
    for ids in ([-1, 2], ["a", "b"], [2**32, 1], [1.0, 2.0]):
        with pytest.raises(ValueError, match="token ids"):
            detect_watermark(ids)  # type: ignore[arg-type]
    for gamma in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma"):
            detect_watermark([1, 2], gamma=gamma)
