"""The sampler's kernels for a device: kernels/logits.py on a GPU with Triton's language, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingKernels:
    """See kernels/logits.py."""

    apply_bitmask: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    race_scores: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sampling_kernels(device: torch.device) -> SamplingKernels | None:
    """None: PyTorch's operations serve."""
    if device.type != "cuda":
        return None
    try:
        from textgen_engine.kernels.logits import apply_bitmask, race_scores
    except ImportError:
        return None
    return SamplingKernels(apply_bitmask, race_scores)
