"""Memory for weights, and for the KV cache: huge pages that many tensors share and that each gives back when it goes.

The first touch of an ordinary page costs more than the copy of what comes into it, and weights read in ordinary pages
make the processor look up an address for every 4 KiB. The system gives huge pages (2 MiB) to mappings that ask for
them, whole and aligned; most tensors are neither, so they share arenas that are.

Weights that are packed or quantized anyway need no memory of their own before that: `MappedFiles` shows them where they
lie in the page cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import torch

_ARENA_BYTES = 64 << 20
_HUGE_PAGE_BYTES = 2 << 20
# What torch itself aligns to, and the kernels with it.
_ALIGNMENT = 64
_MADV_POPULATE_WRITE = 23
_POPULATED_TOGETHER = 2 << 20  # others who want memory wait so long
# So little is not worth a place: it would only keep others' pages.
_LEAST_BYTES = 16 << 10
_LEAST_MAPPED_BYTES = 1 << 20
_POPULATE_READ = 22  # MADV_POPULATE_READ, of Linux 5.14, which Python's mmap has no name for


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

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The same, of zeros, without touching what an arena gives, which is zeros by itself."""
        tensor = self.empty(shape, dtype)
        return tensor.zero_() if tensor.nbytes < _LEAST_BYTES else tensor

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in memory from here."""
        return self.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


class MappedFiles:
    """Files as they lie in the page cache, for weights that are read once, to be packed.

    Only matrices of some size are shown: what is small is soon copied, and may be kept in ways that `settle` does not
    see. Nothing else may stay here once a model is loaded: a file that somebody cuts takes its pages with it.

    What lies ahead in the file is left to the system's own reading ahead. Asked for it (MADV_WILLNEED), the system
    fills the page cache in ordinary pages, which are shown at a third of the pace of the larger ones it takes itself.
    """

    def __init__(self) -> None:
        self._files: dict[Path, mmap.mmap] = {}
        self._ranges: list[tuple[int, int]] = []
        self._libc = ctypes.CDLL(None, use_errno=True)  # whose madvise, unlike Python's, lets other threads run

    def show(self, path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """The tensor that begins at byte `offset`, its pages read; writing to it does not change the file. None where
        it has to be read in another way. Raises OSError where the file cannot be read, EOFError where it ends."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if len(shape) < 2 or num_bytes < _LEAST_MAPPED_BYTES or offset % dtype.itemsize:
            return None
        try:
            if path not in self._files:
                self._files[path] = self._map(path)
            file = self._files[path]
        except (ValueError, OSError):
            return None
        if path.stat().st_size < offset + num_bytes:
            raise EOFError(f"the file ends at byte {path.stat().st_size}")
        place = _Place(file, offset, num_bytes)
        first = offset // mmap.PAGESIZE * mmap.PAGESIZE
        begin = ctypes.addressof(place.buffer) - (offset - first)
        length = ctypes.c_size_t(offset + num_bytes - first)
        if self._libc.madvise(ctypes.c_void_p(begin), length, _POPULATE_READ):
            error = ctypes.get_errno()
            if error == errno.EINVAL:
                return None
            raise OSError(error, os.strerror(error))
        # A view remembers what it is a view of, whatever `settle` gives it instead; what `data` returns is none.
        return torch.frombuffer(place.buffer, dtype=torch.uint8).view(dtype).view(shape).data

    def _map(self, path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self._ranges.append((begin, begin + len(mapped)))
        return mapped

    def settle(self, model: torch.nn.Module) -> None:
        """Give parameters and buffers that are still in a file memory of their own, one after another. Those that
        share a place share one again."""
        memory = WeightMemory()
        copies: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            address = tensor.data_ptr()
            if tensor.device.type == "cpu" and any(begin <= address < end for begin, end in self._ranges):
                key = address, tensor.shape, tensor.stride()
                if key not in copies:
                    copies[key] = memory.copy(tensor.data)
                tensor.data = copies[key]


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


def populate(tensor: torch.Tensor) -> None:
    """Have the system give a tensor all its memory now, which otherwise comes with the first use of each page. What is
    in it stays, so that others may write to it meanwhile. Does nothing where the system cannot (Linux before 5.14)."""
    madvise = ctypes.CDLL(None).madvise  # other threads go on while it runs
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    for start in range(first, end, _POPULATED_TOGETHER):
        madvise(start, min(_POPULATED_TOGETHER, end - start), _MADV_POPULATE_WRITE)
