"""How much memory this process may still take, the machine's within the limit of its container; and giving it back."""

from __future__ import annotations

import ctypes
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
# As <malloc.h> numbers them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30


def available_bytes() -> int:
    """Bytes that can be taken without swapping and without crossing the container's limit (cgroup v2)."""
    import psutil  # here: on a GPU the engine gets by without it

    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        # The page cache counts as used there, yet it gives way.
        fields = (line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = next((int(value) for name, value in fields if name == "inactive_file"), 0)
        return available if limit == "max" else min(available, int(limit) - used + cached)
    except (OSError, ValueError):
        return available


def keep_freed() -> None:
    """Have the C library keep what is freed, until `return_freed`. By itself it gives large tensors' memory back at
    once, and the system clears it anew for the next one: in a step that samples for 128 sequences that takes as long
    as what it computes."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if tune is not None and tune(_M_MMAP_THRESHOLD, _KEPT_BYTES):  # older ones take no more than 32 MiB there
        tune(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed() -> None:
    """Give the system back what was freed: after a load that converted its weights these are hundreds of megabytes
    that nothing will ever reuse."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
