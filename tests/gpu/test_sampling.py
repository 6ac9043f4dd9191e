"""The sampler on a GPU chooses the tokens it chooses on a CPU, and rows do not depend on their batch there either."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.sampler import GrammarRows, Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

VOCAB = 49_155  # odd, so that rows start at addresses no vector load likes
NUM_STEPS = 4
PARAMS = [
    SamplingParams(),
    SamplingParams(do_sample=True, seed=2**64 - 1),
    SamplingParams(do_sample=True, seed=1, temperature=0.3),
    SamplingParams(do_sample=True, seed=2, top_k=50),
    SamplingParams(do_sample=True, seed=3, top_p=0.9),
    SamplingParams(do_sample=True, seed=4, typical_p=0.5),
    SamplingParams(do_sample=True, seed=5, min_p=0.05),
    SamplingParams(do_sample=True, seed=6, top_k=5000, top_p=0.8, repetition_penalty=1.3, watermark=True),
    SamplingParams(do_sample=True, seed=7, frequency_penalty=0.5, presence_penalty=-0.3, logit_bias=((5, 3.0),)),
    SamplingParams(repetition_penalty=0.8, bad_words=((1,), (2, 3)), allowed_token_ids=tuple(range(0, 4000, 3))),
]


def run(device: str, rows: list[int], logits: Tensor) -> list[list[int]]:
    """Tokens of these rows of PARAMS, batched. logits: [steps, len(PARAMS), VOCAB]."""
    sampler = Sampler(vocab_size=VOCAB, num_slots=len(PARAMS), device=torch.device(device))
    for row in rows:
        sampler.add(
            row,
            PARAMS[row],
            choice=0,
            prompt_ids=[1, 2],
            output_ids=[],
            suppressed_ids=[7],
            suppressed_until=2,
            want_logprobs=row % 2 == 0,
            top_n_tokens=row % 3,
        )
    bits = torch.full((1, -(-VOCAB // 32)), 0x55555555, dtype=torch.int32)
    steps = []
    for i in range(NUM_STEPS):
        mask = GrammarRows(torch.tensor([rows.index(4)]), bits) if 4 in rows else None
        steps.append(sampler.sample(logits[i, rows].to(device), rows, [i] * len(rows), mask).token_ids.cpu())
    tokens: list[list[int]] = torch.stack(steps, dim=1).tolist()
    return tokens


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_gpu_equals_cpu_and_batch_equals_alone(spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((NUM_STEPS, len(PARAMS), VOCAB), generator=generator) * spread
    everything = list(range(len(PARAMS)))
    together = run("cuda", everything, logits)
    assert together == run("cpu", everything, logits)
    assert together == [run("cuda", [row], logits)[0] for row in everything]
