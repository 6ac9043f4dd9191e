"""TEXTGEN_BATCH_INVARIANT: log-probabilities equal to the last bit, whatever ran beside a request."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from textgen_engine.models.cpu_linear import TiledLinear
from textgen_engine.request import GenerationRequest, OutputParams

from .tiny import Harness, make_request

PROMPT = [random.Random(7).randrange(3, 500) for _ in range(45)]


def _request() -> GenerationRequest:
    return make_request("a", PROMPT, 24, ignore_eos_token=True, output=OutputParams(logprobs=True))


def _logprobs(harness: Harness) -> list[float | None]:
    return [detail.logprob for detail in harness.answers["a"].details()]


def _neighbours(name: str, count: int, seed: int) -> list[GenerationRequest]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 500) for _ in range(rng.randint(1, 90))] for _ in range(count)]
    return [make_request(f"{name} {number}", prompt, 9 + number) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens_per_step": 16},
        {"block_size": 4, "num_blocks": 40},
        {"prefix_caching": False},
    ],
    ids=["batched", "chunked", "preempted", "no prefix cache"],
)
def test_to_the_last_bit(new_engine: Callable[..., Harness], options: dict[str, Any]) -> None:
    alone = new_engine(batch_invariant=True)
    alone.submit(_request())
    alone.until_idle()
    expected = _logprobs(alone)
    assert len(expected) == 24

    crowded = new_engine(batch_invariant=True, **options)
    crowded.submit(*_neighbours("early", 5, seed=1))
    crowded.step()
    crowded.submit(_request())
    crowded.step(4)
    crowded.submit(*_neighbours("late", 4, seed=2))
    crowded.until_idle()
    assert _logprobs(crowded) == expected
    assert crowded.num_preemptions > 0 or "num_blocks" not in options


def test_a_row_of_a_tiled_linear_is_the_same_wherever_it_stands() -> None:
    torch.manual_seed(0)
    linear = TiledLinear(torch.nn.Linear(576, 1536))
    row = torch.randn(576)
    expected = linear(row[None])[0]
    for num_rows in (2, 15, 16, 17, 40):
        for place in {0, num_rows // 2, num_rows - 1}:
            rows = torch.randn(num_rows, 576)
            rows[place] = row
            assert torch.equal(linear(rows)[place], expected)
