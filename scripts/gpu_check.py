#!/usr/bin/env python3
"""Check and measure the engine's GPU path: one command, no network, no checkpoint, under 8 minutes.

    gpu_check.py [--seconds 450] [--output benchmarks/results] [--only kernels,equalities,speed]

Every Triton kernel against its PyTorch reference; graph = eager, overlapped = plain, fused = stock on tiny random
models; then decode and prefill of random weights in the shapes of Qwen3-0.6B and Llama-3.1-8B, as shares of the memory
bandwidth and the matrix rate measured in the same run, beside transformers' continuous batching. Writes <gpu>.json and
a table.

Without a GPU the kernels run in Triton's interpreter at small sizes, and that is all. Exits 0 when nothing failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "model_repository" / "textgen" / "1"), str(ROOT / "scripts")]

import torch  # noqa: E402

if TYPE_CHECKING:
    from textgen_gpu.checks import Run

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton

PARTS = ("kernels", "equalities", "speed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450.0, help="what does not fit into this time is left out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    given = parser.parse_args()
    parts = given.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")

    from textgen_gpu.checks import Run
    from textgen_gpu.kernels import check_kernels

    run = Run(time.monotonic() + given.seconds)
    if not HAS_GPU:
        print("no NVIDIA GPU: the kernels are tried in Triton's interpreter, nothing is measured")
        try:
            import triton  # noqa: F401
        except ImportError:
            print("Triton's language is not installed either: nothing to do")
            return 0
        run.section("kernels", 10, lambda: check_kernels(run, torch.device("cpu")))
        return finish(run)
    measure(run, parts, given.output)
    return finish(run)


def measure(run: Run, parts: list[str], output: Path) -> None:
    import transformers
    import triton

    from textgen_gpu import report
    from textgen_gpu.attention import check_attention
    from textgen_gpu.engines import SHAPES, TINY, model_config
    from textgen_gpu.equalities import check_equalities
    from textgen_gpu.kernels import check_kernels
    from textgen_gpu.rival import measure_rival
    from textgen_gpu.speed import measure_model, measure_rates

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}")
    if "kernels" in parts:
        run.section("kernels", 30, lambda: check_kernels(run, device))
        run.section("attention", 30, lambda: check_attention(run, device))
    if "equalities" in parts:
        for tiny in TINY:
            run.section(f"equalities of {tiny}", 20, lambda tiny=tiny: check_equalities(run, device, tiny))  # type: ignore[misc]
    if "speed" in parts:
        models, rivals = run.figures.setdefault("models", {}), run.figures.setdefault("rivals", {})

        def rates() -> None:
            run.figures["rates"] = measure_rates(device)

        def ours(shape: str) -> None:
            config = model_config(SHAPES[shape])
            models[shape] = measure_model(run, config, device, torch.bfloat16, run.figures["rates"])

        def theirs(shape: str) -> None:
            rivals[shape] = measure_rival(run, model_config(SHAPES[shape]), device, torch.bfloat16, (1, 16, 64, 256))

        run.section("rates", 10, rates)
        for shape in SHAPES:
            run.section(f"speed of {shape}", 45, lambda shape=shape: ours(shape))  # type: ignore[misc]
        for shape in SHAPES:
            run.section(f"transformers' speed of {shape}", 45, lambda shape=shape: theirs(shape))  # type: ignore[misc]
    results = {
        "device": name,
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "checks": [dataclasses.asdict(check) for check in run.checks],
        "figures": run.figures,
    }
    for path in report.write(output, name, results):
        print(f"written: {path}")


def finish(run: Run) -> int:
    failed = list(run.failed)
    passed = sum(check.passed is True for check in run.checks)
    print(f"{passed} checks passed, {len(failed)} failed, {len(run.checks) - passed - len(failed)} not run")
    for check in failed:
        print(f"  FAILED: {check.name} {check.note}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
