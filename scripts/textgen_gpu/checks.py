"""One line of the check: what was compared or measured, and how it went."""

from __future__ import annotations

import gc
import json
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

# Starting a process and its GPU takes most of this.
_LEAST_PART_S = 20.0


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
    """A run of the whole script or of one part: its checks and figures so far, and when it has to end (of
    time.monotonic()). path: where they are kept, for whoever started this process, as they come."""

    deadline_s: float
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def seconds_left(self) -> float:
        return self.deadline_s - time.monotonic()

    def add(self, check: Check) -> None:
        self.checks.append(check)
        verdict = {True: "ok", False: "FAILED", None: "not run"}[check.passed]
        numbers = "" if check.error is None else f" (differs by {check.error:.2g}, allowed {check.allowed:.2g})"
        print(f"  {check.name}: {verdict}{numbers}{': ' + check.note if check.note else ''}", flush=True)
        self.keep()

    def keep(self) -> None:
        """Write down what there is, whole or not at all: this process may be ended at any moment."""
        if self.path is not None:
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps({"checks": [asdict(check) for check in self.checks], "figures": self.figures}))
            new.replace(self.path)

    def run_part(
        self, name: str, command: list[str], path: Path, limit_s: float, environment: dict[str, str] | None = None
    ) -> None:
        """Let a process of its own do one part, and take over what it keeps at `path`. One that crashes (after an
        illegal access a process can use its GPU no more), hangs or takes too long costs its own part alone."""
        limit_s = min(limit_s, self.seconds_left)
        if limit_s < _LEAST_PART_S:
            self.add(Check(name, None, f"{max(self.seconds_left, 0):.0f} s are left"))
            return
        path.unlink(missing_ok=True)
        try:
            code = subprocess.run(command, env=environment, timeout=limit_s, check=False).returncode
            problem = f"its process ended with {code}" if code not in (0, 1) else None
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit_s:.0f} s"
        if path.exists():
            kept = json.loads(path.read_text())
            self.checks += [Check(**check) for check in kept["checks"]]
            self.figures |= kept["figures"]
        elif problem is None:
            problem = "its process left no results"
        if problem is not None:
            self.add(Check(name, False, problem))

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
        # Out of the except clause, so that its traceback no longer keeps tensors alive. An engine is a ring of objects.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.keep()

    @property
    def failed(self) -> Iterator[Check]:
        return (check for check in self.checks if check.passed is False)
