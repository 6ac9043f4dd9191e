"""The routes that clouds call: Amazon SageMaker's and Google Vertex AI's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as ModelError

from textgen_client.gateway import openai, tgi
from textgen_client.gateway.openai_bodies import ChatRequest, CompletionRequest
from textgen_client.gateway.sse import unless_gone
from textgen_client.gateway.tgi_bodies import EITHER, ERRORS, CompatRequest, GenerateRequest

router = APIRouter(tags=["Clouds"])

VERTEX_RESPONSES: dict[int | str, dict[str, Any]] = {**ERRORS, 404: EITHER[404]}


class VertexInstance(BaseModel):
    """One prompt of Vertex AI: TGI's body, or a chat's."""

    model_config = ConfigDict(extra="allow")

    inputs: str | None = None
    messages: list[dict[str, Any]] | None = None


class VertexRequest(BaseModel):
    """Vertex AI's envelope."""

    instances: list[VertexInstance] = Field(min_length=1)


@router.post("/invocations", responses=EITHER, response_class=Response)
async def invocations(request: Request, body: Annotated[dict[str, Any], Body()]) -> Response:
    """Amazon SageMaker: a body of `/`, of `/v1/chat/completions` or of `/v1/completions`."""
    if "messages" in body:
        return await openai.chat_completions(request, _read(ChatRequest, body))
    if "prompt" in body:
        return await openai.completions(request, _read(CompletionRequest, body))
    return await tgi.compat(request, _read(CompatRequest, body))


@router.post("/vertex", responses=VERTEX_RESPONSES)
async def vertex(request: Request, body: VertexRequest) -> dict[str, list[str]]:
    """Vertex AI: each instance is a body of `/generate` or of `/v1/chat/completions`; each prediction is a text."""

    async def predict(instance: VertexInstance) -> str:
        given = instance.model_dump(exclude_none=True)
        if instance.messages is not None:
            return await openai.chat_text(request, _read(ChatRequest, given))
        answered = await tgi.answer(request, _read(GenerateRequest, given), full_text_default=False)
        return str(answered.body["generated_text"])

    async def predict_all() -> list[str]:
        tasks = [asyncio.ensure_future(predict(instance)) for instance in body.instances]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    return {"predictions": await unless_gone(request, predict_all())}


def _read(model: type[Any], body: Mapping[str, Any]) -> Any:
    """`body` as one of the request models; what is wrong with it is the client's error."""
    try:
        return model.model_validate(body)
    except ModelError as error:
        raise RequestValidationError(error.errors()) from None
