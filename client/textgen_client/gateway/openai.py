"""OpenAI's routes. Owns their bodies; message.py takes a chat answer apart, the server gives parameters their meaning.

Errors that come before the first token have their real status, also on streams; later ones are an event. Temperature 0
is the most likely token, as OpenAI's users expect. TGI's spellings of `response_format`, and this server's further
parameters, are taken as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from textgen_client.aio import AsyncStream
from textgen_client.errors import TextgenError, ValidationError
from textgen_client.gateway.backend import backend_of
from textgen_client.gateway.errors import ModelNotFound, openai_body
from textgen_client.gateway.message import MessageReader
from textgen_client.gateway.settings import VERSION, GatewaySettings
from textgen_client.gateway.sse import DONE, EventStream, event, unless_gone
from textgen_client.results import Chunk, Generation

router = APIRouter(prefix="/v1", tags=["OpenAI"])

# What OpenAI's clients may send and nothing here depends on: who asks, where it is kept, what it costs.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata", "modalities", "parallel_tool_calls", "prompt_cache_key", "reasoning_effort", "safety_identifier",
        "service_tier", "store", "user", "verbosity",
    }
)  # fmt: skip
_OWN_FIELDS = frozenset(
    {"model", "messages", "prompt", "stream", "stream_options", "temperature", "logprobs", "top_logprobs", "suffix"}
)
_REASONS = {"eos_token": "stop", "stop_sequence": "stop", "timeout": "length"}


class StreamOptions(BaseModel):
    """include_usage: one more chunk, without choices, says how many tokens there were."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None


class _Common(BaseModel):
    """What both routes take; this server's further parameters (docs/parameters.md) may stand beside them."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # OpenAI's bound; the server's own (max_best_of) is lower. A message reader is made for each.
    n: Annotated[int, Field(ge=1, le=128, strict=True)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None


class ChatRequest(_Common):
    """A conversation to go on with."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    tool_prompt: str | None = None


class CompletionRequest(_Common):
    """Prompts to continue: a text, several, or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, strict=True)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, strict=True)] | None = None
    suffix: str | None = None


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error."""

    error: ErrorBody


_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse} for code in (400, 401, 404, 408, 413, 415, 422, 424, 429, 503)
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    200: {
        "description": "the answer, or a stream of chunks",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
}


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """What is served: the model, and its adapters."""
    backend = backend_of(request)
    names = [backend.settings.model_name, *backend.settings.lora_adapters]
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": int(backend.start_s), "owned_by": "triton-textgen"}
            for name in names
        ],
    }


@router.post("/chat/completions", responses=_ANSWERS, response_class=Response)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """An answer to a conversation."""
    chat = _Chat(request, body)
    if body.stream:
        return await _stream_response([chat.stream()], chat)
    generation = await unless_gone(request, chat.generate())
    return JSONResponse(chat.whole([generation]))


@router.post("/completions", responses=_ANSWERS, response_class=Response)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continuations of one prompt or several."""
    completion = _Completion(request, body)
    if body.stream:
        return await _stream_response(completion.streams(), completion)
    generations = await unless_gone(request, completion.generate())
    return JSONResponse(completion.whole(generations))


async def chat_text(request: Request, body: ChatRequest) -> str:
    """The text of the answer to a conversation, as it was generated."""
    return (await _Chat(request, body).generate()).text


def prompt_parameters(body: ChatRequest) -> dict[str, Any]:
    """Those parameters of a chat that change its prompt."""
    extra = body.model_extra or {}
    names = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "documents")
    chosen = {name: extra[name] for name in names if name in extra}
    tools = {"tools": body.tools, "tool_choice": body.tool_choice, "tool_prompt": body.tool_prompt}
    return {**chosen, **tools}


# ---- what both routes share -----------------------------------------------------------------------------------------


class _Exchange:
    """One HTTP request: its parameters for the server, and the frame of its answer."""

    kind = ""
    chunk_kind = ""
    id_prefix = ""

    def __init__(self, request: Request, body: _Common) -> None:
        self.request = request
        self.backend = backend_of(request)
        self.num_choices = body.n or 1
        self.include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._id = f"{self.id_prefix}-{request.state.request_id}"
        self._created = int(time.time())
        self._model, adapter = _model(body.model, self.backend.settings)
        self.parameters = self._common(body)
        if adapter is not None:
            self.parameters["adapter_id"] = adapter

    def _common(self, body: _Common) -> dict[str, Any]:
        skipped = _WITHOUT_EFFECT | _OWN_FIELDS
        given = {
            name: value
            for name, value in body.model_dump(exclude_none=True).items()
            if name not in skipped and value is not None
        }
        if body.temperature is None:
            given.setdefault("do_sample", True)
        elif body.temperature > 0:
            given["temperature"] = body.temperature
        return given

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

    def choice(self, generation: Generation, position: int, index: int) -> dict[str, Any]:
        """One choice of an answer."""
        raise NotImplementedError

    def first_choices(self) -> list[dict[str, Any]]:
        """The choices of a chunk that goes before all text; none where there is no such chunk."""
        return []

    def chunk_choices(self, chunk: Chunk, prompt: int) -> list[dict[str, Any]]:
        """What one response of the server adds to the choices of a prompt."""
        raise NotImplementedError


class _Chat(_Exchange):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, request: Request, body: ChatRequest) -> None:
        super().__init__(request, body)
        self._messages = body.messages
        self._logprobs = bool(body.logprobs)
        if self._logprobs:
            self.parameters["details"] = True
            if body.top_logprobs:
                self.parameters["top_n_tokens"] = body.top_logprobs
        elif body.top_logprobs:
            raise ValidationError("`top_logprobs` needs `logprobs: true`")
        self._may_call = bool(body.tools) and body.tool_choice != "none"
        self._readers = [MessageReader(self._may_call) for _ in range(self.num_choices)]

    async def generate(self) -> Generation:
        return await self.backend.generate(self.request, self.parameters, messages=self._messages)

    def stream(self) -> AsyncStream:
        counts = _counted(self.include_usage)
        return self.backend.stream(self.request, {**self.parameters, **counts}, messages=self._messages)

    def choice(self, generation: Generation, position: int, index: int) -> dict[str, Any]:
        found = generation.choices[position]
        piece = self._readers[position].read(found.text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": piece.content, "refusal": None}
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        if piece.name is not None:
            function = {"name": piece.name, "arguments": piece.arguments}
            message["content"] = None
            message["tool_calls"] = [{"id": self._call_id(index), "type": "function", "function": function}]
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
            piece = self._readers[position].read(found.text, is_last=ended)
            delta: dict[str, Any] = {}
            if piece.content:
                delta["content"] = piece.content
            if piece.reasoning:
                delta["reasoning_content"] = piece.reasoning
            if piece.name is not None:
                function = {"name": piece.name, "arguments": piece.arguments}
                call = {"index": 0, "id": self._call_id(position), "type": "function", "function": function}
                delta["tool_calls"] = [call]
            elif piece.arguments:
                delta["tool_calls"] = [{"index": 0, "function": {"arguments": piece.arguments}}]
            logprobs = self._told_logprobs(chunk, position)
            if delta or ended or (logprobs and logprobs["content"]):
                reason = self._reason(found.finish_reason, position)
                choices.append({"index": position, "delta": delta, "logprobs": logprobs, "finish_reason": reason})
        return choices

    def _call_id(self, index: int) -> str:
        return f"call_{self.request.state.request_id}_{index}"

    def _reason(self, finish_reason: str | None, position: int) -> str | None:
        reason = _reason(finish_reason)
        return "tool_calls" if reason == "stop" and self._readers[position].has_call else reason

    def _told_logprobs(self, answer: Generation | Chunk, position: int) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        details = _details(answer, position)
        tops = details.get("top_tokens") or [[] for _ in details["tokens"]]
        content = [
            {**_logprob(token), "top_logprobs": [_logprob(other) for other in top]}
            for token, top in zip(details["tokens"], tops, strict=True)
        ]
        return {"content": content, "refusal": None}


class _Completion(_Exchange):
    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, request: Request, body: CompletionRequest) -> None:
        super().__init__(request, body)
        if body.suffix:
            raise ValidationError("`suffix` is not supported")
        self._prompts = _prompts(body.prompt, self.backend.settings.max_client_batch_size)
        self._logprobs = body.logprobs is not None
        if self._logprobs:
            self.parameters |= {"details": True, "top_n_tokens": body.logprobs or None}
        # Where each choice's next token begins in its text.
        self._offsets = [0] * (len(self._prompts) * self.num_choices)

    async def generate(self) -> list[Generation]:
        tasks = [
            asyncio.ensure_future(self.backend.generate(self.request, self.parameters, **prompt))
            for prompt in self._prompts
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def streams(self) -> list[AsyncStream]:
        parameters = {**self.parameters, **_counted(self.include_usage)}
        return [self.backend.stream(self.request, parameters, **prompt) for prompt in self._prompts]

    def choice(self, generation: Generation, position: int, index: int) -> dict[str, Any]:
        found = generation.choices[position]
        return {
            "index": index,
            "text": found.text,
            "logprobs": self._told_logprobs(generation, position, index),
            "finish_reason": _reason(found.finish_reason),
        }

    def chunk_choices(self, chunk: Chunk, prompt: int) -> list[dict[str, Any]]:
        choices = []
        for position, found in enumerate(chunk.choices):
            index = prompt * self.num_choices + position
            logprobs = self._told_logprobs(chunk, position, index)
            if found.text or found.finish_reason is not None or (logprobs and logprobs["tokens"]):
                reason = _reason(found.finish_reason)
                choices.append({"index": index, "text": found.text, "logprobs": logprobs, "finish_reason": reason})
        return choices

    def _told_logprobs(self, answer: Generation | Chunk, position: int, index: int) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        details = _details(answer, position)
        tokens = details["tokens"]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token["text"])
        tops = details.get("top_tokens") or [[] for _ in tokens]
        return {
            "tokens": [token["text"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [{other["text"]: other["logprob"] for other in top} for top in tops],
            "text_offset": offsets,
        }


def _model(name: str | None, settings: GatewaySettings) -> tuple[str, str | None]:
    """The name to answer with, and the adapter. Raises ModelNotFound."""
    if not name or name in settings.model_aliases:
        return settings.model_name, None
    if name in settings.lora_adapters:
        return name, name
    known = ", ".join([settings.model_name, *settings.lora_adapters])
    raise ModelNotFound(f"{name!r:.200} is not served here; served: {known}")


def _prompts(prompt: str | list[Any], most: int) -> list[dict[str, Any]]:
    """Each prompt as the client takes it."""
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    if not prompt:
        raise ValidationError("`prompt` must not be empty")
    if isinstance(prompt[0], int):
        return [{"input_ids": prompt}]
    if len(prompt) > most:
        raise ValidationError(
            f"`prompt` must have at most {most} entries (MAX_CLIENT_BATCH_SIZE); given: {len(prompt)}"
        )
    return [{"prompt": one} if isinstance(one, str) else {"input_ids": one} for one in prompt]


def _counted(include_usage: bool) -> dict[str, bool]:
    """Parameters that make a stream's responses carry counts; each costs, so only on request."""
    return {"return_num_input_tokens": True, "return_num_output_tokens": True} if include_usage else {}


def _usage(num_input: int, num_output: int) -> dict[str, int]:
    return {"prompt_tokens": num_input, "completion_tokens": num_output, "total_tokens": num_input + num_output}


def _reason(finish_reason: str | None) -> str | None:
    return None if finish_reason is None else _REASONS.get(finish_reason, finish_reason)


def _details(answer: Generation | Chunk, position: int) -> Mapping[str, Any]:
    details = answer.details or {"tokens": []}
    found: Mapping[str, Any] = details["choices"][position] if "choices" in details else details
    return found


def _logprob(token: Mapping[str, Any]) -> dict[str, Any]:
    text = token["text"]
    # OpenAI's lowest number stands for "impossible": JSON has no infinity, and its clients expect a number.
    logprob = -9999.0 if token["logprob"] is None else token["logprob"]
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


# ---- streams --------------------------------------------------------------------------------------------------------


async def _stream_response(streams: list[AsyncStream], exchange: _Exchange) -> Response:
    """A stream whose headers wait for the first response, so that a refusal has its status."""
    chunks = _merged(streams)
    try:
        first = await unless_gone(exchange.request, anext_of(chunks))
    except BaseException:
        await _close(streams)
        await chunks.aclose()
        raise
    return EventStream(_chunk_events(first, chunks, exchange))


async def anext_of(chunks: Any) -> Any:
    """The next of `chunks`, None at their end."""
    return await anext(chunks, None)


async def _chunk_events(first: Any, chunks: Any, exchange: _Exchange) -> AsyncIterator[bytes]:
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
