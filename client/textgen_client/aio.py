"""The asyncio client: `client.py`'s twin, one gRPC stream per request on the running event loop.

An `AsyncClient` belongs to the event loop in which it is first used.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from textgen_client import wire
from textgen_client.channel import (
    DEFAULT_MODEL,
    DEFAULT_URL,
    END_OF_STREAM_S,
    Connection,
    KeepAlive,
    Tls,
    deadline,
)
from textgen_client.errors import OverloadedError, RequestCancelled, ServerUnavailable, TextgenError, error_from_status
from textgen_client.health import PROBE_PROMPT, Health, probe_parameters, readiness
from textgen_client.results import Adapter, Chunk, Generation, GrammarCheck, ModelInfo, ModelStatus, Tokenization


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of one request, in order. Leaving it early cancels the request on the server.

    It is left by `aclose()`, by leaving its `async with` block, by cancelling the task that waits in it, and, since
    nothing else refers to it, by leaving an `async for` loop over it (break, exception). It is no async generator: its
    end does not wait for the event loop to finalize one. Iterating raises the request's error, once.
    """

    def __init__(self, call: Any, request_id: str, url: str) -> None:
        self.request_id = request_id
        self._call = call
        self._url = url
        self._loop = asyncio.get_running_loop()
        self._reader = wire.ResponseReader(request_id)
        self._ended = False
        self._closed = False

    async def __anext__(self) -> Chunk:
        while not self._ended:
            try:
                response = await self._call.read()
                if response is grpc.aio.EOF:
                    self._ended = True
                    self._reader.end()
                    break
                chunk = self._reader.read(response)
            except grpc.RpcError as error:
                self._ended = True
                if not self._reader.is_final:  # afterwards the connection may break as it likes
                    raise error_from_status(error, self._url, self.request_id) from None
            except asyncio.CancelledError:
                # grpc.aio raises it for a call cancelled by its own side as well, as `aclose` in another task does.
                self._ended = True
                if self._closed and not _task_is_cancelled():
                    raise RequestCancelled("the stream was closed", self.request_id) from None
                self._call.cancel()
                raise
            except BaseException:
                await self.aclose()
                self._ended = True
                raise
            else:
                if chunk is not None:
                    return chunk
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request unless it has ended. Iterating then raises RequestCancelled, in a waiting task too."""
        if self._ended:
            return
        self._closed = True
        if self._reader.is_final:
            self._ended = True
            await _read_to_end(self._call)
        else:
            self._call.cancel()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The garbage collector may run in any thread; the call belongs to the loop's.
        if getattr(self, "_ended", True) or self._loop.is_closed():
            return
        if self._reader.is_final:
            asyncio.run_coroutine_threadsafe(_read_to_end(self._call), self._loop)
        else:
            self._loop.call_soon_threadsafe(self._call.cancel)


async def _read_to_end(call: Any) -> None:
    """Wait for the server to end the stream, which it does at once after its final response; not for ever."""

    async def read() -> None:
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.RpcError:
            pass
        except asyncio.CancelledError:
            if not call.cancelled():  # somebody closed the stream just before its last response was read
                raise

    try:
        await asyncio.wait_for(read(), END_OF_STREAM_S)
    except asyncio.TimeoutError:
        call.cancel()


def _task_is_cancelled() -> bool:
    """Whether somebody asked the running task to end; Python 3.10 cannot tell."""
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)
    return bool(cancelling and cancelling())


class AsyncClient:
    """Generates text on a triton-textgen server; arguments and errors are those of `Client`."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = DEFAULT_MODEL,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        tls: Tls | None = None,
        keepalive: KeepAlive | None = None,
        channel_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.url = url
        self.model = model
        self.timeout = timeout
        self._connection = Connection(url, tls, keepalive, headers or {}, channel_options or {})
        self._channel: Any = None
        self._stub: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Iterable[int] | None = None,
        model: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        **parameters: Any,
    ) -> Generation:
        """The whole answer to one prompt; see `Client.generate`. Cancelling the task cancels the request."""
        asked = wire.Prompt(prompt, messages, input_ids)
        parameters = {**wire.GENERATE_DEFAULTS, **parameters}
        async with self._start(asked, False, model, request_id, timeout, headers, parameters) as stream:
            return wire.whole_answer([chunk async for chunk in stream], stream.request_id)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input_ids: Iterable[int] | None = None,
        model: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        **parameters: Any,
    ) -> AsyncStream:
        """The answer in chunks, as it is made; see `Client.stream`. To be called (not awaited) inside the loop."""
        asked = wire.Prompt(prompt, messages, input_ids)
        parameters = {**wire.STREAM_DEFAULTS, **parameters}
        return self._start(asked, True, model, request_id, timeout, headers, parameters)

    async def check_grammar(
        self,
        grammar: Mapping[str, Any] | None = None,
        text: str | None = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        **parameters: Any,
    ) -> GrammarCheck:
        """Does the server support a grammar, and does `text` obey it? See `Client.check_grammar`."""
        asked = wire.grammar_check_parameters(grammar, text, parameters)
        async with self._start(None, False, DEFAULT_MODEL, request_id, timeout, headers, asked) as stream:
            return wire.grammar_check(wire.whole_answer([chunk async for chunk in stream], stream.request_id))

    async def adapters(self, *, timeout: float | None = None) -> list[Adapter]:
        """The LoRA adapters of the server; see `Client.adapters`."""
        return await self._command_adapters(wire.adapter_parameters("list"), timeout)

    async def load_adapter(self, name: str, path: str | None = None, *, timeout: float | None = None) -> list[Adapter]:
        """Load an adapter; see `Client.load_adapter`."""
        return await self._command_adapters(wire.adapter_parameters("load", name, path), timeout)

    async def unload_adapter(self, name: str, *, timeout: float | None = None) -> list[Adapter]:
        """Take an adapter away; see `Client.unload_adapter`."""
        return await self._command_adapters(wire.adapter_parameters("unload", name), timeout)

    async def _command_adapters(self, parameters: Mapping[str, Any], timeout: float | None) -> list[Adapter]:
        async with self._start(None, False, DEFAULT_MODEL, None, timeout, None, dict(parameters)) as stream:
            return wire.adapters(wire.whole_answer([chunk async for chunk in stream], stream.request_id))

    async def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """The token ids of a text, without special tokens. timeout: seconds."""
        timeout = self.timeout if timeout is None else timeout
        return wire.token_ids(await self._ask("ModelInfer", wire.tokenize_request(text), timeout))

    async def tokenization(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
        **parameters: Any,
    ) -> Tokenization:
        """The tokens of a prompt, as a request with the same prompt and parameters would get them, untruncated."""
        timeout = self.timeout if timeout is None else timeout
        request = wire.tokenization_request(wire.Prompt(prompt, messages), parameters)
        return wire.tokenization(await self._ask("ModelInfer", request, timeout))

    async def render(
        self, messages: Sequence[Mapping[str, Any]], *, timeout: float | None = None, **parameters: Any
    ) -> str:
        """A conversation as the chat template renders it; parameters as in `tokenization`."""
        timeout = self.timeout if timeout is None else timeout
        response = await self._ask("ModelInfer", wire.render_request(messages, parameters), timeout)
        return wire.tokenizer_text(response, "prompt_text")

    async def chat_template(
        self, name: str | None = None, *, has_tools: bool = False, timeout: float | None = None
    ) -> str:
        """The source of the chat template of that name, or of the one that a request without a name would get.

        Raises TemplateError where there is none.
        """
        timeout = self.timeout if timeout is None else timeout
        response = await self._ask("ModelInfer", wire.template_request(name, has_tools), timeout)
        return wire.tokenizer_text(response, "text")

    async def model_info(self, *, model: str | None = None, timeout: float | None = None) -> ModelInfo:
        """What the model says of itself: its name and limits."""
        timeout = self.timeout if timeout is None else timeout
        request = wire.model_info_request(model or self.model)
        async with self._open(request, request.id, deadline(timeout), None) as stream:
            return wire.model_info(wire.whole_answer([chunk async for chunk in stream], request.id))

    async def cancel(self, request_id: str, *, timeout: float = 5.0) -> None:
        """End the live request with this id; see `Client.cancel`."""
        request = wire.cancel_request(request_id)
        async with self._open(request, request_id, timeout, None) as stream:
            async for _ in stream:
                pass

    async def models(self, *, timeout: float = 5.0) -> list[ModelStatus]:
        """Every model version in the server's repository, with its state.

        A server started by scripts/serve.py answers this to its administrator only: `headers` of the client must have
        the key, as `triton-grpc-protocol-admin-key`. Without it: ServerUnavailable, with Triton's words.
        """
        index = await self._ask("RepositoryIndex", service_pb2.RepositoryIndexRequest(), timeout)
        return [ModelStatus(entry.name, entry.version, entry.state, entry.reason) for entry in index.models]

    async def health(self, *, model: str | None = None, timeout: float = 5.0) -> Health:
        """Does the server really generate? See `Client.health`."""
        name = model or self.model
        live = ready = model_ready = False
        start_s = time.monotonic()
        try:
            live = (await self._ask("ServerLive", service_pb2.ServerLiveRequest(), timeout)).live
            ready = (await self._ask("ServerReady", service_pb2.ServerReadyRequest(), timeout)).ready
            model_ready = (await self._ask("ModelReady", service_pb2.ModelReadyRequest(name=name), timeout)).ready
            if not (live and ready and model_ready):
                return readiness(live, ready, model_ready, name)
            start_s = time.monotonic()
            await self.generate(PROBE_PROMPT, model=name, timeout=timeout, **probe_parameters())
        except OverloadedError:
            pass
        except TextgenError as error:
            return Health(live, ready, model_ready, problem=str(error))
        return Health(live, ready, model_ready, inference=True, latency_s=time.monotonic() - start_s)

    async def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _start(
        self,
        prompt: wire.Prompt | None,
        stream: bool,
        model: str | None,
        request_id: str | None,
        timeout_s: float | None,
        headers: Mapping[str, str] | None,
        parameters: Mapping[str, Any],
    ) -> AsyncStream:
        request_id = request_id or wire.new_request_id()
        timeout_s = self.timeout if timeout_s is None else timeout_s
        request = wire.generate_request(
            model or self.model, request_id, prompt, stream=stream, timeout_s=timeout_s, parameters=parameters
        )
        return self._open(request, request_id, deadline(timeout_s), headers)

    def _open(
        self, request: Any, request_id: str, deadline_s: float | None, headers: Mapping[str, str] | None
    ) -> AsyncStream:
        call = self._connected(request_id).ModelStreamInfer(
            iter((request,)), timeout=deadline_s, metadata=self._connection.metadata(headers)
        )
        return AsyncStream(call, request_id, self.url)

    async def _ask(self, method: str, request: Any, timeout_s: float | None) -> Any:
        call = getattr(self._connected(None), method)
        try:
            return await call(request, timeout=timeout_s, metadata=self._connection.metadata(None))
        except grpc.RpcError as error:
            raise error_from_status(error, self.url) from None

    def _connected(self, request_id: str | None) -> Any:
        """The stub; its channel is made by the first call, because a channel belongs to the loop it is made in."""
        if self._closed:
            raise ServerUnavailable(f"{self.url}: the client is closed", request_id)
        loop = asyncio.get_running_loop()
        if self._stub is None:
            self._loop = loop
            self._channel = self._connection.open(grpc.aio)
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        if loop is not self._loop:
            raise RuntimeError("an AsyncClient belongs to the event loop in which it is first used; make another one")
        return self._stub
