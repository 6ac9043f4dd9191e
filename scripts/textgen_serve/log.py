"""Reads a server's log file as it grows: the stage of loading, warnings, and the reason of a failure.

Two kinds of lines matter: Triton's own (`I1121 12:00:00.123 345 file.cc:12] "text"`) and those of our models
(`textgen: WARNING text`, `textgen engine: INFO text`), of which `textgen: fatal: text` gives the one reason why a model
cannot be loaded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Severity = Literal["I", "W", "E", "F", ""]

_TRITON = re.compile(r"^(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ [^\]]*\] (?P<text>.*)$")
_OURS = re.compile(r"textgen(?: engine)?: (?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL|fatal:) )?(?P<text>.*?)\"?$")
_SEVERITIES: dict[str | None, Severity] = {
    "DEBUG": "I", "INFO": "I", "WARNING": "W", "ERROR": "E", "CRITICAL": "E", "fatal:": "F", None: "I",
    "I": "I", "W": "W", "E": "E", "F": "E",
}  # fmt: skip
_LOADING = re.compile(r"loading: (\w+):")
_LOADED = re.compile(r"successfully loaded '(\w+)'")
# What explains a failure, from best to worst, when no model of ours gave a reason.
_CAUSES = (
    re.compile(r"failed to load '\w+' version \d+: (?P<text>.*)"),
    re.compile(r"error: creating server: (?P<text>.*)"),
    re.compile(r"(?P<text>Failed to start \w+.*)"),
)


@dataclass(frozen=True)
class LogLine:
    """One line. severity: info, warning, error, fatal (a reason of ours), or "" for anything else a process printed."""

    severity: Severity
    text: str
    ours: bool = False


class LogFollower:
    """Reads what was appended since the last call, and remembers what loads and why something could not be loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fatal: str | None = None
        self._loading: list[str] = []
        self._note = ""
        self._cause: str | None = None
        self._cause_rank = len(_CAUSES)
        self._offset = 0
        self._partial = b""

    def read(self) -> list[LogLine]:
        """The complete lines appended since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                appended = file.read()
                self._offset = file.tell()
        except FileNotFoundError:
            return []
        *complete, self._partial = (self._partial + appended).split(b"\n")
        lines = [parse_line(raw.decode(errors="replace")) for raw in complete]
        for line in lines:
            self._remember(line)
        return lines

    def skip_to_end(self) -> None:
        """Forget what an earlier server wrote into the same file."""
        self._offset = os.path.getsize(self.path) if self.path.exists() else 0

    def forget(self) -> None:
        """Another server writes into the same file from now on: what the last one said of loading is past."""
        self.fatal = None
        self._loading, self._note = [], ""
        self._cause, self._cause_rank = None, len(_CAUSES)

    @property
    def stage(self) -> str:
        """What loads at the moment, and the last thing a model of ours said about it."""
        loading = f"loading {', '.join(self._loading)}" if self._loading else ""
        return ": ".join(filter(None, (loading, self._note)))

    @property
    def reason(self) -> str | None:
        """Why loading failed, in one line: our own fatal line, else Triton's error about the model or the server."""
        return self.fatal or self._cause

    def _remember(self, line: LogLine) -> None:
        if line.severity == "F":
            # The first reason counts: others are often its consequences.
            self.fatal = self.fatal or line.text
        elif line.ours:
            self._note = line.text
        elif match := _LOADING.search(line.text):
            self._loading.append(match[1])
        elif match := _LOADED.search(line.text):
            self._loading = [name for name in self._loading if name != match[1]]
            self._note = self._note if self._loading else ""
        else:
            for rank, pattern in enumerate(_CAUSES[: self._cause_rank]):
                if match := pattern.search(line.text):
                    self._cause, self._cause_rank = match["text"][:300], rank
                    break


def parse_line(line: str) -> LogLine:
    """Classify one line of the log. Text in quotation marks, as Triton logs it, is freed of them."""
    triton = _TRITON.match(line)
    text = triton["text"].strip('"') if triton else line
    ours = _OURS.search(text)
    if ours:
        return LogLine(_SEVERITIES[ours["level"]], ours["text"], ours=True)
    return LogLine(_SEVERITIES[triton["level"]] if triton else "", text)
