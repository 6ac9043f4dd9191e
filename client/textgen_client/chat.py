"""A conversation in the terminal: keeps the messages, streams the answers, obeys a few /commands."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from textgen_client.client import Client, Stream
from textgen_client.errors import RequestCancelled, TextgenError

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C ends an answer"


class Chat:
    """One conversation. `run` reads lines until the end of input or /exit and returns."""

    def __init__(
        self, client: Client, *, system: str | None, timeout_s: float | None, parameters: Mapping[str, Any]
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._parameters = parameters
        self._opening = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def run(self) -> None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then edits lines and remembers them
        if sys.stdin.isatty():
            print(_HELP)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # at the prompt it clears the line, as in a shell
                print()
                continue
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                self._messages = list(self._opening)
                print("(forgotten)")
            elif line.startswith("/"):
                print(_HELP)
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Stream one answer. What was shown of it stays in the history; a turn without any answer does not."""
        self._messages.append({"role": "user", "content": line})
        shown: list[str] = []
        try:
            with _CtrlC() as ctrl_c:
                stream = self._client.stream(messages=self._messages, timeout=self._timeout_s, **self._parameters)
                ctrl_c.closes(stream)
                with stream:
                    for chunk in stream:
                        shown.append(chunk.text)
                        sys.stdout.write(chunk.text)
                        sys.stdout.flush()
            print()
        except RequestCancelled:
            print("\n(cancelled)")
        except TextgenError as error:
            if shown:
                print()
            print(error, file=sys.stderr)
        if shown:
            self._messages.append({"role": "assistant", "content": "".join(shown)})
        else:
            self._messages.pop()


class _CtrlC:
    """Inside its `with`, Ctrl-C closes a stream; a KeyboardInterrupt could strike within gRPC's own bookkeeping."""

    def __init__(self) -> None:
        self._pressed = False
        self._stream: Stream | None = None

    def closes(self, stream: Stream) -> None:
        """From now on Ctrl-C closes this stream; at once if it was pressed before."""
        self._stream = stream
        if self._pressed:
            stream.close()

    def __enter__(self) -> _CtrlC:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, _signum: int, _frame: FrameType | None) -> None:
        self._pressed = True
        if self._stream is not None:
            self._stream.close()
