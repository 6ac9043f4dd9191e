"""What else the machine did, and what an engine's processes take of its memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class ProcessorTime:
    """Seconds since boot: all processors' time, of it busy and stolen by the host, and of it the watched processes'."""

    total: float
    busy: float
    stolen: float
    watched: float

    @staticmethod
    def now(roots: Iterable[int]) -> ProcessorTime:
        times = psutil.cpu_times()
        stolen = getattr(times, "steal", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0)
        total = times.user + times.nice + times.system + idle + getattr(times, "irq", 0.0)
        total += getattr(times, "softirq", 0.0) + stolen
        watched = 0.0
        for process in processes([*roots, psutil.Process().pid]):
            with contextlib.suppress(psutil.Error):
                used = process.cpu_times()
                watched += used.user + used.system
        return ProcessorTime(total, total - idle - stolen, stolen, watched)

    def since(self, before: ProcessorTime) -> tuple[float, float]:
        """Percent of the machine stolen, and used by others, between two moments."""
        total = max(self.total - before.total, 1e-9)
        others = max(0.0, (self.busy - before.busy) - (self.watched - before.watched))
        return 100 * (self.stolen - before.stolen) / total, 100 * others / total


def processes(roots: Iterable[int]) -> list[psutil.Process]:
    """The processes and all their descendants, each once."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(root)
            for each in (process, *process.children(recursive=True)):
                found[each.pid] = each
    return list(found.values())


class MemoryWatch:
    """The largest memory of a process tree, sampled once a second; shared pages count once (PSS)."""

    def __init__(self, roots: list[int]) -> None:
        self._roots = roots
        self._peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            used = 0
            for process in processes(self._roots):
                with contextlib.suppress(psutil.Error):
                    used += process.memory_full_info().pss
            self._peak_bytes = max(self._peak_bytes, used)

    def stop(self) -> float:
        """End the watch; MiB."""
        self._stop.set()
        self._thread.join()
        return self._peak_bytes / 2**20


def wait_for_calm(limit_s: float, *, percent: float = 5.0) -> None:
    """Wait until the machine is nearly idle, at most limit_s: the run before, or a stranger, may still be at work."""
    end = time.monotonic() + limit_s
    while psutil.cpu_percent(interval=1.0) > percent and time.monotonic() < end:
        pass
