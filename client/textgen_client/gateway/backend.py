"""What the routes use of Triton: one client for the process, the health it last showed, its metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import httpx
from fastapi import Request

from textgen_client.aio import AsyncClient, AsyncStream
from textgen_client.errors import ServerUnavailable
from textgen_client.gateway.served import Served, Templates
from textgen_client.gateway.settings import GatewaySettings
from textgen_client.health import Health
from textgen_client.results import Generation

_HEALTH_TIMEOUT_S = 5.0
# Probes of many load balancers must not become the server's main occupation.
_HEALTH_VALID_S = 1.0
_TRACE_HEADERS = ("traceparent", "tracestate")


class Backend:
    """Triton, as the routes see it. Belongs to one event loop."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.client = AsyncClient(settings.triton_url, model=settings.triton_model)
        self.served = Served(settings, self.client)
        self.templates = Templates(self.client)
        self.start_s = time.time()
        self._http = httpx.AsyncClient(timeout=10)
        self._health: Health | None = None
        self._health_until_s = 0.0
        self._asking = asyncio.Lock()

    async def close(self) -> None:
        """Close both connections."""
        await self.client.close()
        await self._http.aclose()

    async def generate(self, request: Request, parameters: Mapping[str, Any], **prompt: Any) -> Generation:
        """The whole answer. prompt: one of `prompt`, `messages`, `input_ids`. The HTTP request's id and trace context
        travel with it."""
        return await self.client.generate(**self._about(request), **prompt, **parameters)

    def stream(self, request: Request, parameters: Mapping[str, Any], **prompt: Any) -> AsyncStream:
        """The answer in chunks; arguments are those of `generate`."""
        return self.client.stream(**self._about(request), **prompt, **parameters)

    def _about(self, request: Request) -> dict[str, Any]:
        return {"request_id": request.state.request_id, "headers": trace_of(request)}

    async def health(self) -> Health:
        """Whether the model generates; asked of it at most once a second."""
        async with self._asking:
            if self._health is None or time.monotonic() > self._health_until_s:
                self._health = await self.client.health(timeout=_HEALTH_TIMEOUT_S)
                self._health_until_s = time.monotonic() + _HEALTH_VALID_S
            return self._health

    async def metrics(self) -> tuple[bytes, str]:
        """Triton's metrics as they are, with their media type. Raises ServerUnavailable."""
        try:
            answer = await self._http.get(self.settings.triton_metrics_url)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise ServerUnavailable(f"{self.settings.triton_metrics_url}: {error}") from None
        return answer.content, answer.headers.get("content-type", "text/plain")


def backend_of(request: Request) -> Backend:
    """The backend of the application that serves `request`."""
    backend: Backend = request.app.state.backend
    return backend


def trace_of(request: Request) -> dict[str, str]:
    """The W3C trace context that came with a request."""
    return {name: request.headers[name] for name in _TRACE_HEADERS if name in request.headers}
