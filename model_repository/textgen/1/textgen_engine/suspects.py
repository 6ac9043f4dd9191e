"""Requests that were running when an engine died, so that one that kills engines is found out.

Clients send again what failed. A request that crashes the engine would come back as often as its client tries, cost all
its neighbours their answers each time, and soon use up the restarts the engine is granted. So what was running is
remembered by its content:

- at one death: nothing happens, for whatever was running beside the guilty one is innocent;
- at two: it is run again, but while no other such request does. The next death has one suspect;
- at three: it is refused.

A request that is answered in full is cleared. Knows contents and counts, no processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum

from textgen_engine.request import GenerationRequest

_QUARANTINE_DEATHS = 2


class Standing(Enum):
    """What to do with a request."""

    CLEAR = "clear"
    QUARANTINED = "quarantined"
    REFUSED = "refused"


class Suspects:
    """Not thread safe. Forgets what has not been seen at a death for memory_s seconds."""

    max_deaths = 3
    memory_s = 600.0

    def __init__(self) -> None:
        self._deaths: dict[bytes, tuple[int, float]] = {}  # content -> how many, when the last one was

    def note_death(self, running: Iterable[GenerationRequest], now_s: float) -> None:
        """An engine died while these ran; the same content counts once."""
        self._deaths = {key: seen for key, seen in self._deaths.items() if now_s - seen[1] < self.memory_s}
        for key in {_content(request) for request in running}:
            count, _ = self._deaths.get(key, (0, 0.0))
            self._deaths[key] = (count + 1, now_s)

    def standing(self, request: GenerationRequest, now_s: float) -> Standing:
        """Whether, and how, the request may run."""
        if not self._deaths:
            return Standing.CLEAR
        count, last_s = self._deaths.get(_content(request), (0, 0.0))
        if count < _QUARANTINE_DEATHS or now_s - last_s >= self.memory_s:
            return Standing.CLEAR
        return Standing.REFUSED if count >= self.max_deaths else Standing.QUARANTINED

    def clear(self, request: GenerationRequest) -> None:
        """It was answered in full."""
        if self._deaths:
            self._deaths.pop(_content(request), None)


def _content(request: GenerationRequest) -> bytes:
    """A digest of what the client asked, without what differs each time it asks: id, times, a seed it did not give."""
    content = replace(
        request,
        request_id="",
        arrival_s=0.0,
        deadline_s=None,
        sampling=replace(request.sampling, seed=None),
    )
    return hashlib.blake2b(repr(content).encode(), digest_size=16).digest()
