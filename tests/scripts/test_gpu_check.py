"""scripts/gpu_check.py without a GPU: it says so, tries the kernels and exits 0; its parts work on small shapes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from textgen_gpu import report
from textgen_gpu.checks import Check, Run
from textgen_gpu.engines import TINY, model_config
from textgen_gpu.equalities import check_equalities
from textgen_gpu.speed import measure_model, measure_rates

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"
CPU = torch.device("cpu")
pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure")
def test_without_a_gpu_it_says_so_and_exits_0(tmp_path: Path) -> None:
    # What a machine with a GPU may lack is kept from it.
    lacking = "llguidance lmformatenforcer xgrammar psutil click rich accelerate gguf tritonclient pytest flash_attn"
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({lacking.split()!r})); "
        f"sys.argv = ['gpu_check.py', '--output', {str(tmp_path)!r}]; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert "no NVIDIA GPU" in result.stdout and ", 0 failed, 0 not run" in result.stdout
    assert not list(tmp_path.iterdir()), "nothing was measured"


def test_equalities_hold_on_the_cpu() -> None:
    run = Run(time.monotonic() + 300)
    check_equalities(run, CPU, "tiny Qwen3", num_tokens=8)
    assert run.checks and not list(run.failed)


def test_figures_and_their_table(tmp_path: Path) -> None:
    run = Run(time.monotonic() + 300)
    rates = measure_rates(CPU, copied_bytes=1 << 20, size=64)
    config = model_config(TINY["tiny Llama"])
    inputs = (run, "tiny", config, CPU, torch.float32, rates)
    measure_model(*inputs, batches=(1, 3), context=20, prompts=(40,), steps=4, tokens_per_step=64)
    figures = run.figures["models"]["tiny"]
    assert figures["decode"].keys() == {"1", "3"} and figures["prefill"].keys() == {"40"}
    assert all(row["share_of_bandwidth"] > 0 and row["tokens_per_s"] > 0 for row in figures["decode"].values())
    assert figures["prefill"]["40"]["share_of_flops"] > 0
    run.section("a part that fails", 0, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    run.section("a part without time", 1e6, lambda: None)
    results = {
        "versions": {"torch": torch.__version__},
        "checks": [check.__dict__ for check in [*run.checks, Check("fine", True)]],
        "figures": {"rates": rates, "models": {"tiny": figures}, "rivals": {"tiny": {"1": {"step_ms": 3.0}}}},
    }
    written, table = report.write(tmp_path, "NVIDIA H200 (x)", results)
    assert written.name == "nvidia_h200_x.json"
    text = table.read_text()
    assert "1 checks passed, 1 failed, 1 not run" in text and "ZeroDivisionError" in text
    assert "| 3.00 |" in text and "## tiny, random weights" in text


_PART = """
import os, sys, time
from pathlib import Path
from textgen_gpu.checks import Check, Run
run = Run(time.monotonic() + 60, path=Path(sys.argv[1]))
run.figures["models"] = {"tiny": {}}
run.add(Check("before", True))
print("kept", flush=True)
"""


@pytest.mark.parametrize(
    ("then", "verdict"),
    [("", None), ("os.abort()", "its process ended with -6"), ("time.sleep(60)", "stopped after")],
    ids=["well", "crash", "hang"],
)
def test_a_part_that_crashes_or_hangs_costs_itself_alone(tmp_path: Path, then: str, verdict: str | None) -> None:
    run = Run(time.monotonic() + 300)
    path = tmp_path / "part.json"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    run.run_part("part", [sys.executable, "-c", _PART + then, str(path)], path, 20, environment)
    assert run.checks[0] == Check("before", True) and run.figures == {"models": {"tiny": {}}}
    failed = [check.note for check in run.failed]
    assert failed == [] if verdict is None else len(failed) == 1 and failed[0].startswith(verdict)


def test_a_part_without_results_or_time_is_said(tmp_path: Path) -> None:
    run = Run(time.monotonic() + 300)
    run.run_part("silent", [sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "none.json", 60)
    run.deadline_s = time.monotonic() + 5
    run.run_part("late", [sys.executable, "-c", ""], tmp_path / "none.json", 60)
    assert [(check.name, check.passed) for check in run.checks] == [("silent", False), ("late", None)]
