"""Client of a triton-textgen server: `Client`, `AsyncClient`, what they return and what they raise."""

from __future__ import annotations

from textgen_client.aio import AsyncClient, AsyncStream
from textgen_client.channel import KeepAlive, Tls
from textgen_client.client import Client, Stream
from textgen_client.errors import (
    GenerationError,
    NotReadyError,
    OverloadedError,
    RequestCancelled,
    RequestTimeout,
    ServerUnavailable,
    TemplateError,
    TextgenError,
    ToolError,
    ValidationError,
)
from textgen_client.health import Health
from textgen_client.results import Adapter, Choice, Chunk, Generation, GrammarCheck, ModelInfo, ModelStatus
from textgen_client.watermark import WatermarkScore, detect_watermark

__all__ = [
    "Adapter",
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Chunk",
    "Client",
    "Generation",
    "GenerationError",
    "GrammarCheck",
    "Health",
    "KeepAlive",
    "ModelInfo",
    "ModelStatus",
    "NotReadyError",
    "OverloadedError",
    "RequestCancelled",
    "RequestTimeout",
    "ServerUnavailable",
    "Stream",
    "TemplateError",
    "TextgenError",
    "Tls",
    "ToolError",
    "ValidationError",
    "WatermarkScore",
    "detect_watermark",
]
