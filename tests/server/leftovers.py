"""What a server takes of its machine, and that all of it is free again: processes, ports, shared memory."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from .wire import wait_until

_SHARED_MEMORY = Path("/dev/shm")
_REGIONS = "shm-region-prefix-name="


@dataclass
class Holdings:
    """Of everything below a launcher, at the moments of `note`; regions are names in /dev/shm."""

    processes: set[psutil.Process] = field(default_factory=set)
    ports: set[tuple[str, int]] = field(default_factory=set)
    regions: set[str] = field(default_factory=set)

    def note(self, launcher_pid: int) -> Holdings:
        """Add what there is now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(launcher_pid).children(recursive=True):
                self.processes.add(process)
                with contextlib.suppress(psutil.Error, OSError):
                    self._note(process)
        return self

    def wait_until_free(self, within_s: float = 30.0) -> None:
        """No process lives, nobody listens where one did, no region is left."""
        wait_until(lambda: not self.living(), f"{self.living()} ended", within_s)
        listened = {
            (connection.laddr.ip, connection.laddr.port)
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert not self.ports & listened
        wait_until(lambda: not self.remaining_regions(), f"{self.remaining_regions()} are gone", within_s)

    def living(self) -> list[psutil.Process]:
        return [process for process in self.processes if is_alive(process)]

    def remaining_regions(self) -> list[str]:
        prefixes = tuple(self.regions)
        return [name for name in os.listdir(_SHARED_MEMORY) if prefixes and name.startswith(prefixes)]

    def _note(self, process: psutil.Process) -> None:
        for word in process.cmdline():
            if _REGIONS in word:
                self.regions.add(word.partition(_REGIONS)[2].split(",")[0])
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                self.ports.add((connection.laddr.ip, connection.laddr.port))
        for mapped in process.memory_maps():
            path = Path(mapped.path.removesuffix(" (deleted)"))
            if path.parent == _SHARED_MEMORY:
                self.regions.add(path.name)


def is_alive(process: psutil.Process) -> bool:
    """A process that nobody has reaped yet is dead, too."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
