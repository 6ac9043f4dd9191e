#!/usr/bin/env python3
"""Time one sampling step of a batch, for each option alone and for all of them, and print a table and JSON.

    sampler.py [--batch 32] [--vocab 49152] [--threads 2] [--steps 20] [--device cpu]
               [--no-compiled] [--json results.json]

Logits are random with a spread like a language model's (a few tokens hold most of the mass). "flat" rows have hardly
any: the worst case for top_p, whose nucleus then holds thousands of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_repository" / "textgen" / "1"))

# As the engine's process has it: PyTorch's threads that spin would take the cores from the kernels' own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from textgen_engine.kernels.cpu import CpuKernels, load_kernels
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.sampler import GrammarRows, Sampler

SAMPLED = SamplingParams(do_sample=True, seed=1)
EVERYTHING = replace(
    SAMPLED,
    temperature=0.8,
    top_k=50,
    top_p=0.9,
    typical_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    frequency_penalty=0.2,
    presence_penalty=0.1,
    logit_bias=tuple((i, 0.5) for i in range(300)),
    allowed_token_ids=tuple(range(2000)),
    bad_words=((1,), (2, 3), (4, 5, 6)),
    watermark=True,
)


@dataclass(frozen=True)
class Case:
    name: str
    params: SamplingParams
    spread: float = 5.0
    grammar: bool = False
    min_new_tokens: int = 0
    top_n_tokens: int = 0
    logprobs: bool = False


CASES = (
    Case("all off (greedy)", SamplingParams()),
    Case("temperature", replace(SAMPLED, temperature=0.8)),
    Case("top_k 50", replace(SAMPLED, top_k=50)),
    Case("top_k 1000", replace(SAMPLED, top_k=1000)),
    Case("top_p 0.9", replace(SAMPLED, top_p=0.9)),
    Case("top_p 0.9, flat", replace(SAMPLED, top_p=0.9), spread=2.0),
    Case("typical_p 0.95", replace(SAMPLED, typical_p=0.95)),
    Case("min_p 0.05", replace(SAMPLED, min_p=0.05)),
    Case("repetition_penalty", replace(SamplingParams(), repetition_penalty=1.2)),
    Case("frequency + presence", replace(SamplingParams(), frequency_penalty=0.2, presence_penalty=0.1)),
    Case("logit_bias, 300 ids", replace(SamplingParams(), logit_bias=EVERYTHING.logit_bias)),
    Case("allowed_token_ids", replace(SamplingParams(), allowed_token_ids=EVERYTHING.allowed_token_ids)),
    Case("bad_words", replace(SamplingParams(), bad_words=EVERYTHING.bad_words)),
    Case("watermark", replace(SamplingParams(), watermark=True)),
    Case("min_new_tokens", SamplingParams(), min_new_tokens=1000),
    Case("grammar mask", SamplingParams(), grammar=True),
    Case("logprobs", SamplingParams(), logprobs=True),
    Case("top_n_tokens 5", SamplingParams(), top_n_tokens=5),
    Case("everything on", EVERYTHING, grammar=True, min_new_tokens=1000, top_n_tokens=5),
    Case("everything but top_k", replace(EVERYTHING, top_k=0), grammar=True, min_new_tokens=1000, top_n_tokens=5),
)


def measure(
    case: Case, batch: int, vocab: int, steps: int, device: torch.device, kernels: CpuKernels | None
) -> dict[str, Any]:
    """Milliseconds of one `sample` call: best and median of `steps` after three to warm up, and the very first."""
    sampler = Sampler(vocab_size=vocab, num_slots=batch, device=device, cpu_kernels=kernels)
    for slot in range(batch):
        sampler.add(
            slot,
            replace(case.params, seed=slot),
            choice=0,
            prompt_ids=range(slot, slot + 500),
            output_ids=[],
            suppressed_ids=(0, 2),
            suppressed_until=case.min_new_tokens,
            want_logprobs=case.logprobs,
            top_n_tokens=case.top_n_tokens,
        )
    logits = torch.randn((batch, vocab), generator=torch.Generator().manual_seed(0)).mul_(case.spread).to(device)
    mask = None
    if case.grammar:
        mask = GrammarRows(torch.arange(batch), torch.full((batch, -(-vocab // 32)), -1, dtype=torch.int32))
    times_ms = []
    for i in range(steps + 3):
        begun = time.perf_counter()
        sampler.sample(logits, range(batch), [i] * batch, mask).token_ids.cpu()
        times_ms.append((time.perf_counter() - begun) * 1e3)
    return {
        "case": case.name,
        "best_ms": round(min(times_ms[3:]), 3),
        "median_ms": round(statistics.median(times_ms[3:]), 3),
        "first_ms": round(times_ms[0], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"batch {arguments.batch}, vocabulary {arguments.vocab}, {arguments.device}, {arguments.threads} threads\n")
    print(f"{'one step, ms':24}{'best':>9}{'median':>9}{'first':>9}")
    results = []
    kernels = load_kernels(arguments.threads) if arguments.compiled and arguments.device == "cpu" else None
    for case in CASES:
        device = torch.device(arguments.device)
        result = measure(case, arguments.batch, arguments.vocab, arguments.steps, device, kernels)
        times = f"{result['best_ms']:9.2f}{result['median_ms']:9.2f}{result['first_ms']:9.2f}"
        print(f"{case.name:24}{times}", flush=True)
        results.append(result)
    text = json.dumps({**vars(arguments), "json": None, "torch": torch.__version__, "results": results})
    print(f"\n{text}")
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
