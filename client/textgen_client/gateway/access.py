"""What every request passes before its route: its id, the log, its key, its size.

Plain ASGI layers, so that a route's `receive` is the server's own and notices a client that leaves.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from textgen_client.gateway.errors import plain_error

logger = logging.getLogger("textgen_client.gateway.access")

REQUEST_ID = "x-request-id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# As in TGI, whoever may reach the port may see what is served and whether it is well.
OPEN_ROUTES = frozenset(
    {"/info", "/health", "/ping", "/metrics", "/v1/models", "/docs", "/api-doc/openapi.json", "/chat"}
)


class RequestIds:
    """Gives each request an id, the client's own where it is harmless, and puts it on the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class AccessLog:
    """One JSON line per request, when its response has ended or its client has left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.monotonic()
        first_s: float | None = None
        status, size = 0, 0

        async def watch(message: Message) -> None:
            nonlocal status, size, first_s
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message.get("body"):
                size += len(message["body"])
                first_s = first_s or time.monotonic() - start_s
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            client = scope.get("client")
            line = {
                "time": time.time(),
                "request_id": scope.get("state", {}).get("request_id"),
                "worker": os.getpid(),
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "bytes": size,
                "first_byte_s": None if first_s is None else round(first_s, 6),
                "duration_s": round(time.monotonic() - start_s, 6),
                "traceparent": Headers(scope=scope).get("traceparent"),
            }
            logger.info(json.dumps(line, ensure_ascii=False))


class ApiKeys:
    """Refuses guarded routes (401) without `Authorization: Bearer <one of the keys>`."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_routes: frozenset[str]) -> None:
        self._app = app
        self._open_routes = open_routes
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope) or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        refusal = plain_error(Request(scope), 401, "no API key of this server in `Authorization`", "unauthorized")
        refusal.headers["WWW-Authenticate"] = "Bearer"
        await refusal(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        return path in self._open_routes or (path == "/" and scope["method"] in ("GET", "HEAD"))

    def _is_known(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode()
        # Every key is compared in full, so that the time taken tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)


class BodyLimit:
    """Refuses bodies over the limit (413), announced or not, and bodies that are no JSON (415)."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limit:
            await self._refuse(scope, receive, send)
            return
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            text = "the header `Content-Type` must be application/json"
            await plain_error(Request(scope), 415, text, "unsupported_media_type")(scope, receive, send)
            return
        if announced.isdigit():
            await self._app(scope, receive, send)
            return
        # A body of unknown length is read here, up to the limit, and handed on whole.
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                await self._refuse(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_whole() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, receive_whole, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"the body is larger than {self._limit} bytes (PAYLOAD_LIMIT)"
        refusal = plain_error(Request(scope), 413, text, "payload_too_large")
        refusal.headers["Connection"] = "close"  # the rest of the body is not read
        await refusal(scope, receive, send)
