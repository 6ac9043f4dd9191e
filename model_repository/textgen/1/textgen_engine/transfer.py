"""The way of small tensors between host and device, without waiting for what the device does meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Generic, TypeVar

import torch

_Record = TypeVar("_Record", bound=Any)


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


class HostCopy(Generic[_Record]):
    """A dataclass of tensors on its way to the host.

    The copies are enqueued at once, behind what the device has been given so far and before what it is given later:
    whoever reads waits for the former alone. (`tolist` of a tensor on the device would wait for both.)
    """

    def __init__(self, record: _Record) -> None:
        self._record = record
        self._event: torch.cuda.Event | None = None
        tensors = {f.name: getattr(record, f.name) for f in fields(record)}
        on_device = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor) and t.is_cuda}
        if on_device:
            copies = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in on_device.items()}
            for name, tensor in on_device.items():
                copies[name].copy_(tensor, non_blocking=True)
            self._record = replace(record, **copies)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> _Record:
        """The same record with its tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._record
