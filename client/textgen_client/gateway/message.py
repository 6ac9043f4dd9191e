"""A chat answer taken apart while it is still being written: content, reasoning, calls of tools.

Where tools may be called, an answer that begins with a brace is a call, {"name": ..., "arguments": {...}}, and one that
begins with a bracket and a brace a list of them: the server's grammar makes every other text begin otherwise. Models
that were trained to mark their calls write them, anywhere, between <tool_call> and </tool_call>; no grammar holds
those, so what is no call there stays text. Reasoning is what stands between <think> and </think> at the start of an
answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

_CALL = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)', re.DOTALL)
_State = Literal["start", "reasoning", "answer", "content", "call", "arguments", "called"]
_OPEN, _CLOSE = "<think>", "</think>"
_CALL_OPEN, _CALL_CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Piece:
    """What a piece of text adds to a message.

    kind `call`: a call begins, `text` is its function's name; `arguments`: more of its arguments, which are JSON. call:
    the number of the call, in order.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call: int = 0


class MessageReader:
    """Reads one choice's text piece by piece.

    may_call: the request has tools that may be called. begins_in_reasoning: the prompt has opened it.
    """

    def __init__(self, may_call: bool, begins_in_reasoning: bool = False) -> None:
        self.num_calls = 0
        self._may_call = may_call
        self._text = ""  # read, and not yet told
        self._state: _State = "reasoning" if begins_in_reasoning else "start"
        self._after_mark = False  # blank lines after a mark belong to it
        self._marked = False  # inside of <tool_call>
        self._scan = _JsonScan()

    def read(self, text: str, is_last: bool = False) -> list[Piece]:
        """What `text` adds; is_last: nothing comes after it, so nothing may be held back any more."""
        self._text += text
        pieces: list[Piece] = []
        before = None
        while before != (self._state, self._text):  # until nothing moves any more
            before = (self._state, self._text)
            piece = getattr(self, f"_read_{self._state}")(is_last)
            if piece is not None:
                pieces.append(piece)
        return pieces

    def _read_start(self, is_last: bool) -> None:
        visible = self._text.lstrip()
        if visible.startswith(_OPEN):
            self._text = visible[len(_OPEN) :]
            self._state = "reasoning"
        elif is_last or (visible and not _OPEN.startswith(visible)):
            self._state = "answer"

    def _read_reasoning(self, is_last: bool) -> Piece | None:
        before, mark, after = self._text.partition(_CLOSE)
        if mark:
            self._text, self._state, self._after_mark = after, "answer", True
        else:
            held = 0 if is_last else _overlap(before, _CLOSE)
            self._text = before[len(before) - held :]
            before = before[: len(before) - held]
        return Piece("reasoning", before) if before else None

    def _read_answer(self, is_last: bool) -> None:
        """Decide by the first characters what the answer is."""
        visible = self._text.lstrip()
        if not visible and not is_last:
            return
        if self._may_call and visible[:1] == "{":
            self._text, self._state = visible, "call"
        elif self._may_call and visible[:1] == "[":
            inside = visible[1:].lstrip()
            if inside[:1] == "{":
                self._text, self._state = inside, "call"
            elif inside or is_last:
                self._state = "content"
        else:
            self._state = "content"
        if self._state == "content" and self._after_mark:
            self._text = self._text.lstrip("\n")

    def _read_content(self, is_last: bool) -> Piece | None:
        if not self._may_call:
            content, self._text = self._text, ""
        else:
            content, mark, after = self._text.partition(_CALL_OPEN)
            if mark:
                self._text, self._state, self._marked = after, "call", True
                content = content.rstrip()
            elif is_last:
                self._text = ""
            else:
                told = content[: len(content) - _overlap(content, _CALL_OPEN)].rstrip()
                self._text, content = content[len(told) :], told
        return Piece("content", content) if content else None

    def _read_call(self, is_last: bool) -> Piece | None:
        inside = self._text.lstrip()
        if self._marked:
            inside = inside.removeprefix("[").lstrip()
        found = _CALL.match(inside)
        if found is not None:
            self._text, self._state, self._scan = inside[found.end() :], "arguments", _JsonScan()
            return self._begin(json.loads(found[1]))
        # Some other order of members: nothing can be told before the whole object is there.
        end = _JsonScan().end_of(inside) if inside.startswith("{") else None
        call = _loads(inside[:end]) if end is not None else None
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if isinstance(call, dict) and isinstance(call.get("name"), str) and arguments is not None:
            # In the order that is read without waiting.
            rest = inside[end:]
            told = f'{{"name": {json.dumps(call["name"])}, "arguments": {json.dumps(arguments, ensure_ascii=False)}}}'
            self._text = told + rest
            return None
        hopeless = end is not None or (bool(inside) and not inside.startswith("{"))
        if not is_last and not hopeless:
            return None
        content = (_CALL_OPEN if self._marked else "") + self._text
        self._text, self._state, self._marked = "", "content", False
        return Piece("content", content) if content else None

    def _begin(self, name: str) -> Piece:
        self.num_calls += 1
        return Piece("call", name, self.num_calls - 1)

    def _read_arguments(self, is_last: bool) -> Piece | None:
        end = self._scan.end_of(self._text)
        arguments, self._text = (self._text, "") if end is None else (self._text[:end], self._text[end:])
        if end is not None:
            self._state = "called"
        return Piece("arguments", arguments, self.num_calls - 1) if arguments else None

    def _read_called(self, is_last: bool) -> None:
        """After a call: what closes it, another one, or text again."""
        self._text = self._text.lstrip()
        if self._text[:1] in ("}", ",", "]"):
            self._text = self._text[1:]
        elif self._text.startswith("{"):
            self._state = "call"
        elif self._text.startswith(_CALL_CLOSE):
            self._text, self._marked = self._text[len(_CALL_CLOSE) :].lstrip(), False
        elif self._text.startswith(_CALL_OPEN):
            self._text, self._marked, self._state = self._text[len(_CALL_OPEN) :], True, "call"
        elif self._text and (is_last or not any(mark.startswith(self._text) for mark in (_CALL_CLOSE, _CALL_OPEN))):
            self._state = "content"


class _JsonScan:
    """Finds where a JSON value ends, across pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end_of(self, text: str) -> int | None:
        """The position behind the value, whose text goes on with `text`; None: it goes on. A value that is no object,
        list or string ends before what cannot belong to it."""
        for position, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                    if self._depth == 0:
                        return position + 1
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif self._depth == 0 and character in "}],":
                return position
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return position + 1
        return None


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that may be the beginning of `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
