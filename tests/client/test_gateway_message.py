"""The gateway's reader of chat answers: the same message, whatever the pieces in which its text comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from textgen_client.gateway.message import MessageReader, Piece

CALL = '{"name": "f", "arguments": {"a": "}\\"{", "b": [1, {}]}}'
ARGUMENTS = '{"a": "}\\"{", "b": [1, {}]}'
SECOND = '{"name": "g", "arguments": {}}'
SWAPPED = '{"arguments": {"a": 1}, "name": "f"}'


@dataclass(frozen=True)
class Message:
    """calls: (name, arguments)."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def joined(pieces: list[Piece]) -> Message:
    calls: list[list[str]] = []
    for piece in pieces:
        if piece.kind == "call":
            assert piece.call == len(calls)  # a name comes once, and in order
            calls.append([piece.text, ""])
        elif piece.kind == "arguments":
            assert piece.call == len(calls) - 1
            calls[piece.call][1] += piece.text
    texts = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("content", "reasoning")}
    return Message(**texts, calls=tuple((name, arguments) for name, arguments in calls))


def read(text: str, size: int, **how: Any) -> Message:
    reader = MessageReader(**{"may_call": True, **how})
    cuts = [text[start : start + size] for start in range(0, len(text), size)]
    pieces = [piece for cut in cuts for piece in reader.read(cut)] + reader.read("", is_last=True)
    assert all(piece.text or piece.kind == "call" for piece in pieces)
    message = joined(pieces)
    assert reader.num_calls == len(message.calls)
    return message


F = ("f", ARGUMENTS)
G = ("g", "{}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain { text", Message("plain { text")),
        ("[1] is a list", Message("[1] is a list")),
        ("[", Message("[")),
        ("", Message()),
        (CALL, Message(calls=(F,))),
        (CALL[:20], Message(CALL[:20])),
        (CALL[:35], Message(calls=(("f", '{"a": "}'),))),
        (f"[{CALL}]", Message(calls=(F,))),
        (f"[{CALL}, {SECOND},{CALL}]", Message(calls=(F, G, F))),
        (f"[ {CALL}\n, {SECOND[:25]}", Message(SECOND[:25], calls=(F,))),
        (SWAPPED, Message(calls=(("f", '{"a": 1}'),))),
        (f"[{SWAPPED}, {SECOND}]", Message(calls=(("f", '{"a": 1}'), G))),
        ("<think>so </thi</think>\nyes", Message("yes", "so </thi")),
        ("<think>never ends", Message("", "never ends")),
        ("<think>call it</think>" + CALL, Message("", "call it", (F,))),
        ("<think>call</think>\n\n<tool_call>\n" + CALL + "\n</tool_call>", Message("", "call", (F,))),
        ("<thin", Message("<thin")),
        (f"<tool_call>\n{CALL}\n</tool_call>", Message(calls=(F,))),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{SECOND}</tool_call>", Message(calls=(F, G))),
        (f"<tool_call>[{CALL}, {SECOND}]</tool_call>", Message(calls=(F, G))),
        (f"I look.\n<tool_call>{SECOND}</tool_call>\nDone.", Message("I look.Done.", calls=(G,))),
        ('<tool_call>{"name": "f", "parameters": {}}</tool_call>', Message(calls=(("f", "{}"),))),
        ("<tool_call>nothing", Message("<tool_call>nothing")),
        ("a <tool_call", Message("a <tool_call")),
        ("spaces at the end  ", Message("spaces at the end  ")),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_messages_are_taken_apart_alike_in_any_pieces(text: str, expected: Message, size: int) -> None:
    assert read(text, size) == expected


@pytest.mark.parametrize("size", [1, 1000])
def test_without_tools_everything_is_text(size: int) -> None:
    for text in (CALL, f"[{CALL}]", f"<tool_call>{CALL}</tool_call>"):
        assert read(text, size, may_call=False) == Message(text)


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_reasoning_that_the_prompt_has_opened(size: int) -> None:
    assert read("so be it</think>\n\nyes", size, begins_in_reasoning=True) == Message("yes", "so be it")
    assert read("so be it", size, begins_in_reasoning=True) == Message("", "so be it")
    assert read(f"hm</think>{CALL}", size, begins_in_reasoning=True) == Message("", "hm", (F,))


def test_arguments_come_while_they_are_written() -> None:
    reader = MessageReader(may_call=True)
    assert reader.read('[{"name": "f", "arguments": {"a') == [Piece("call", "f", 0), Piece("arguments", '{"a', 0)]
    assert reader.read('": 1}}, {"name": "g", "arguments": {') == [
        Piece("arguments", '": 1}', 0),
        Piece("call", "g", 1),
        Piece("arguments", "{", 1),
    ]
    assert reader.read("}}]", is_last=True) == [Piece("arguments", "}", 1)]
