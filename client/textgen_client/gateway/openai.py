"""OpenAI's routes. chat.py, completion.py and responses.py own the answers, the server gives parameters their meaning.

Errors that come before the first token have their real status, also on streams; later ones are an event. Temperature 0
is the most likely token, as OpenAI's users expect. TGI's spellings of `response_format`, and this server's further
parameters, are taken as well.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from textgen_client.gateway.backend import backend_of
from textgen_client.gateway.chat import Chat
from textgen_client.gateway.completion import Completion
from textgen_client.gateway.exchange import stream_response, whole_response
from textgen_client.gateway.openai_bodies import ANSWERS, ChatRequest, CompletionRequest, ResponsesRequest
from textgen_client.gateway.responses import Answering
from textgen_client.gateway.sse import unless_gone
from textgen_client.results import Generation

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.get("/models", responses={503: ANSWERS[503]})
async def models(request: Request) -> dict[str, Any]:
    """What is served: the model, and its adapters."""
    backend = backend_of(request)
    names = [await backend.served.name(), *await backend.served.adapters()]
    return {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": int(backend.start_s), "owned_by": "triton-textgen"}
            for name in names
        ],
    }


@router.post("/chat/completions", responses=ANSWERS, response_class=Response)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """An answer to a conversation."""
    backend = backend_of(request)
    chat = Chat(request, backend, body, *await backend.served.resolve(body.model))
    if body.stream:
        return await stream_response([chat.stream()], chat, chat.prepare())
    return await whole_response(chat, _chat_generations(chat))


@router.post("/completions", responses=ANSWERS, response_class=Response)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continuations of one prompt or several."""
    backend = backend_of(request)
    completion = Completion(request, backend, body, *await backend.served.resolve(body.model))
    if body.stream:
        return await stream_response(completion.streams(), completion)
    return await whole_response(completion, completion.generate())


@router.post("/responses", responses=ANSWERS, response_class=Response)
async def responses(request: Request, body: ResponsesRequest) -> Response:
    """An answer in items: reasoning, messages, calls of functions. Nothing is stored."""
    backend = backend_of(request)
    answering = Answering(request, backend, body, *await backend.served.resolve(body.model))
    if body.stream:
        return await answering.stream()
    return JSONResponse(await unless_gone(request, answering.whole()))


async def chat_text(request: Request, body: ChatRequest) -> str:
    """The text of the answer to a conversation, as it was generated."""
    backend = backend_of(request)
    chat = Chat(request, backend, body, *await backend.served.resolve(body.model))
    return (await chat.generate()).text


async def _chat_generations(chat: Chat) -> list[Generation]:
    generation, _ = await asyncio.gather(chat.generate(), chat.prepare())
    return [generation]
