"""One request of an OpenAI route: its parameters for the server, the frame of its answer, the stream of its chunks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from textgen_client.aio import AsyncStream
from textgen_client.errors import TextgenError
from textgen_client.gateway.backend import Backend
from textgen_client.gateway.compute_headers import stream_headers, whole_headers
from textgen_client.gateway.errors import openai_body
from textgen_client.gateway.openai_bodies import Common
from textgen_client.gateway.settings import VERSION
from textgen_client.gateway.sse import DONE, EventStream, event, unless_gone
from textgen_client.results import Chunk, Generation

# What OpenAI's clients may send and nothing here depends on: who asks, where it is kept, what it costs.
WITHOUT_EFFECT = frozenset(
    {
        "max_tool_calls", "metadata", "modalities", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "safety_identifier", "service_tier", "store", "truncation", "user", "verbosity",
    }
)  # fmt: skip
_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "timeout": "length"}


class Exchange(ABC):
    """A request whose answer has choices. kind, chunk_kind: what its answer, and a chunk of it, call themselves."""

    kind = ""
    chunk_kind = ""
    id_prefix = ""
    # Fields that are no parameters of the server under the same name.
    own_fields = frozenset({"model", "prompt", "messages", "stream", "stream_options", "temperature", "logprobs"})

    def __init__(self, request: Request, backend: Backend, body: Common, model: str, adapter: str | None) -> None:
        """model: the name to answer with. adapter: the one to generate with."""
        self.request = request
        self.backend = backend
        self.num_choices = body.n or 1
        self.include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self.parameters = server_parameters(body, self.own_fields)
        if adapter is not None:
            self.parameters["adapter_id"] = adapter
        self._id = f"{self.id_prefix}-{request.state.request_id}"
        self._created = int(time.time())
        self._model = model

    @property
    @abstractmethod
    def num_characters(self) -> int:
        """Of the prompts, for TGI's header."""

    @abstractmethod
    def choice(self, generation: Generation, position: int, index: int) -> dict[str, Any]:
        """One choice of an answer."""

    @abstractmethod
    def chunk_choices(self, chunk: Chunk, prompt: int) -> list[dict[str, Any]]:
        """What one response of the server adds to the choices of a prompt."""

    def first_choices(self) -> list[dict[str, Any]]:
        """The choices of a chunk that goes before all text; none where there is no such chunk."""
        return []

    def frame(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """An answer, or a chunk of one, around its choices."""
        return {
            "id": self._id,
            "object": self.chunk_kind if chunk else self.kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": f"triton-textgen-{VERSION}",
            "choices": choices,
        }

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        """The answer that does not stream; one generation per prompt."""
        choices = [
            self.choice(generation, position, prompt * self.num_choices + position)
            for prompt, generation in enumerate(generations)
            for position in range(len(generation.choices))
        ]
        tokens_in = sum(generation.num_input_tokens or 0 for generation in generations)
        tokens_out = sum(generation.num_output_tokens or 0 for generation in generations)
        return {**self.frame(choices, chunk=False), "usage": _usage(tokens_in, tokens_out)}

    def whole_parameters(self) -> dict[str, Any]:
        """The parameters, and details, which have the timings for the headers."""
        return {**self.parameters, "details": True}

    def stream_parameters(self) -> dict[str, Any]:
        """The parameters, and with usage those that make a stream's responses carry counts: each costs."""
        counts = {"return_num_input_tokens": True, "return_num_output_tokens": True} if self.include_usage else {}
        return {**self.parameters, **counts}


def server_parameters(body: BaseModel, own_fields: frozenset[str]) -> dict[str, Any]:
    """The fields of `body` that are parameters of the server, and how to choose tokens: OpenAI's default is sampling,
    and its temperature 0 the most likely token."""
    skipped = WITHOUT_EFFECT | own_fields
    given = {name: value for name, value in body.model_dump(exclude_none=True).items() if name not in skipped}
    temperature = getattr(body, "temperature", None)
    if temperature is None:
        given.setdefault("do_sample", True)
    elif temperature > 0:
        given["temperature"] = temperature
    return given


def told_reason(finish_reason: str | None) -> str | None:
    """OpenAI's name for the server's reason."""
    return None if finish_reason is None else _REASONS.get(finish_reason, finish_reason)


def details_of(answer: Generation | Chunk, position: int) -> Mapping[str, Any]:
    """The details of one choice."""
    details = answer.details or {"tokens": []}
    found: Mapping[str, Any] = details["choices"][position] if "choices" in details else details
    return found


def told_logprobs(answer: Generation | Chunk, position: int) -> list[dict[str, Any]]:
    """Each new token of a choice with its log-probability and the alternatives asked for."""
    details = details_of(answer, position)
    tops = details.get("top_tokens") or [[] for _ in details["tokens"]]
    return [
        {**_logprob(token), "top_logprobs": [_logprob(other) for other in top]}
        for token, top in zip(details["tokens"], tops, strict=True)
    ]


def _usage(num_input: int, num_output: int) -> dict[str, int]:
    return {"prompt_tokens": num_input, "completion_tokens": num_output, "total_tokens": num_input + num_output}


def _logprob(token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["text"]
    # OpenAI's lowest number stands for "impossible": JSON has no infinity, and its clients expect a number.
    logprob = -9999.0 if token["logprob"] is None else token["logprob"]
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


# ---- streams --------------------------------------------------------------------------------------------------------


async def stream_response(
    streams: list[AsyncStream], exchange: Exchange, beside: Coroutine[Any, Any, None] | None = None
) -> Response:
    """A stream whose headers wait for the first response, so that a refusal has its status. beside: is done before
    the first chunk is read."""
    first, chunks = await begun(exchange.request, streams, beside)
    headers = await stream_headers(exchange.backend, exchange.num_characters)
    return EventStream(_chunk_events(first, chunks, exchange), headers)


async def whole_response(exchange: Exchange, work: Coroutine[Any, Any, list[Generation]]) -> Response:
    """The answer that does not stream, with TGI's headers. work: generates it."""
    start_s = time.monotonic()
    generations = await unless_gone(exchange.request, work)
    elapsed_s = time.monotonic() - start_s
    headers = await whole_headers(exchange.backend, exchange.num_characters, generations, elapsed_s)
    return JSONResponse(exchange.whole(generations), headers=headers)


async def begun(
    request: Request, streams: list[AsyncStream], beside: Coroutine[Any, Any, None] | None = None
) -> tuple[Any, Any]:
    """The first of (number of a stream, chunk), None where there is none, and an iterator of the others. What the
    server refuses is raised here, before any header is sent."""
    chunks = _merged(streams)
    try:
        return await unless_gone(request, _first_of(chunks, beside)), chunks
    except BaseException:
        await _close(streams)
        await chunks.aclose()
        raise


async def _first_of(chunks: Any, beside: Coroutine[Any, Any, None] | None) -> Any:
    if beside is None:
        return await anext(chunks, None)
    first, _ = await asyncio.gather(anext(chunks, None), beside)
    return first


async def _chunk_events(first: Any, chunks: Any, exchange: Exchange) -> AsyncIterator[bytes]:
    num_input: dict[int, int] = {}
    num_output = 0

    def told(choices: list[dict[str, Any]]) -> bytes:
        chunk = exchange.frame(choices, chunk=True)
        return event({**chunk, "usage": None} if exchange.include_usage else chunk)

    async with contextlib.aclosing(chunks):
        if choices := exchange.first_choices():
            yield told(choices)
        try:
            found = first
            while found is not None:
                prompt, chunk = found
                num_input[prompt] = max(num_input.get(prompt, 0), chunk.num_input_tokens or 0)
                num_output += chunk.num_output_tokens or 0
                if choices := exchange.chunk_choices(chunk, prompt):
                    yield told(choices)
                found = await anext(chunks, None)
            if exchange.include_usage:
                usage = _usage(sum(num_input.values()), num_output)
                yield event({**exchange.frame([], chunk=True), "usage": usage})
        except TextgenError as error:
            yield event(openai_body(error))
    yield DONE


async def _merged(streams: list[AsyncStream]) -> Any:
    """(number of the stream, chunk), as they come; the first error ends all. At most one chunk a stream is held."""
    waiting = {asyncio.ensure_future(_next(stream)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: waiting[task]):
                number = waiting.pop(task)
                chunk = task.result()
                if chunk is not None:
                    waiting[asyncio.ensure_future(_next(streams[number]))] = number
                    yield number, chunk
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await _close(streams)


async def _next(stream: AsyncStream) -> Chunk | None:
    return await anext(stream, None)


async def _close(streams: list[AsyncStream]) -> None:
    for stream in streams:
        await stream.aclose()
