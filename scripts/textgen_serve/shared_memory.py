"""Names, locks and cleans the shared memory regions of one server's Python backend.

Triton's stubs talk through regions in /dev/shm, which stay behind when a server is killed. Each of our servers gets a
prefix of its own and holds a lock on a small file of that name; the lock's descriptor is inherited by the whole tree
of processes, so the kernel releases it exactly when the last of them is gone, however it ended.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

_FOLDER = Path("/dev/shm")
_FAMILY = "triton-textgen-"
_LOCK = ".lock"


class RegionPrefix:
    """A fresh region prefix, locked while `descriptor` is open here or in any process that inherited it."""

    def __init__(self, folder: Path = _FOLDER) -> None:
        self._folder = folder
        self.name = f"{_FAMILY}{uuid.uuid4().hex[:12]}-"
        self._lock = folder / f"{self.name}{_LOCK}"
        self.descriptor = os.open(self._lock, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Unlink every region of the prefix; for use when no process of the server is left."""
        os.close(self.descriptor)
        _unlink(self._folder, self.name)


def clean_abandoned(folder: Path = _FOLDER) -> int:
    """Unlink the regions of servers of ours that were killed together with their launcher; returns how many servers."""
    cleaned = 0
    for lock in folder.glob(f"{_FAMILY}*{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:  # gone already, or another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            _unlink(folder, lock.name.removesuffix(_LOCK))
            cleaned += 1
        finally:
            os.close(descriptor)
    return cleaned


def _unlink(folder: Path, prefix: str) -> None:
    for path in folder.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)
