"""What scripts/gpu_check.py compares, as tests: kernels, attention libraries, graphs, overlap, fused layers."""

from __future__ import annotations

import time

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("part", ["kernels", "attention", "tiny Llama", "tiny Qwen3"])
def test_part(part: str) -> None:
    from textgen_gpu.attention import check_attention
    from textgen_gpu.checks import Run
    from textgen_gpu.equalities import check_equalities
    from textgen_gpu.kernels import check_kernels

    run = Run(time.monotonic() + 250)
    if part == "kernels":
        check_kernels(run, DEVICE)
    elif part == "attention":
        check_attention(run, DEVICE)
    else:
        check_equalities(run, DEVICE, part)
    assert any(check.passed for check in run.checks)
    assert not list(run.failed)
