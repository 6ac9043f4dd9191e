"""What a failure looks like over HTTP: its status, and its body in the dialect of the route.

{"error": text, "error_type": tag}                              TGI
{"error": {"message", "type", "param", "code"}}                 OpenAI, on every route below /v1
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from textgen_client.errors import (
    GenerationError,
    NotReadyError,
    OverloadedError,
    RequestCancelled,
    RequestTimeout,
    ServerUnavailable,
    TextgenError,
    ValidationError,
)

RETRY_AFTER_S = 1
# What proxies log for a client that left before its answer; nobody reads it.
CLIENT_CLOSED_REQUEST = 499

_STATUS: tuple[tuple[type[TextgenError], int], ...] = (
    (ValidationError, 422),
    (OverloadedError, 429),
    (RequestTimeout, 408),
    (RequestCancelled, CLIENT_CLOSED_REQUEST),
    (NotReadyError, 503),
    (ServerUnavailable, 503),
    (GenerationError, 424),
)
_OPENAI_TYPE = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ModelNotFound(TextgenError):
    """The request names a model, or an adapter, that is not served."""

    public_type = "model_not_found"
    prefix = "Model not found"


class ClientGone(Exception):
    """The client closed its connection before it was answered."""


def status_of(error: TextgenError) -> int:
    """The HTTP status for one of the client's errors."""
    if isinstance(error, ModelNotFound):
        return 404
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def tgi_body(error: TextgenError) -> dict[str, Any]:
    """TGI's body; a server that cannot be reached is unhealthy to it."""
    kind = "healthcheck" if isinstance(error, ServerUnavailable) else error.public_type
    text = "Model is overloaded" if isinstance(error, OverloadedError) else str(error)
    return {"error": text, "error_type": kind}


def openai_body(error: TextgenError) -> dict[str, Any]:
    """OpenAI's body; `code` is TGI's error type."""
    return _openai(str(error), status_of(error), tgi_body(error)["error_type"])


def install(app: FastAPI) -> None:
    """Every error that leaves a route becomes a body in the route's dialect."""

    @app.exception_handler(TextgenError)
    async def _textgen(request: Request, error: TextgenError) -> Response:
        status = status_of(error)
        body = openai_body(error) if _speaks_openai(request) else tgi_body(error)
        return JSONResponse(body, status, retry_after(status))

    @app.exception_handler(ClientGone)
    async def _gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(RequestValidationError)
    async def _malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return plain_error(request, 400, f"the body is no valid JSON: {first['ctx']['error']}", "malformed")
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        text = f"Input validation error: `{place or 'body'}`: {first['msg']}"
        return plain_error(request, 422, text, "validation", place or None)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        answer = plain_error(request, error.status_code, str(error.detail), "http")
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> Response:
        return plain_error(request, 500, "the gateway failed; its log says why", "internal")


def plain_error(request: Request, status: int, text: str, kind: str, param: str | None = None) -> JSONResponse:
    """An error of the gateway's own, in the dialect of the request's route."""
    body = _openai(text, status, kind, param) if _speaks_openai(request) else {"error": text, "error_type": kind}
    return JSONResponse(body, status)


def retry_after(status: int) -> dict[str, str]:
    """Headers that tell a client to come back, where that makes sense."""
    return {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}


def _openai(message: str, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    kind = _OPENAI_TYPE.get(status, "invalid_request_error" if status < 500 and status != 424 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _speaks_openai(request: Request) -> bool:
    return request.url.path.startswith("/v1/")
