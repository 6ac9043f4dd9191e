"""How many GPUs this process may use, found without torch (the stub and the launcher never import it)."""

from __future__ import annotations

import os
import re
from pathlib import Path

_DEVICES = Path("/dev")


def visible_gpus() -> int:
    """The driver's device nodes, less what CUDA_VISIBLE_DEVICES hides."""
    if not (_DEVICES / "nvidiactl").exists():
        return 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        listed = [name.strip() for name in named.split(",")]
        return len(listed[: listed.index("-1")] if "-1" in listed else [name for name in listed if name])
    present = [node.name for node in _DEVICES.iterdir() if re.fullmatch(r"nvidia\d+", node.name)]
    return max(1, len(present))
