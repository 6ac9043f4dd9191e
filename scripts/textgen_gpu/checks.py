"""One line of the check: what was compared or measured, and how it went."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Check:
    """passed None: not run. error: the largest difference, and what is allowed, where something was compared."""

    name: str
    passed: bool | None
    note: str = ""
    error: float | None = None
    allowed: float | None = None


@dataclass
class Run:
    """A run of the whole script: its checks so far, and when it has to end (of time.monotonic())."""

    deadline_s: float
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return self.deadline_s - time.monotonic()

    def add(self, check: Check) -> None:
        self.checks.append(check)
        verdict = {True: "ok", False: "FAILED", None: "not run"}[check.passed]
        numbers = "" if check.error is None else f" (differs by {check.error:.2g}, allowed {check.allowed:.2g})"
        print(f"  {check.name}: {verdict}{numbers}{': ' + check.note if check.note else ''}", flush=True)

    def compare(self, name: str, found: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
        """Largest difference as a share of the largest expected value (1 at least)."""
        size = max(1.0, float(expected.float().abs().max()))
        difference = (found.float() - expected.float()).abs()
        error = float(difference.max()) / size
        self.add(Check(name, bool(torch.isfinite(found.float()).all()) and error <= allowed, "", error, allowed))

    def section(self, name: str, needed_s: float, work: Callable[[], None]) -> None:
        """Do one part; whatever it raises fails it alone, and without enough time left it is not run."""
        if self.seconds_left < needed_s:
            self.add(Check(name, None, f"{max(self.seconds_left, 0):.0f} s are left, it takes {needed_s:.0f}"))
            return
        print(f"{name} ({self.seconds_left:.0f} s left)", flush=True)
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.add(Check(name, False, f"{type(error).__name__}: {error}"[:300]))
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @property
    def failed(self) -> Iterator[Check]:
        return (check for check in self.checks if check.passed is False)
