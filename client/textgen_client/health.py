"""What "healthy" means: the questions asked of a server, and the record of its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROBE_PROMPT = "Hello"


def probe_parameters() -> dict[str, Any]:
    """Of the one-token request. It goes before all that waits: a full server is not a dead one."""
    return {"max_new_tokens": 1, "priority": 100}


@dataclass(frozen=True, slots=True)
class Health:
    """The answers, each question asked only if the one before it was answered well.

    inference: a real request for one token was answered, or refused as overloaded (which only a working engine does).
    latency_s: how long that took. problem: the first thing that was not well, in one line.
    """

    server_live: bool = False
    server_ready: bool = False
    model_ready: bool = False
    inference: bool = False
    latency_s: float | None = None
    problem: str | None = None

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
