"""A conversation in the terminal: keeps the messages, streams the answers, obeys a few /commands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from textgen_client.client import Client
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
            with self._client.stream(messages=self._messages, timeout=self._timeout_s, **self._parameters) as stream:
                for chunk in stream:
                    shown.append(chunk.text)
                    sys.stdout.write(chunk.text)
                    sys.stdout.flush()
            print()
        except (KeyboardInterrupt, RequestCancelled):
            print("\n(cancelled)")
        except TextgenError as error:
            if shown:
                print()
            print(error, file=sys.stderr)
        if shown:
            self._messages.append({"role": "assistant", "content": "".join(shown)})
        else:
            self._messages.pop()
