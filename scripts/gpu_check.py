#!/usr/bin/env python3
"""Check and measure the engine's GPU path: one command, no network, no checkpoint, under 8 minutes.

    gpu_check.py [--seconds 450] [--output benchmarks/results] [--only kernels,attention,equalities,speed,rivals]

Every Triton kernel, and every attention library that is installed, against PyTorch's operations; graph = eager,
overlapped = plain, fused = stock on tiny random models; then decode and prefill of random weights in the shapes of
Qwen3-0.6B and Llama-3.1-8B, as shares of the memory bandwidth and the matrix rate measured in the same run, beside
transformers' continuous batching. Writes <gpu>.json and a table.

Each part runs in a process of its own and within a time of its own: one that crashes or hangs costs the others nothing,
and the results of what was done are written after each of them.

Without a GPU the kernels run in Triton's interpreter at small sizes, and that is all. Exits 0 when nothing failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "model_repository" / "textgen" / "1"), str(ROOT / "scripts")]

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched, however long the answer would take

import torch  # noqa: E402

from textgen_gpu.checks import Check, Run  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton

# Seconds that each part may take: several times what it should.
PARTS = {"kernels": 150.0, "attention": 120.0, "equalities": 120.0, "speed": 200.0, "rivals": 150.0}
# Of a part's time, what is kept for its process to start and to write down how it ended.
_MARGIN_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450.0, help="what does not fit into this time is left out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)  # of a part's process: where its results go
    given = parser.parse_args()
    parts = given.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    run = Run(time.monotonic() + given.seconds, path=given.keep)
    if not HAS_GPU:
        check_interpreted(run)
    elif given.keep is not None:
        for part in parts:
            do_part(run, part)
        return 1 if any(run.failed) else 0
    else:
        measure(run, parts, given.output)
    return finish(run)


def check_interpreted(run: Run) -> None:
    print(
        f"no NVIDIA GPU that PyTorch {torch.__version__} could use: the kernels are tried in Triton's interpreter, "
        f"nothing is measured"
    )
    try:
        import triton
        from triton.runtime.errors import InterpreterError
    except ImportError:
        print("Triton's language is not installed either: nothing to do")
        return
    import numpy as np

    from textgen_gpu.kernels import check_kernels

    def interpret() -> None:
        try:
            check_kernels(run, torch.device("cpu"))
        except InterpreterError as error:
            if "0-dimensional" not in str(error):  # NumPy 2.4 makes no integer of an array of one element any more
                raise
            note = f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}"
            run.add(Check("kernels", None, note))

    run.section("kernels", 10, interpret)


def measure(run: Run, parts: list[str], output: Path) -> None:
    """Each part in its own process, which alone uses the GPU; the results after each of them."""
    import transformers
    import triton

    from textgen_gpu import report

    name = torch.cuda.get_device_name(0)
    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(", ".join([name, *(f"{package} {version}" for package, version in versions.items())]), flush=True)
    paths: tuple[Path, ...] = ()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            kept = Path(folder) / f"{part}.json"
            limit_s = min(PARTS[part], run.seconds_left)
            command = [sys.executable, __file__, "--only", part, "--keep", str(kept)]
            run.run_part(part, [*command, "--seconds", str(limit_s - _MARGIN_S)], kept, limit_s)
            results = {
                "device": name,
                "versions": versions,
                "checks": [dataclasses.asdict(check) for check in run.checks],
                "figures": run.figures,
            }
            paths = report.write(output, name, results)
    for path in paths:
        print(f"written: {path}")


def do_part(run: Run, part: str) -> None:
    from textgen_gpu.engines import SHAPES, TINY, model_config

    device = torch.device("cuda", 0)
    if part == "kernels":
        from textgen_gpu.kernels import check_kernels

        run.section(part, 0, lambda: check_kernels(run, device))
    elif part == "attention":
        from textgen_gpu.attention import check_attention

        run.section(part, 0, lambda: check_attention(run, device))
    elif part == "equalities":
        from textgen_gpu.equalities import check_equalities

        for tiny in TINY:
            run.section(f"equalities of {tiny}", 10, lambda tiny=tiny: check_equalities(run, device, tiny))  # type: ignore[misc]
    elif part == "speed":
        from textgen_gpu.speed import measure_model, measure_rates

        def rates() -> None:
            run.figures["rates"] = measure_rates(device)

        def ours(shape: str) -> None:
            config = model_config(SHAPES[shape])
            measure_model(run, shape, config, device, torch.bfloat16, run.figures["rates"])

        run.section("rates", 0, rates)
        for shape in SHAPES:
            run.section(f"speed of {shape}", 25, lambda shape=shape: ours(shape))  # type: ignore[misc]
    else:
        from textgen_gpu.rival import measure_rival

        def theirs(shape: str) -> None:
            measure_rival(run, shape, model_config(SHAPES[shape]), device, torch.bfloat16, (1, 16, 64, 256))

        for shape in SHAPES:
            run.section(f"transformers' speed of {shape}", 15, lambda shape=shape: theirs(shape))  # type: ignore[misc]


def finish(run: Run) -> int:
    failed = list(run.failed)
    passed = sum(check.passed is True for check in run.checks)
    print(f"{passed} checks passed, {len(failed)} failed, {len(run.checks) - passed - len(failed)} not run")
    for check in failed:
        print(f"  FAILED: {check.name} {check.note}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
