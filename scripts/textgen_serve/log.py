"""Reads a server's log file as it grows: the stage of loading, warnings, and the reason of a failure.

Two kinds of lines matter: Triton's own (`I1121 12:00:00.123 345 file.cc:12] "text"`) and those of our models, which
carry `textgen: `, and `textgen: fatal: ` for the one reason why a model cannot be loaded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_TRITON = re.compile(r"^(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ [^\]]*\] (?P<text>.*)$")
_OURS = re.compile(r"textgen: (?P<text>.*?)\"?$")
_FATAL = "fatal: "
_CAUSES = (
    re.compile(r"failed to load '(?P<model>\w+)' version \d+: (?P<text>.*)"),
    re.compile(r"error: creating server: (?P<text>.*)"),
    re.compile(r"(?P<text>Failed to start \w+.*)"),
)
_STAGES = (
    (re.compile(r"loading: (\w+):"), "loading {}"),
    (re.compile(r"successfully loaded '(\w+)'"), "{} loaded"),
)


@dataclass(frozen=True)
class LogLine:
    """One line. severity: Triton's letter, "F" for a fatal line of ours, "" for anything else a process printed."""

    severity: str
    text: str
    stage: str | None = None


@dataclass
class LogFollower:
    """Reads what was appended since the last call. Remembers why a model, or the server, could not be loaded."""

    path: Path
    _reason: str | None = None
    _reason_rank: int = len(_CAUSES) + 1
    _offset: int = 0
    _partial: bytes = b""

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
            self._remember_cause(line)
        return lines

    def skip_to_end(self) -> None:
        """Forget what an earlier server wrote into the same file."""
        self._offset = os.path.getsize(self.path) if self.path.exists() else 0

    def reason(self) -> str | None:
        """Why loading failed, in one line: our own fatal line, else Triton's error about the model or the server."""
        return self._reason

    def _remember_cause(self, line: LogLine) -> None:
        rank, text = _cause(line)
        # The first line of the best kind counts: summaries and consequences follow it.
        if rank < self._reason_rank:
            self._reason, self._reason_rank = text, rank


def _cause(line: LogLine) -> tuple[int, str]:
    """How well a line explains a failure (0 is best; beyond the last kind: not at all), and the explanation."""
    if line.severity == "F":
        return 0, line.text
    for rank, pattern in enumerate(_CAUSES, start=1):
        match = pattern.search(line.text)
        if match:
            return rank, match["text"][:300]
    return len(_CAUSES) + 1, ""


def parse_line(line: str) -> LogLine:
    """Classify one line of the log."""
    triton = _TRITON.match(line)
    severity, text = (triton["level"], triton["text"].strip('"')) if triton else ("", line)
    ours = _OURS.search(text)
    if ours:
        text = ours["text"]
        if text.startswith(_FATAL):
            return LogLine("F", text.removeprefix(_FATAL))
        return LogLine(severity, text, stage=text)
    for pattern, stage in _STAGES:
        match = pattern.search(text)
        if match:
            return LogLine(severity, text, stage=stage.format(match[1]))
    return LogLine(severity, text)
