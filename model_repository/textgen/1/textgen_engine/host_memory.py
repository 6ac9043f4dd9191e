"""How much memory this process may still take: the machine's, within the limit of its container."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that can be taken without swapping and without crossing the container's limit (cgroup v2)."""
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
