"""Text Generation Inference's routes. Owns their answers and headers; the meaning of parameters is the server's.

What TGI's clients rely on is kept: the stop string stays in `generated_text`, a stream answers 200 and carries its
errors as events, `/` returns a list of one and the prompt before the text. A parameter that the server does not know is
refused by it; TGI ignores it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from textgen_client.errors import TextgenError
from textgen_client.gateway.backend import backend_of
from textgen_client.gateway.compute_headers import stream_headers, whole_headers
from textgen_client.gateway.errors import retry_after, tgi_body
from textgen_client.gateway.openai_bodies import ChatRequest
from textgen_client.gateway.settings import VERSION
from textgen_client.gateway.sse import EventStream, event, unless_gone
from textgen_client.gateway.tgi_bodies import (
    EITHER,
    ERRORS,
    STREAM,
    ChatTokenizeResponse,
    CompatRequest,
    GenerateRequest,
    GenerateResponse,
    Info,
    SimpleToken,
)
from textgen_client.results import Tokenization

router = APIRouter(tags=["Text Generation Inference"])

# Fields of one sequence's details, in TGI's order.
_DETAILS = ("finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens")


@router.post("/generate", response_model=GenerateResponse, responses=ERRORS)
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Generate, and answer when all is done."""
    answered = await unless_gone(request, answer(request, body, full_text_default=False))
    return JSONResponse(answered.body, headers=answered.headers)


@router.post("/generate_stream", responses=STREAM, response_class=Response)
async def generate_stream(request: Request, body: GenerateRequest) -> Response:
    """Generate, one event per token."""
    return await _stream(request, body, full_text_default=False)


@router.post("/", responses=EITHER, response_class=Response)
async def compat(request: Request, body: CompatRequest) -> Response:
    """Generate in the form `stream` asks for. Unless told otherwise the text begins with the prompt."""
    if body.stream:
        return await _stream(request, body, full_text_default=True)
    answered = await unless_gone(request, answer(request, body, full_text_default=True))
    return JSONResponse([answered.body], headers=answered.headers)


@router.post("/tokenize", response_model=list[SimpleToken], responses=ERRORS)
async def tokenize(request: Request, body: GenerateRequest) -> Response:
    """The tokens of a text."""
    return JSONResponse(_tokens(await backend_of(request).client.tokenization(body.inputs)))


@router.post("/chat_tokenize", response_model=ChatTokenizeResponse, responses=ERRORS)
async def chat_tokenize(request: Request, body: ChatRequest) -> Response:
    """A conversation as the chat template renders it, and its tokens."""
    found = await backend_of(request).client.tokenization(messages=body.messages, **body.template_parameters())
    return JSONResponse({"tokenize_response": _tokens(found), "templated_text": found.text})


@router.get("/info", response_model=Info, responses={503: ERRORS[503]})
async def info(request: Request) -> Response:
    """What is served, and its limits, as the model reports them."""
    backend = backend_of(request)
    found = await backend.served.info()
    limits = {name: value for name, value in asdict(found).items() if name in Info.model_fields}
    return JSONResponse(
        {
            **limits,
            "model_id": await backend.served.model_id(),
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "validation_workers": backend.settings.validation_workers,
            "max_client_batch_size": backend.settings.max_client_batch_size,
            "router": "textgen-gateway",
            "version": VERSION,
            "sha": None,
            "docker_label": None,
        }
    )


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
class Answered:
    """An answer's body and headers."""

    body: dict[str, Any]
    headers: dict[str, str]


def _parameters(body: GenerateRequest, full_text_default: bool) -> dict[str, Any]:
    """The parameters for the server. Details are always asked for: the headers need the timings."""
    given = body.parameters.model_dump(exclude_none=True) if body.parameters else {}
    defaults = {"return_full_text": full_text_default, "include_stop_str_in_output": True}
    return {**defaults, **given, "details": True}


async def answer(request: Request, body: GenerateRequest, full_text_default: bool) -> Answered:
    """The answer that does not stream. full_text_default: whether the prompt goes before the text, unless told."""
    backend = backend_of(request)
    start_s = time.monotonic()
    generation = await backend.generate(request, _parameters(body, full_text_default), prompt=body.inputs)
    details = generation.details or {}
    content: dict[str, Any] = {"generated_text": generation.text}
    asked = body.parameters
    if asked is not None and (asked.details or asked.decoder_input_details):
        content["details"] = _details(details)
    elapsed_s = time.monotonic() - start_s
    return Answered(content, await whole_headers(backend, len(body.inputs), [generation], elapsed_s))


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


# ---- streams --------------------------------------------------------------------------------------------------------


async def _stream(request: Request, body: GenerateRequest, full_text_default: bool) -> Response:
    headers = await stream_headers(backend_of(request), len(body.inputs))
    return EventStream(_events(request, body, full_text_default), headers)


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
