"""Equalities on tiny random models: graph = eager, overlapped = plain, fused = stock, and ours = transformers' own."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import GenerationConfig

from textgen_engine.config import CacheConfig, EngineConfig, LimitsConfig, ModelConfig, SchedulerConfig
from textgen_engine.request import GenerationRequest, OutputParams, StoppingParams
from textgen_engine.sampling.params import SamplingParams
from textgen_gpu.checks import Check, Run
from textgen_gpu.engines import TINY, Collector, load_random, make_engine, model_config, random_model

_SAMPLING = (
    SamplingParams(),
    SamplingParams(do_sample=True, seed=1, temperature=0.8),
    SamplingParams(do_sample=True, seed=2, top_k=20, top_p=0.9),
    SamplingParams(do_sample=True, seed=3, repetition_penalty=1.2, frequency_penalty=0.4),
    SamplingParams(do_sample=True, seed=4, min_p=0.05),
)
_LOGPROB_TOLERANCE = 1e-3


def check_equalities(run: Run, device: torch.device, name: str, num_tokens: int = 24) -> None:
    """All forms of the engine on one tiny model in float32: token by token, log-probabilities within 1e-3."""
    config = model_config(TINY[name])
    if device.type == "cuda":
        loaded, _backend = load_random(config, device, torch.bfloat16)
        run.add(Check(f"{name}, bfloat16: all layers are fused", not loaded.reads_masks))
    expected = _by_transformers(config, device, num_tokens)
    graphs = (1, 2, 4, 8) if device.type == "cuda" else ()
    plain: Collector | None = None
    for form, options in (
        ("stock layers, eager, one step after the other", {"fused": False, "graphs": (), "overlap": False}),
        ("fused layers", {"fused": True, "graphs": (), "overlap": False}),
        ("CUDA graphs", {"fused": True, "graphs": graphs, "overlap": False}),
        ("overlapped steps", {"fused": True, "graphs": (), "overlap": True}),
        ("CUDA graphs and overlapped steps", {"fused": True, "graphs": graphs, "overlap": True}),
    ):
        found = _by_engine(config, device, num_tokens, **options)
        greedy = [found.ids[f"r{i}"] for i in range(0, len(_PROMPTS), len(_SAMPLING))]
        equal = greedy == expected
        passed, note = equal and not found.errors, "; ".join(found.errors[:1])
        run.add(Check(f"{name}, {form}: greedy tokens equal transformers' generate", passed, note))
        if plain is None:
            plain = found
            continue
        same = found.ids == plain.ids
        run.add(Check(f"{name}, {form}: all tokens equal those without", same))
        if same:
            pairs = [(a, b) for i in found.ids for a, b in zip(found.logprobs[i], plain.logprobs[i], strict=True)]
            worst = max(abs(a - b) for a, b in pairs)
            passed = worst <= _LOGPROB_TOLERANCE
            run.add(Check(f"{name}, {form}: log-probabilities", passed, "", worst, _LOGPROB_TOLERANCE))


_rng = random.Random(11)
_PROMPTS = [[_rng.randrange(2, 512) for _ in range(length)] for length in (5, 1, 33, 70, 16, 120, 9, 48, 2, 17)]


def _by_transformers(config: Any, device: torch.device, num_tokens: int) -> list[list[int]]:
    model = random_model(config, device, torch.float32, "eager")
    texts = []
    for prompt in _PROMPTS[:: len(_SAMPLING)]:
        ids = torch.tensor([prompt], device=device)
        settings = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, pad_token_id=0, eos_token_id=-1)
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        texts.append(whole[0, len(prompt) :].tolist())
    return texts


def _by_engine(
    config: Any, device: torch.device, num_tokens: int, *, fused: bool, graphs: tuple[int, ...], overlap: bool
) -> Collector:
    loaded, backend = load_random(config, device, torch.float32, fused=fused)
    settings = EngineConfig(
        model=ModelConfig("", dtype="float32", device=device.type),
        cache=CacheConfig(num_blocks=200, prefix_caching=False),
        scheduler=SchedulerConfig(16, 64),
        limits=LimitsConfig(max_total_tokens=256),
        log_level="error",
    )
    engine, collector = make_engine(loaded, backend, settings, graphs=graphs, overlap=overlap)
    if graphs and engine._runner._graphs is None:
        raise RuntimeError("no graphs were captured")
    for index, prompt in enumerate(_PROMPTS):
        engine.submit(
            GenerationRequest(
                f"r{index}",
                tuple(prompt),
                sampling=_SAMPLING[index % len(_SAMPLING)],
                stopping=StoppingParams(max_new_tokens=num_tokens, ignore_eos_token=True),
                output=OutputParams(logprobs=True),
            )
        )
    for _ in range(1000):
        engine.step()
        if len(collector.done) == len(_PROMPTS):
            break
    engine.check_integrity()
    engine.stop()
    engine.run()
    return collector
