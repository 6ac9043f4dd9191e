"""The application: routes, errors, and the layers every request passes, outermost first."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from textgen_client.gateway import access, chat_page, clouds, errors, openai, tgi
from textgen_client.gateway.backend import Backend
from textgen_client.gateway.settings import VERSION, GatewaySettings

# Settings travel to uvicorn's worker processes as JSON in this variable.
SETTINGS_VARIABLE = "GATEWAY_SETTINGS"
_EXPOSED = [
    access.REQUEST_ID,
    "retry-after",
    "x-compute-type",
    "x-compute-time",
    "x-prompt-tokens",
    "x-generated-tokens",
]


def make_app(settings: GatewaySettings) -> FastAPI:
    """The gateway's ASGI application."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.backend = Backend(settings)
        yield
        await app.state.backend.close()

    app = FastAPI(
        title="triton-textgen gateway",
        version=VERSION,
        description="Text Generation Inference's and OpenAI's HTTP routes.",
        openapi_url="/api-doc/openapi.json",
        redoc_url=None,
        lifespan=life,
    )
    app.include_router(tgi.router)
    app.include_router(openai.router)
    app.include_router(clouds.router)
    app.include_router(chat_page.router)
    open_routes = set(access.OPEN_ROUTES)
    if settings.vertex_health_route:
        app.add_api_route(settings.vertex_health_route, tgi.health, include_in_schema=False)
        open_routes.add(settings.vertex_health_route)
    if settings.vertex_predict_route:
        app.add_api_route(settings.vertex_predict_route, clouds.vertex, methods=["POST"], include_in_schema=False)
    errors.install(app)
    # The last one added is the first one passed.
    app.add_middleware(access.BodyLimit, limit_bytes=settings.payload_limit)
    if settings.api_keys:
        app.add_middleware(access.ApiKeys, keys=settings.api_keys, open_routes=frozenset(open_routes))
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_allow_origin),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=_EXPOSED,
    )
    if settings.access_log:
        app.add_middleware(access.AccessLog)
    app.add_middleware(access.RequestIds)
    return app


def make_worker_app() -> FastAPI:
    """The application of one of several worker processes."""
    return make_app(GatewaySettings(**json.loads(os.environ[SETTINGS_VARIABLE])))
