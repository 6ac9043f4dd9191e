"""Memory for weights: huge pages that many tensors share and that each gives back when it goes.

The first touch of an ordinary page costs more than the copy of what comes into it, and weights read in ordinary pages
make the processor look up an address for every 4 KiB. The system gives huge pages (2 MiB) to mappings that ask for
them, whole and aligned; most tensors are neither, so they share arenas that are.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any

import torch

_ARENA_BYTES = 64 << 20
_HUGE_PAGE_BYTES = 2 << 20
# What torch itself aligns to, and the kernels with it.
_ALIGNMENT = 64
# So little is not worth a place: it would only keep others' pages.
_LEAST_BYTES = 16 << 10


class WeightMemory:
    """Hands out memory from arenas. A tensor keeps its arena alive; its own pages are returned when it is freed."""

    def __init__(self) -> None:
        self._arena: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the CPU, contiguous."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if num_bytes < _LEAST_BYTES:
            return torch.empty(shape, dtype=dtype)
        if self._arena is None or self._used + num_bytes > len(self._arena):
            self._arena, self._used = _map(max(_ARENA_BYTES, num_bytes)), 0
        place = _Place(self._arena, self._used, num_bytes)
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return torch.frombuffer(place.buffer, dtype=torch.uint8).view(dtype).view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in memory from here."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


class _Place:
    """Some bytes of an arena, as an object that torch can hold and that notices when torch lets go of it."""

    def __init__(self, arena: mmap.mmap, offset: int, num_bytes: int) -> None:
        def give_back(_: object) -> None:
            first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (offset + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                with contextlib.suppress(OSError, ValueError):
                    arena.madvise(mmap.MADV_DONTNEED, first, last - first)

        kind: Any = type("Place", (ctypes.c_char * num_bytes,), {"__del__": give_back})
        self.buffer: ctypes.Array[ctypes.c_char] = kind.from_buffer(arena, offset)


def _map(num_bytes: int) -> mmap.mmap:
    whole_pages = -(-num_bytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    arena = mmap.mmap(-1, whole_pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        arena.madvise(mmap.MADV_HUGEPAGE)
    return arena
