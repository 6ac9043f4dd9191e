"""Server-sent events, and clients that leave: whoever goes takes the request with them, in every stage.

A client that goes away cancels the task that waits for Triton, and a cancelled task cancels its gRPC call. Nothing is
buffered here: an event is made when the socket has taken the one before, so a slow reader slows its own stream down to
gRPC's window.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from textgen_client.gateway.errors import ClientGone

DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


def event(content: Any) -> bytes:
    """One event that carries JSON."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def named_event(name: str, content: Any) -> bytes:
    """One event with a name, that carries JSON."""
    return b"event: " + name.encode() + b"\n" + event(content)


class EventStream(StreamingResponse):
    """Sends events until they end or the client leaves; then `events` is closed, wherever it waits."""

    def __init__(self, events: AsyncIterator[bytes], headers: Mapping[str, str] | None = None) -> None:
        # Proxies that collect a response before passing it on would undo the streaming.
        told = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(events, media_type="text/event-stream", headers=told)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:

            async def listen() -> None:
                await self.listen_for_disconnect(receive)
                group.cancel_scope.cancel()

            group.start_soon(listen)
            with contextlib.suppress(OSError):  # the socket broke while it was written to
                await self.stream_response(send)
            group.cancel_scope.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves meanwhile; then raises ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
