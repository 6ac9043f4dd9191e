"""What is served, in the server's own words: the model's name and limits, its adapters, its chat templates.

Asked of it and kept for some seconds, so that a model, or an adapter, that changes meanwhile is noticed and no request
waits for it in the ordinary case.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, TypeVar

from textgen_client.aio import AsyncClient
from textgen_client.errors import TextgenError, ValidationError
from textgen_client.gateway.errors import ModelNotFound
from textgen_client.gateway.openai_bodies import ChatRequest
from textgen_client.gateway.settings import GatewaySettings
from textgen_client.results import ModelInfo

_VALID_S = 10.0
# An unknown name may be that of an adapter loaded a moment ago; asking about it must not become a load of its own.
_UNKNOWN_VALID_S = 0.5
_TIMEOUT_S = 5.0
_OPEN, _CLOSE = "<think>", "</think>"

Value = TypeVar("Value")


class _Kept(Generic[Value]):
    """An answer and when it came; one question at a time."""

    def __init__(self, ask: Callable[[], Awaitable[Value]]) -> None:
        self._ask = ask
        self._asking = asyncio.Lock()
        self._value: Value
        self._since_s: float | None = None

    async def get(self, valid_s: float = _VALID_S) -> Value:
        """The answer, at most so old. Raises what asking raises."""
        if self._is_older(valid_s):
            async with self._asking:
                if self._is_older(valid_s):
                    self._value = await self._ask()
                    self._since_s = time.monotonic()
        return self._value

    def _is_older(self, valid_s: float) -> bool:
        return self._since_s is None or time.monotonic() - self._since_s > valid_s


class Served:
    """The model and its adapters. Belongs to one event loop."""

    def __init__(self, settings: GatewaySettings, client: AsyncClient) -> None:
        self._settings = settings
        self._client = client
        self._info = _Kept(self._ask_info)
        self._adapters = _Kept(self._ask_adapters)

    async def info(self) -> ModelInfo:
        """Raises one of the client's errors where the model does not answer."""
        return await self._info.get()

    async def adapters(self, valid_s: float = _VALID_S) -> tuple[str, ...]:
        """The names of the adapters that requests may choose."""
        return await self._adapters.get(valid_s)

    async def model_id(self) -> str:
        """As /info reports it."""
        return self._settings.model_id or (await self.info()).model_id

    async def compute_type(self) -> str:
        """What TGI's header says the model runs on; `unknown` while the model does not answer."""
        if self._settings.compute_type:
            return self._settings.compute_type
        try:
            return "cpu" if (await self.info()).device == "cpu" else "gpu+optimized"
        except TextgenError:
            return "unknown"

    async def name(self) -> str:
        """The name under which OpenAI's routes list the model."""
        if self._settings.served_model_name:
            return self._settings.served_model_name
        model_id = await self.model_id()
        return Path(model_id).name if model_id.startswith(("/", ".")) else model_id

    async def resolve(self, name: str | None) -> tuple[str, str | None]:
        """The name to answer with, and the adapter, for what a request gives as `model`. Raises ModelNotFound."""
        own = await self.name()
        # "tgi" is what TGI's documentation writes there.
        if not name or name in (own, "tgi", self._settings.triton_model) or name == await self.model_id():
            return own, None
        if name in await self.adapters() or name in await self.adapters(_UNKNOWN_VALID_S):
            return name, name
        known = ", ".join([own, *await self.adapters()])
        raise ModelNotFound(f"{name!r:.200} is not served here; served: {known}")

    async def _ask_info(self) -> ModelInfo:
        return await self._client.model_info(model=self._settings.triton_model, timeout=_TIMEOUT_S)

    async def _ask_adapters(self) -> tuple[str, ...]:
        try:
            found = await self._client.adapters(timeout=_TIMEOUT_S)
        except ValidationError:  # a server, or a model of it, that has none
            return ()
        return tuple(adapter.name for adapter in found if not adapter.unloading)


class Templates:
    """What the gateway must know of a prompt before it can read the answer. Belongs to one event loop."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._sources: dict[tuple[str | None, bool], _Kept[str]] = {}

    async def opens_reasoning(self, body: ChatRequest) -> bool:
        """Whether the prompt of a chat ends inside of reasoning, which the answer then goes on with.

        Only where the template can open it is the conversation rendered to find out. A conversation that cannot be
        rendered is refused by the server, so the answer for it does not matter.
        """
        given = {name: value for name, value in body.template_parameters().items() if value is not None}
        last = body.messages[-1]
        if last.get("role") == "assistant" and isinstance(last.get("content"), str) and "tool_calls" not in last:
            return bool(last["content"].rfind(_OPEN) > last["content"].rfind(_CLOSE))
        if _OPEN not in await self._source(given.get("chat_template"), bool(body.tools)):
            return False
        try:
            prompt = await self._client.render(body.messages, timeout=_TIMEOUT_S, **given)
        except ValidationError:
            return False
        return prompt.rstrip().endswith(_OPEN)

    async def _source(self, name: object, has_tools: bool) -> str:
        if name is not None and not isinstance(name, str):
            return ""
        kept = self._sources.get((name, has_tools))
        if kept is None:
            if len(self._sources) > 100:  # names are the clients' to invent
                self._sources.clear()
            kept = self._sources[(name, has_tools)] = _Kept(lambda: self._ask(name, has_tools))
        return await kept.get()

    async def _ask(self, name: str | None, has_tools: bool) -> str:
        try:
            return await self._client.chat_template(name, has_tools=has_tools, timeout=_TIMEOUT_S)
        except ValidationError:
            return ""
