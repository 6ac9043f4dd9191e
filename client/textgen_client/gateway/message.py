"""A chat answer taken apart while it is still being written: content, reasoning, a call of a tool.

The server's grammar makes a call one JSON object, {"name": ..., "arguments": {...}}, and with tool_choice auto makes
every other text begin with something else than a brace. Reasoning is what stands between <think> and </think> at the
start of an answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*', re.DOTALL)
_State = Literal["start", "reasoning", "answer", "content", "call", "arguments", "done"]
_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Piece:
    """What a piece of text adds to a message. name: a call begins; arguments: more of its arguments."""

    content: str = ""
    reasoning: str = ""
    name: str | None = None
    arguments: str = ""


class MessageReader:
    """Reads one choice's text piece by piece. may_call: the request has tools that may be called."""

    def __init__(self, may_call: bool, begins_in_reasoning: bool = False) -> None:
        self.has_call = False
        self._may_call = may_call
        self._text = ""  # read, and not yet told
        self._state: _State = "reasoning" if begins_in_reasoning else "start"
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def read(self, text: str, is_last: bool = False) -> Piece:
        """What `text` adds; is_last: nothing comes after it, so nothing may be held back any more."""
        self._text += text
        reasoning = ""
        if self._state == "start":
            self._begin(is_last)
        if self._state == "reasoning":
            reasoning = self._reasoning(is_last)
        if self._state == "answer":
            self._begin(is_last)
        if self._state == "content":
            content, self._text = self._text, ""
            return Piece(content=content, reasoning=reasoning)
        if self._state == "call":
            return self._begin_call(is_last, reasoning)
        if self._state == "arguments":
            return Piece(arguments=self._arguments())
        return Piece(reasoning=reasoning)

    def _begin(self, is_last: bool) -> None:
        """Decide by the first characters what the text is."""
        visible = self._text.lstrip()
        may_think = self._state == "start"
        if may_think and visible.startswith(_OPEN):
            self._text = visible[len(_OPEN) :]
            self._state = "reasoning"
        elif self._may_call and visible.startswith("{"):
            self._state = "call"
        elif is_last or (visible and not (may_think and _OPEN.startswith(visible))):
            if not may_think:
                self._text = self._text.lstrip("\n")
            self._state = "content"

    def _reasoning(self, is_last: bool) -> str:
        before, mark, after = self._text.partition(_CLOSE)
        if mark:
            self._text = after
            self._state = "answer"  # what follows the reasoning
            return before
        held = 0 if is_last else _overlap(before, _CLOSE)
        self._text = before[len(before) - held :]
        return before[: len(before) - held]

    def _begin_call(self, is_last: bool, reasoning: str) -> Piece:
        found = _CALL.match(self._text)
        if found is None:
            if not is_last:
                return Piece(reasoning=reasoning)
            content, self._text = self._text, ""  # cut before the name was complete
            return Piece(content=content, reasoning=reasoning)
        self.has_call = True
        self._state = "arguments"
        self._text = self._text[found.end() :]
        return Piece(reasoning=reasoning, name=json.loads(found[1]), arguments=self._arguments())

    def _arguments(self) -> str:
        """The arguments' text so far, without the brace that closes the call."""
        if not self._depth:
            self._text = self._text.lstrip()
        for position, character in enumerate(self._text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                else:
                    self._escaped = character == "\\"
                    self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = "done"
                    return self._text[: position + 1]
        arguments, self._text = self._text, ""
        return arguments


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that may be the beginning of `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
