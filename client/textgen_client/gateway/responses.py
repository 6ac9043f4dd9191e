"""/v1/responses: the answer to a chat as items, whole or as the events that build them.

One object builds both: an answer that does not stream is the last state of the one that does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from textgen_client.aio import AsyncStream
from textgen_client.errors import TextgenError
from textgen_client.gateway.backend import Backend
from textgen_client.gateway.chat import chat_parameters
from textgen_client.gateway.errors import tgi_body
from textgen_client.gateway.exchange import begun, told_logprobs
from textgen_client.gateway.message import MessageReader, Piece
from textgen_client.gateway.openai_bodies import ResponsesRequest
from textgen_client.gateway.response_items import LOGPROBS, chat_of, parameters_of
from textgen_client.gateway.sse import EventStream, named_event
from textgen_client.results import Chunk, Generation

Event = dict[str, Any]


class Answering:
    """One request of the route."""

    def __init__(
        self, request: Request, backend: Backend, body: ResponsesRequest, model: str, adapter: str | None
    ) -> None:
        """model: the name to answer with. adapter: the one to generate with. Raises ValidationError."""
        self._request = request
        self._backend = backend
        self._body = body
        self._model = model
        self._chat = chat_of(body)
        chat = self._chat.model_dump(exclude_none=True, include={"response_format", "tools", "tool_choice"})
        self._parameters = {**parameters_of(body), **chat, **chat_parameters(self._chat)}
        if adapter is not None:
            self._parameters["adapter_id"] = adapter
        self._opens_reasoning = False

    async def whole(self) -> dict[str, Any]:
        """The answer that does not stream."""
        messages = self._chat.messages
        generating = self._backend.generate(self._request, self._parameters, messages=messages)
        generation, _ = await asyncio.gather(generating, self._prepare())
        items = self._items()
        for _ in items.begin():
            pass
        for _ in items.read(generation):
            pass
        return items.response

    async def stream(self) -> Response:
        """The answer as events; what is refused is raised, with its status."""
        counts = {"return_num_input_tokens": True, "return_num_output_tokens": True}
        parameters = {**self._parameters, **counts}
        stream: AsyncStream = self._backend.stream(self._request, parameters, messages=self._chat.messages)
        first, chunks = await begun(self._request, [stream], self._prepare())
        return EventStream(self._events(first, chunks))

    async def _prepare(self) -> None:
        self._opens_reasoning = await self._backend.templates.opens_reasoning(self._chat)

    def _items(self) -> Items:
        reader = MessageReader(self._chat.may_call(), self._opens_reasoning)
        wants_logprobs = LOGPROBS in (self._body.include or [])
        return Items(self._frame(), reader, self._request.state.request_id, wants_logprobs)

    async def _events(self, first: Any, chunks: Any) -> AsyncIterator[bytes]:
        items = self._items()
        number = 0
        async with contextlib.aclosing(chunks):

            def told(events: Iterator[Event]) -> bytes:
                nonlocal number
                sent = b""
                for content in events:
                    sent += named_event(content["type"], {**content, "sequence_number": number})
                    number += 1
                return sent

            yield told(items.begin())
            try:
                found = first
                while found is not None:
                    if sent := told(items.read(found[1])):
                        yield sent
                    found = await anext(chunks, None)
            except TextgenError as error:
                yield told(items.fail(error))

    def _frame(self) -> dict[str, Any]:
        """The response before anything of it is generated."""
        body = self._body
        text = body.text.model_dump(exclude_none=True) if body.text else {}
        return {
            "id": f"resp_{self._request.state.request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": body.metadata or {},
        }


class Items:
    """A response while it is built: its items so far, and the events that say what each piece of text adds."""

    def __init__(self, response: dict[str, Any], reader: MessageReader, request_id: str, wants_logprobs: bool) -> None:
        self.response = response
        self._reader = reader
        self._request_id = request_id
        self._wants_logprobs = wants_logprobs
        self._open: dict[str, Any] | None = None  # the item that grows
        self._logprobs: list[dict[str, Any]] = []
        self._num_input = self._num_output = self._num_cached = self._num_reasoning = 0

    def begin(self) -> Iterator[Event]:
        """Before the first token."""
        yield {"type": "response.created", "response": {**self.response}}
        yield {"type": "response.in_progress", "response": {**self.response}}

    def read(self, answer: Generation | Chunk) -> Iterator[Event]:
        """What one response of the server adds; the last one ends everything."""
        self._num_input = max(self._num_input, answer.num_input_tokens or 0)
        self._num_output += answer.num_output_tokens or 0
        self._num_cached = max(self._num_cached, (answer.details or {}).get("cached_tokens", 0))
        if self._wants_logprobs:
            self._logprobs += told_logprobs(answer, 0)
        reason = answer.finish_reason
        pieces = self._reader.read(answer.text, is_last=reason is not None)
        if any(piece.kind == "reasoning" for piece in pieces):
            self._num_reasoning += _num_reasoning(answer, pieces)
        for piece in pieces:
            yield from self._add(piece)
        if reason is not None:
            yield from self._end(reason)

    def fail(self, error: TextgenError) -> Iterator[Event]:
        """The generation broke off."""
        yield {"type": "error", "code": tgi_body(error)["error_type"], "message": str(error), "param": None}
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        yield {"type": "response.failed", "response": self.response}

    def _add(self, piece: Piece) -> Iterator[Event]:
        kind = {"content": "message", "reasoning": "reasoning"}.get(piece.kind, "function_call")
        if self._open is not None and (self._open["type"] != kind or piece.kind == "call"):
            yield from self._close("completed")
        if self._open is None:
            yield from self._begin_item(kind, piece)
        assert self._open is not None
        if piece.kind == "call":
            return
        place = self._place()
        if piece.kind == "arguments":
            self._open["arguments"] += piece.text
            yield {"type": "response.function_call_arguments.delta", **place, "delta": piece.text}
            return
        self._open["content"][0]["text"] += piece.text
        if piece.kind == "reasoning":
            yield {"type": "response.reasoning_text.delta", **place, "content_index": 0, "delta": piece.text}
            return
        logprobs, self._logprobs = self._logprobs, []
        self._open["content"][0]["logprobs"] += logprobs
        delta = {"content_index": 0, "delta": piece.text, "logprobs": logprobs}
        yield {"type": "response.output_text.delta", **place, **delta}

    def _begin_item(self, kind: str, piece: Piece) -> Iterator[Event]:
        number = len(self.response["output"])
        part: dict[str, Any] | None = None
        item: dict[str, Any]
        if kind == "function_call":
            item = {"id": self._id("fc", number), "call_id": self._id("call", number), "name": piece.text}
            item |= {"arguments": ""}
        elif kind == "reasoning":
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": self._id("rs", number), "summary": [], "content": []}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": self._id("msg", number), "role": "assistant", "content": []}
        self._open = {"type": kind, **item, "status": "in_progress"}
        self.response["output"].append(self._open)
        yield {"type": "response.output_item.added", "output_index": number, "item": {**self._open}}
        if part is not None:
            yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": {**part}}
            self._open["content"] = [part]

    def _close(self, status: str) -> Iterator[Event]:
        """End the item that grows."""
        item = self._open
        if item is None:
            return
        place = self._place()
        item["status"] = status
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **place, **told}
        else:
            part = item["content"][0]
            if item["type"] == "reasoning":
                yield {"type": "response.reasoning_text.done", **place, "content_index": 0, "text": part["text"]}
            else:
                told = {"content_index": 0, "text": part["text"], "logprobs": part["logprobs"]}
                yield {"type": "response.output_text.done", **place, **told}
            yield {"type": "response.content_part.done", **place, "content_index": 0, "part": part}
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}
        self._open = None

    def _end(self, reason: str) -> Iterator[Event]:
        is_whole = reason in ("eos_token", "stop_sequence")
        if not self.response["output"]:
            yield from self._begin_item("message", Piece("content", ""))
        yield from self._close("completed" if is_whole else "incomplete")
        self.response["status"] = "completed" if is_whole else "incomplete"
        if not is_whole:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["usage"] = {
            "input_tokens": self._num_input,
            "input_tokens_details": {"cached_tokens": self._num_cached, "cache_write_tokens": 0},
            "output_tokens": self._num_output,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": self._num_input + self._num_output,
        }
        yield {"type": f"response.{self.response['status']}", "response": self.response}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.response["output"]) - 1}

    def _id(self, prefix: str, number: int) -> str:
        return f"{prefix}_{self._request_id}_{number}"


def _num_reasoning(answer: Generation | Chunk, pieces: list[Piece]) -> int:
    """How many of an answer's new tokens are reasoning: all, or those up to the mark that ends it."""
    tokens = (answer.details or {}).get("tokens", [])
    if all(piece.kind == "reasoning" for piece in pieces):
        return len(tokens)
    text = ""
    for number, token in enumerate(tokens):
        text += token["text"]
        if "</think>" in text:
            return number + 1
    return len(tokens)
