"""What the user sees while a server loads and serves: a spinner on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.status import Status


class Terminal:
    """Messages to stdout and problems to stderr."""

    def __init__(self) -> None:
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str = "") -> None:
        """One line for the user."""
        self._out.print(text, markup=False)

    def heading(self, text: str) -> None:
        """One line that stands out on a terminal."""
        self._out.print(f"[bold]{escape(text)}[/bold]")

    def piece(self, text: str) -> None:
        """A part of a line, shown at once."""
        self._out.print(text, end="", markup=False)
        self._out.file.flush()

    def warn(self, text: str) -> None:
        """Something that needs attention, but does not end the server."""
        self._err.print(f"[yellow]{escape(text)}[/yellow]")

    def error(self, text: str) -> None:
        """Why the program ends: one line."""
        self._err.print(f"[red]error:[/red] {escape(' '.join(text.split()))}")

    def progress(self, title: str) -> Progress:
        """Shows `title`, the stage and the seconds gone by, until the `with` block ends."""
        return Progress(self._out, title)


class Progress:
    """Elapsed time and stage of one long step. Plain output gets a line per stage and one every ten seconds."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._started = time.monotonic()
        self._stage = ""
        self._next_line_s = 10.0
        self._status: Status | None = console.status(title) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        else:
            self._console.print(self._title, markup=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._started

    def update(self, stage: str) -> None:
        """Call it often."""
        changed = stage != self._stage
        self._stage = stage
        if self._status is not None:
            self._status.update(f"{escape(self._title)}  {self.elapsed_s:.0f} s  {escape(self._stage)}")
        elif changed or self.elapsed_s >= self._next_line_s:
            self._next_line_s = self.elapsed_s + 10.0
            self._console.print(f"  {self.elapsed_s:5.1f} s  {self._stage}", markup=False)
