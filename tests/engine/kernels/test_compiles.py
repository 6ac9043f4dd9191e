"""Every kernel compiles to machine code, for a GPU that need not be there; the interpreter alone would not tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# What a program may have of shared memory on the smallest devices that are meant to be served (8.6, 8.9).
MOST_SHARED_BYTES = 99 * 1024
ALL = {"_attend_run", "_join_runs", "_rms_norm", "_gated", "_rotary_store", "_apply_bitmask", "_race_scores"}
ALL |= {"_coded_linear"}


def test_for_compute_capability_9(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_all.py")), "90"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _ in lines} == ALL
    assert max(int(shared) for _, shared in lines) <= MOST_SHARED_BYTES
