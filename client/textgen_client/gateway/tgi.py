"""Text Generation Inference's routes. Owns their bodies, fields and headers; the meaning of parameters is the server's.

What TGI's clients rely on is kept: the stop string stays in `generated_text`, a stream answers 200 and carries its
errors as events, `/` returns a list of one and the prompt before the text. A parameter that the server does not know is
refused by it; TGI ignores it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as ModelError

from textgen_client.errors import TextgenError
from textgen_client.gateway import openai
from textgen_client.gateway.backend import Backend, backend_of
from textgen_client.gateway.errors import retry_after, tgi_body
from textgen_client.gateway.settings import VERSION
from textgen_client.gateway.sse import EventStream, event, unless_gone
from textgen_client.results import Generation, Tokenization

router = APIRouter(tags=["Text Generation Inference"])

_UINT64 = 2**64 - 1
# Fields of one sequence's details, in TGI's order.
_DETAILS = ("finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens")


class Grammar(BaseModel):
    """A form that the text must have."""

    model_config = ConfigDict(extra="allow")

    type: str
    value: Any = None


class GenerateParameters(BaseModel):
    """Every parameter of TGI; this server's further ones (docs/parameters.md) may stand beside them."""

    model_config = ConfigDict(extra="allow", strict=True)

    best_of: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    do_sample: bool | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)] | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: Annotated[int, Field(ge=1)] | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: Annotated[int, Field(ge=0, le=_UINT64)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0)] | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None


class GenerateRequest(BaseModel):
    """A prompt and how to continue it."""

    model_config = ConfigDict(extra="forbid")

    inputs: str
    parameters: GenerateParameters | None = None


class CompatRequest(GenerateRequest):
    """As GenerateRequest; `stream` chooses the form of the answer."""

    stream: bool = False


class VertexInstance(BaseModel):
    """One prompt of Vertex AI: TGI's body, or a chat's."""

    model_config = ConfigDict(extra="allow")

    inputs: str | None = None
    messages: list[dict[str, Any]] | None = None


class VertexRequest(BaseModel):
    """Vertex AI's envelope."""

    instances: list[VertexInstance] = Field(min_length=1)


class Token(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(BaseModel):
    """A token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class Sequence(BaseModel):
    """What is told of one generated sequence."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class BestOfSequence(Sequence):
    """A sequence that best_of did not pick."""

    generated_text: str


class Details(Sequence):
    """What is told of the answer."""

    best_of_sequences: list[BestOfSequence] | None = None
    warnings: list[str] | None = None


class GenerateResponse(BaseModel):
    """The answer; `details` on request."""

    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    """What is told of a streamed answer, in its last event."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(BaseModel):
    """One event: a token, and with the last one the whole text."""

    index: int
    token: Token
    top_tokens: list[Token] | None = None
    generated_text: str | None
    details: StreamDetails | None


class ErrorResponse(BaseModel):
    """Every error."""

    error: str
    error_type: str


class SimpleToken(BaseModel):
    """A token of a text and its place there, in characters."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(BaseModel):
    """A conversation as the model reads it."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class Info(BaseModel):
    """What is served. null: left to the model, or not known to the gateway."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse, "description": text}
    for code, text in {
        400: "the body is no JSON",
        401: "no valid API key",
        408: "the request's time was up",
        413: "the body is too large",
        415: "the body's type is not JSON",
        422: "the request is wrong",
        424: "generation failed",
        429: "the model is overloaded",
        503: "the model is not ready",
    }.items()
}
_STREAM: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"description": "a stream of events", "content": {"text/event-stream": {}}},
}
_EITHER: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    404: {"model": ErrorResponse, "description": "no such model"},
    200: {
        "description": "the answer, or a stream of events",
        "content": {"application/json": {"schema": {}}, "text/event-stream": {}},
    },
}


@router.post("/generate", response_model=GenerateResponse, responses=ERRORS)
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Generate, and answer when all is done."""
    answered = await unless_gone(request, _answer(request, body, full_text_default=False))
    return JSONResponse(answered.body, headers=answered.headers)


@router.post("/generate_stream", responses=_STREAM, response_class=Response)
async def generate_stream(request: Request, body: GenerateRequest) -> Response:
    """Generate, one event per token."""
    return _stream(request, body, full_text_default=False)


@router.post("/", responses=_EITHER, response_class=Response)
async def compat(request: Request, body: CompatRequest) -> Response:
    """Generate in the form `stream` asks for. Unless told otherwise the text begins with the prompt."""
    if body.stream:
        return _stream(request, body, full_text_default=True)
    answered = await unless_gone(request, _answer(request, body, full_text_default=True))
    return JSONResponse([answered.body], headers=answered.headers)


@router.post("/invocations", responses=_EITHER, response_class=Response)
async def invocations(request: Request, body: Annotated[dict[str, Any], Body()]) -> Response:
    """Amazon SageMaker: a body of `/`, of `/v1/chat/completions` or of `/v1/completions`."""
    if "messages" in body:
        return await openai.chat_completions(request, _read(openai.ChatRequest, body))
    if "prompt" in body:
        return await openai.completions(request, _read(openai.CompletionRequest, body))
    return await compat(request, _read(CompatRequest, body))


@router.post("/vertex", responses={**ERRORS, 404: _EITHER[404]})
async def vertex(request: Request, body: VertexRequest) -> dict[str, list[str]]:
    """Vertex AI: each instance is a body of `/generate` or of `/v1/chat/completions`; each prediction is a text."""

    async def predict(instance: VertexInstance) -> str:
        given = instance.model_dump(exclude_none=True)
        if instance.messages is not None:
            return await openai.chat_text(request, _read(openai.ChatRequest, given))
        answered = await _answer(request, _read(GenerateRequest, given), full_text_default=False)
        return str(answered.body["generated_text"])

    async def predict_all() -> list[str]:
        tasks = [asyncio.ensure_future(predict(instance)) for instance in body.instances]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    return {"predictions": await unless_gone(request, predict_all())}


@router.post("/tokenize", response_model=list[SimpleToken], responses=ERRORS)
async def tokenize(request: Request, body: GenerateRequest) -> Response:
    """The tokens of a text."""
    return JSONResponse(_tokens(await backend_of(request).client.tokenization(body.inputs)))


@router.post("/chat_tokenize", response_model=ChatTokenizeResponse, responses=ERRORS)
async def chat_tokenize(request: Request, body: openai.ChatRequest) -> Response:
    """A conversation as the chat template renders it, and its tokens."""
    found = await backend_of(request).client.tokenization(messages=body.messages, **openai.prompt_parameters(body))
    return JSONResponse({"tokenize_response": _tokens(found), "templated_text": found.text})


@router.get("/info", response_model=Info)
async def info(request: Request) -> Response:
    """What is served, and its limits."""
    settings = backend_of(request).settings
    named = {name: getattr(settings, name) for name in Info.model_fields if hasattr(settings, name)}
    fixed = {
        "model_id": settings.model_id,
        "model_sha": None,
        "model_pipeline_tag": "text-generation",
        "router": "textgen-gateway",
        "version": VERSION,
        "sha": None,
        "docker_label": None,
    }
    return JSONResponse({**named, **fixed})


@router.get("/", responses={503: ERRORS[503]}, response_class=Response)
@router.get("/health", responses={503: ERRORS[503]}, response_class=Response)
@router.get("/ping", responses={503: ERRORS[503]}, response_class=Response)
async def health(request: Request) -> Response:
    """200 while the model generates: one token is generated to find out, at most once a second."""
    found = await backend_of(request).health()
    if found.ok:
        return Response()
    body = {"error": f"unhealthy: {found.problem}", "error_type": "healthcheck"}
    return JSONResponse(body, 503, retry_after(503))


@router.get(
    "/metrics",
    responses={503: ERRORS[503], 200: {"description": "Prometheus' text", "content": {"text/plain": {}}}},
    response_class=Response,
)
async def metrics(request: Request) -> Response:
    """Triton's metrics, the model's `tgi_*` among them, for Prometheus."""
    content, media_type = await backend_of(request).metrics()
    return Response(content, media_type=media_type)


# ---- one answer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answered:
    body: dict[str, Any]
    headers: dict[str, str]


def _parameters(body: GenerateRequest, full_text_default: bool) -> dict[str, Any]:
    """The parameters for the server. Details are always asked for: the headers need the timings."""
    given = body.parameters.model_dump(exclude_none=True) if body.parameters else {}
    defaults = {"return_full_text": full_text_default, "include_stop_str_in_output": True}
    return {**defaults, **given, "details": True}


async def _answer(request: Request, body: GenerateRequest, full_text_default: bool) -> _Answered:
    backend = backend_of(request)
    start_s = time.monotonic()
    generation = await backend.generate(request, _parameters(body, full_text_default), prompt=body.inputs)
    details = generation.details or {}
    content: dict[str, Any] = {"generated_text": generation.text}
    asked = body.parameters
    if asked is not None and (asked.details or asked.decoder_input_details):
        content["details"] = _details(details)
    elapsed_s = time.monotonic() - start_s
    return _Answered(content, _headers(backend, body.inputs, generation, elapsed_s))


def _headers(backend: Backend, prompt: str, generation: Generation, elapsed_s: float) -> dict[str, str]:
    timings = (generation.details or {}).get("timings", {})
    return {
        **_stream_headers(backend, prompt),
        "x-compute-time": f"{elapsed_s:.6f}",
        "x-total-time": _ms(max(elapsed_s, timings.get("total_time", 0.0))),
        "x-validation-time": _ms(timings.get("validation_time", 0.0)),
        "x-queue-time": _ms(timings.get("queue_time", 0.0)),
        "x-inference-time": _ms(timings.get("inference_time", 0.0)),
        "x-time-per-token": _ms(timings.get("time_per_token", 0.0)),
        "x-prompt-tokens": str(generation.num_input_tokens or 0),
        "x-generated-tokens": str(generation.num_output_tokens or 0),
    }


def _stream_headers(backend: Backend, prompt: str) -> dict[str, str]:
    return {"x-compute-type": backend.settings.compute_type, "x-compute-characters": str(len(prompt))}


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))


def _details(found: Mapping[str, Any]) -> dict[str, Any]:
    """TGI's details out of the server's, which tell more."""
    details = _sequence(found)
    if found.get("best_of_sequences"):
        details["best_of_sequences"] = [
            {"generated_text": other["generated_text"], **_sequence(other)} for other in found["best_of_sequences"]
        ]
    if found.get("warnings"):
        details["warnings"] = found["warnings"]
    return details


def _sequence(found: Mapping[str, Any]) -> dict[str, Any]:
    sequence = {name: found[name] for name in _DETAILS if name in found}
    return {**sequence, "finish_reason": _reason(found.get("finish_reason"))}


def _reason(finish_reason: str | None) -> str | None:
    """TGI has no deadlines and its clients know three reasons; a text cut by its deadline is one cut by its length."""
    return "length" if finish_reason == "timeout" else finish_reason


def _tokens(found: Tokenization) -> list[dict[str, Any]]:
    return [{"id": token.id, "text": token.text, "start": token.start, "stop": token.stop} for token in found.tokens]


def _read(model: type[Any], body: Mapping[str, Any]) -> Any:
    """`body` as one of the request models; what is wrong with it is the client's error."""
    try:
        return model.model_validate(body)
    except ModelError as error:
        raise RequestValidationError(error.errors()) from None


# ---- streams --------------------------------------------------------------------------------------------------------


def _stream(request: Request, body: GenerateRequest, full_text_default: bool) -> Response:
    backend = backend_of(request)
    return EventStream(_events(request, body, full_text_default), _stream_headers(backend, body.inputs))


async def _events(request: Request, body: GenerateRequest, full_text_default: bool) -> AsyncIterator[bytes]:
    wants_details = body.parameters is not None and bool(body.parameters.details)
    index = 0
    text = ""
    token: dict[str, Any] = {"id": 0, "text": "", "logprob": None, "special": True}
    try:
        parameters = _parameters(body, full_text_default)
        async with backend_of(request).stream(request, parameters, prompt=body.inputs) as chunks:
            async for chunk in chunks:
                details = chunk.details or {}
                text += chunk.text
                ended = chunk.finish_reason is not None
                tokens = details.get("tokens", [])
                if ended and not tokens:
                    # The end came without a token of its own (a deadline): clients wait for an event with the text.
                    tokens = [{**token, "text": "", "special": True}]
                top = details.get("top_tokens")
                for position, token in enumerate(tokens):
                    index += 1
                    is_last = ended and position == len(tokens) - 1
                    told: dict[str, Any] = {"index": index, "token": token}
                    if top:
                        told["top_tokens"] = top[position]
                    told["generated_text"] = text if is_last else None
                    told["details"] = _stream_details(details) if is_last and wants_details else None
                    yield event(told)
    except TextgenError as error:
        yield event(tgi_body(error))


def _stream_details(details: Mapping[str, Any]) -> dict[str, Any]:
    names = ("finish_reason", "generated_tokens", "seed", "input_length")
    told = {name: details.get(name) for name in names}
    return {**told, "finish_reason": _reason(told["finish_reason"])}
