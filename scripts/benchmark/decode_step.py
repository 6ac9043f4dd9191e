#!/usr/bin/env python3
"""Time one decode step of the engine (forward and greedy sampling), fused and compiled against transformers' layers.

    decode_step.py [--model FOLDER] [--dtype bfloat16] [--batches 1,8,32] [--context 300] [--rounds 6] [--profile]
                   [--json results.json]

Both forms are built in one process and take turns, a few steps each, so that what else the machine does falls on both.
So does a read of memory, which says how fast a step could be that did nothing but read the weights and the cache once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_repository" / "textgen" / "1"))

# As the engine's process has it: PyTorch's threads that spin would take the cores from the kernels' own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from textgen_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from textgen_engine.engine import Engine
from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.model_runner import ModelRunner
from textgen_engine.models import loader
from textgen_engine.models.fusion import Fusion
from textgen_engine.parallel import worker
from textgen_engine.request import GenerationRequest, StoppingParams

ROOT = Path(__file__).resolve().parents[2]
STEPS_A_ROUND = 5


def make_engine(
    model: Path,
    batch: int,
    context: int,
    steps: int,
    threads: int,
    *,
    compiled: bool,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Engine:
    """An engine in which `batch` sequences of `context` tokens are decoding."""
    config = EngineConfig(
        model=ModelConfig(str(model), dtype=dtype, num_threads=threads),
        cache=CacheConfig(num_blocks=batch * (-(-(context + steps) // 16) + 2), prefix_caching=False),
        scheduler=SchedulerConfig(batch, 512),
        log_level="error",
    )
    if compiled:
        engine = Engine(config, lambda report: None)
    else:
        with (
            mock.patch.object(worker, "load_kernels", return_value=None),
            mock.patch.object(loader, "fuse_layers", return_value=Fusion()),
        ):
            engine = Engine(config, lambda report: None)
    generator = torch.Generator().manual_seed(0)
    stopping = StoppingParams(max_new_tokens=steps, ignore_eos_token=True)
    for number in range(batch):
        prompt = torch.randint(3, engine.info.vocab_size, (context,), generator=generator).tolist()
        engine.submit(GenerationRequest(str(number), tuple(prompt), stopping=stopping))
    while (
        any(not sequence.num_output_tokens for sequence in engine._requests.choice_of)
        or len(engine._requests.choice_of) < batch
    ):
        engine.step()
    return engine


def timed_step(engine: Engine) -> float:
    begin = time.perf_counter()
    engine.step()
    return (time.perf_counter() - begin) * 1000


class MemoryBound:
    """How long the machine takes to read what a step reads: all weights once, keys and values of its context."""

    def __init__(self, engine: Engine, batch: int, context: int) -> None:
        runner = engine._runner
        model = runner._loaded.model
        weights = [*model.parameters(), *model.buffers()]  # packed and quantized ones are buffers
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        per_token = sum(shape.bytes_per_token(runner._loaded.dtype) for shape in runner._loaded.layers)
        self.cache_bytes = batch * context * per_token
        # In pieces like the weights', together far larger than any cache of the processor.
        self._pieces = [torch.ones(2**22) for _ in range(32)]

    def bytes_per_ms(self) -> float:
        begin = time.perf_counter()
        for piece in self._pieces:
            piece.sum()
        return sum(piece.numel() * 4 for piece in self._pieces) / ((time.perf_counter() - begin) * 1000)

    def milliseconds(self, bytes_per_ms: float) -> float:
        return (self.weight_bytes + self.cache_bytes) / bytes_per_ms


def profile(engine: Engine) -> dict[str, float]:
    """Milliseconds of one compiled step by what it does."""
    spent: defaultdict[str, float] = defaultdict(float)
    with contextlib.ExitStack() as patches:
        for owner, name, label in (
            (CpuKernels, "layers", "decoder layers"),
            (CpuKernels, "linear", "LM head"),
            (CpuKernels, "take", "embedding"),
            (ModelRunner, "forward", "forward pass"),
        ):
            patches.enter_context(mock.patch.object(owner, name, _timed(getattr(owner, name), label, spent)))
        begin = time.perf_counter()
        for _ in range(2 * STEPS_A_ROUND):
            engine.step()
        spent["whole step"] = time.perf_counter() - begin
    milliseconds = {label: 1000 * seconds / (2 * STEPS_A_ROUND) for label, seconds in spent.items()}
    parts = sum(milliseconds[label] for label in ("decoder layers", "LM head", "embedding"))
    milliseconds["rest of the forward pass (transformers, tensors)"] = milliseconds.pop("forward pass") - parts
    milliseconds["sampling, scheduling, reports"] = milliseconds["whole step"] - parts
    milliseconds["sampling, scheduling, reports"] -= milliseconds["rest of the forward pass (transformers, tensors)"]
    return {label: round(value, 2) for label, value in milliseconds.items()}


def _timed(function: Callable[..., Any], label: str, spent: defaultdict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments, **keywords)
        spent[label] += time.perf_counter() - begin
        return result

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the compiled form")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": options.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "context": options.context,
        "dtype": options.dtype,
        "batches": {},
    }
    print(
        "| sequences | PyTorch ms | compiled ms | ratio (median, quartiles) | memory's bound ms | share of it |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    for batch in map(int, options.batches.split(",")):
        steps = (options.rounds + 2) * STEPS_A_ROUND + 40 + batch * options.context // 256
        arguments = (options.model, batch, options.context, steps, options.threads)
        plain = make_engine(*arguments, compiled=False)
        compiled = make_engine(*arguments, compiled=True, dtype=options.dtype)
        times: dict[str, list[float]] = {"pytorch_ms": [], "compiled_ms": []}
        ratios, rates = [], []
        bound = MemoryBound(compiled, batch, options.context)
        for round_number in range(options.rounds + 1):
            pair = [[timed_step(engine) for _ in range(STEPS_A_ROUND)] for engine in (plain, compiled)]
            rate = bound.bytes_per_ms()
            if round_number:  # the first one warms up
                rates.append(rate)
                times["pytorch_ms"] += pair[0]
                times["compiled_ms"] += pair[1]
                ratios.append(statistics.median(pair[0]) / statistics.median(pair[1]))
        entry: dict[str, Any] = {name: [round(value, 2) for value in values] for name, values in times.items()}
        entry["ratios"] = [round(ratio, 3) for ratio in ratios]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = [statistics.median(values) for values in times.values()]
        bound_ms = bound.milliseconds(statistics.median(rates))
        entry["read_gib_per_s"] = [round(rate * 1000 / 2**30, 1) for rate in rates]
        entry["memory_bound_ms"] = round(bound_ms, 2)
        print(
            f"| {batch} | {medians[0]:.1f} | {medians[1]:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) "
            f"| {bound_ms:.1f} | {100 * bound_ms / medians[1]:.0f} % |",
            flush=True,
        )
        if options.profile:
            entry["profile_ms"] = profile(compiled)
            print(json.dumps(entry["profile_ms"], indent=1), flush=True)
        results["batches"][batch] = entry
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
