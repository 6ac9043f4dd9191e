"""What "healthy" means: the questions asked of a server, and the record of its answers."""

from __future__ import annotations

import re
import time
import urllib.request
from dataclasses import dataclass
from typing import Any

PROBE_PROMPT = "Hello"
# The server publishes its counters five times a second; a step of a busy one may take longer than that.
_PROGRESS_S = 1.5
_LOOK_S = 0.1


def probe_parameters() -> dict[str, Any]:
    """Of the one-token request. It goes before all that waits: a full server is not a dead one."""
    return {"max_new_tokens": 1, "priority": 100}


@dataclass(frozen=True, slots=True)
class Health:
    """The answers, each question asked only if the one before it was answered well.

    inference: a real request for one token was answered, or refused as overloaded (which only a working engine does).
    latency_s: how long that took. problem: the first thing that was not well, in one line. is_progressing: the server
    was seen to generate for others, so nothing was asked of it.
    """

    server_live: bool = False
    server_ready: bool = False
    model_ready: bool = False
    inference: bool = False
    latency_s: float | None = None
    problem: str | None = None
    is_progressing: bool = False

    @property
    def ok(self) -> bool:
        return self.inference


def readiness(live: bool, ready: bool, model_ready: bool, model: str) -> Health:
    """The result so far, before inference is tried; it has a `problem` if that need not be tried."""
    if not live:
        problem: str | None = "the server is not live"
    elif not ready and model_ready:
        problem = "the server is not ready"
    elif not model_ready:
        problem = f"the model {model!r} is not ready"
    else:
        problem = None
    return Health(live, ready, model_ready, problem=problem)


def is_progressing(metrics_url: str, within_s: float = _PROGRESS_S) -> bool:
    """Whether the server's count of generated tokens rises while this watches it, for at most within_s.

    A server that generates for others needs no request of its own to prove that it does. False where nothing runs, or
    where the metrics cannot be read: then ask for a token.
    """
    deadline = time.monotonic() + within_s
    try:
        before = _generated(metrics_url)
        while before is not None and before.running and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            now = _generated(metrics_url)
            if now is None or now.tokens > before.tokens:
                return now is not None
    except (OSError, ValueError):
        pass
    return False


@dataclass(frozen=True, slots=True)
class _Progress:
    tokens: float
    running: float


def _generated(metrics_url: str) -> _Progress | None:
    with urllib.request.urlopen(metrics_url, timeout=2) as response:
        page = response.read().decode()
    tokens = re.findall(r"^tgi_generated_tokens\{[^}]*\} (\S+)$", page, re.MULTILINE)
    running = re.findall(r"^tgi_batch_current_size\{[^}]*\} (\S+)$", page, re.MULTILINE)
    return _Progress(sum(map(float, tokens)), sum(map(float, running))) if tokens and running else None
