"""The way of small tensors from host to device, without waiting for what the device does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(
    values: Sequence[Any] | torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The values (a list, or a tensor on the host) on the device.

    To a GPU they go through pinned memory, in the stream's order: the host does not wait. From pageable memory it would
    wait for all work that was launched before, and no step could be launched before the last one is done. PyTorch's
    allocator keeps the pinned memory until the copy is over.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
