"""/v1/chat/completions: one conversation, its answer whole or in chunks."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from textgen_client.aio import AsyncStream
from textgen_client.errors import ValidationError
from textgen_client.gateway.backend import Backend
from textgen_client.gateway.exchange import Exchange, told_logprobs, told_reason
from textgen_client.gateway.message import MessageReader, Piece
from textgen_client.gateway.openai_bodies import ChatRequest
from textgen_client.results import Chunk, Generation


def chat_parameters(body: ChatRequest) -> dict[str, Any]:
    """Parameters that a chat has beside those of every request."""
    # OpenAI's default is several calls, the server's is one; without tools there is nothing to say.
    several = {"parallel_tool_calls": body.parallel_tool_calls is not False} if body.may_call() else {}
    return {"chat_template_kwargs": body.template_parameters()["chat_template_kwargs"], **several}


class Chat(Exchange):
    """One request of the route."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    own_fields = Exchange.own_fields | {"top_logprobs", "parallel_tool_calls", "reasoning_effort"}

    def __init__(self, request: Request, backend: Backend, body: ChatRequest, model: str, adapter: str | None) -> None:
        """Raises ValidationError."""
        super().__init__(request, backend, body, model, adapter)
        self.parameters |= chat_parameters(body)
        self._body = body
        self._logprobs = bool(body.logprobs)
        if self._logprobs:
            self.parameters |= {"details": True, "top_n_tokens": body.top_logprobs or None}
        elif body.top_logprobs:
            raise ValidationError("`top_logprobs` needs `logprobs: true`")
        self._readers: list[MessageReader] = []

    @property
    def num_characters(self) -> int:
        return sum(len(str(message.get("content") or "")) for message in self._body.messages)

    async def prepare(self) -> None:
        """Learn how the prompt ends; needed before the first text is read, and may run beside the generation."""
        opens = await self.backend.templates.opens_reasoning(self._body)
        self._readers = [MessageReader(self._body.may_call(), opens) for _ in range(self.num_choices)]

    async def generate(self) -> Generation:
        """The whole answer."""
        return await self.backend.generate(self.request, self.whole_parameters(), messages=self._body.messages)

    def stream(self) -> AsyncStream:
        """The answer in chunks."""
        return self.backend.stream(self.request, self.stream_parameters(), messages=self._body.messages)

    def choice(self, generation: Generation, position: int, index: int) -> dict[str, Any]:
        found = generation.choices[position]
        pieces = self._readers[position].read(found.text, is_last=True)
        content = _joined(pieces, "content")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning := _joined(pieces, "reasoning"):
            message["reasoning_content"] = reasoning
        if calls := self._calls(pieces, position):
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._told_logprobs(generation, position),
            "finish_reason": self._reason(found.finish_reason, position),
        }

    def first_choices(self) -> list[dict[str, Any]]:
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in range(self.num_choices)
        ]

    def chunk_choices(self, chunk: Chunk, prompt: int) -> list[dict[str, Any]]:
        choices = []
        for position, found in enumerate(chunk.choices):
            ended = found.finish_reason is not None
            delta: dict[str, Any] = {}
            for piece in self._readers[position].read(found.text, is_last=ended):
                if piece.kind == "content":
                    delta["content"] = delta.get("content", "") + piece.text
                elif piece.kind == "reasoning":
                    delta["reasoning_content"] = delta.get("reasoning_content", "") + piece.text
                else:
                    self._add_call(delta.setdefault("tool_calls", []), piece, position)
            logprobs = self._told_logprobs(chunk, position)
            if delta or ended or (logprobs and logprobs["content"]):
                reason = self._reason(found.finish_reason, position)
                choices.append({"index": position, "delta": delta, "logprobs": logprobs, "finish_reason": reason})
        return choices

    def _add_call(self, calls: list[dict[str, Any]], piece: Piece, position: int) -> None:
        """Add what a piece says of a call to a delta, where each call stands once."""
        if piece.kind == "call":
            function = {"name": piece.text, "arguments": ""}
            call_id = self._call_id(position, piece.call)
            calls.append({"index": piece.call, "id": call_id, "type": "function", "function": function})
        elif calls and calls[-1]["index"] == piece.call:
            calls[-1]["function"]["arguments"] += piece.text
        else:
            calls.append({"index": piece.call, "function": {"arguments": piece.text}})

    def _calls(self, pieces: list[Piece], position: int) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if piece.kind in ("call", "arguments"):
                self._add_call(calls, piece, position)
        return [{name: call[name] for name in ("id", "type", "function")} for call in calls]

    def _call_id(self, position: int, call: int) -> str:
        return f"call_{self.request.state.request_id}_{position}_{call}"

    def _reason(self, finish_reason: str | None, position: int) -> str | None:
        reason = told_reason(finish_reason)
        return "tool_calls" if reason == "stop" and self._readers[position].num_calls else reason

    def _told_logprobs(self, answer: Generation | Chunk, position: int) -> dict[str, Any] | None:
        return {"content": told_logprobs(answer, position), "refusal": None} if self._logprobs else None


def _joined(pieces: list[Piece], kind: str) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)
