"""The synchronous client: one gRPC stream per request, read in the caller's own thread.

A `Client` may be used by many threads at once: they share one channel, and every request has its own call. A `Stream`
belongs to one thread, except for `close()`, which any thread (or a signal handler) may call.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import grpc
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
from textgen_client.interrupt import InterruptCancels
from textgen_client.results import Adapter, Chunk, Generation, GrammarCheck, ModelInfo, ModelStatus


class Stream(Iterator[Chunk]):
    """The chunks of one request, in order. Leaving it early cancels the request on the server.

    It is left by `close()`, by leaving its `with` block, and, since nothing else refers to it, by leaving a `for` loop
    over it (break, exception). Iterating raises the request's error, once; after that the stream is at its end.
    """

    def __init__(self, call: Any, request_id: str, client: Client) -> None:
        self.request_id = request_id
        self._call = call
        self._client = client  # its channel must outlive the call
        self._reader = wire.ResponseReader(request_id)
        self._ended = False
        self._closed = False

    def __next__(self) -> Chunk:
        while not self._ended:
            # gRPC's error is the call itself. Ours is raised outside the `except`, so that it does not keep the call
            # alive until the program ends, when freeing it may wait for a thread that is no more.
            failure: TextgenError | None = None
            try:
                with InterruptCancels(self._call):
                    response = next(self._call)
                chunk = self._reader.read(response)
            except StopIteration:
                self._ended = True
                self._reader.end()
            except grpc.RpcError as error:
                self._ended = True
                if self._closed:
                    failure = RequestCancelled("the stream was closed", self.request_id)
                elif not self._reader.is_final:  # afterwards the connection may break as it likes
                    failure = error_from_status(error, self._client.url, self.request_id)
            except BaseException:  # an error of the request, or Ctrl-C while waiting
                self.close()
                self._ended = True
                raise
            else:
                if chunk is not None:
                    return chunk
            if failure is not None:
                raise failure
        raise StopIteration

    def close(self) -> None:
        """Cancel the request unless it has ended. Iterating then raises RequestCancelled, in a waiting thread too."""
        if self._ended:
            return
        self._closed = True
        if self._reader.is_final:
            self._read_to_end()
        else:
            self._call.cancel()

    def _read_to_end(self) -> None:
        """Wait for the server to end the stream, which it does at once after its final response; not for ever."""
        self._ended = True
        overdue = threading.Timer(END_OF_STREAM_S, self._call.cancel)
        overdue.daemon = True
        overdue.start()
        try:
            with contextlib.suppress(grpc.RpcError), InterruptCancels(self._call):
                for _ in self._call:
                    pass
        finally:
            overdue.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):  # unset when __init__ failed
            self.close()


class Client:
    """Generates text on a triton-textgen server.

    url: `host:port` of Triton's gRPC port. model: `textgen`, or `ensemble` (whose requests end only by their timeout
    or `cancel`, since Triton does not pass a lost client on to a running ensemble step).
    timeout: default for requests, in seconds; None leaves it to the server. headers: gRPC metadata of every call.
    Every method raises errors of `textgen_client.errors` and no others.
    """

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
        self._channel = self._connection.open(grpc)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        # At exit the interpreter freezes gRPC's daemon thread wherever it is, and a call that is freed later waits for
        # ever if that thread holds its lock. Closing the channel just before ends the calls, and with them the thread.
        self._exit_hook = functools.partial(_close_channel, weakref.ref(self._channel))
        atexit.register(self._exit_hook)

    def generate(
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
        """The whole answer to one prompt, given as text, chat messages or token ids.

        request_id: for `cancel`; made up if None. timeout: seconds until the server gives up. parameters: those of
        the server (`max_new_tokens`, `temperature`, `stop`, `seed`, `details`, ...), and `return_logprobs`.
        """
        asked = wire.Prompt(prompt, messages, input_ids)
        parameters = {**wire.GENERATE_DEFAULTS, **parameters}
        with self._start(asked, False, model, request_id, timeout, headers, parameters) as stream:
            return wire.whole_answer(stream, stream.request_id)

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
    ) -> Stream:
        """The answer in chunks, as it is made. The request starts at once; arguments as for `generate`.

        Counts come only when asked for (`return_num_input_tokens`, `return_num_output_tokens`).
        """
        asked = wire.Prompt(prompt, messages, input_ids)
        parameters = {**wire.STREAM_DEFAULTS, **parameters}
        return self._start(asked, True, model, request_id, timeout, headers, parameters)

    def check_grammar(
        self,
        grammar: Mapping[str, Any] | None = None,
        text: str | None = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        headers: Mapping[str, str] | None = None,
        **parameters: Any,
    ) -> GrammarCheck:
        """Does the server support a grammar, and does `text` obey it? Nothing is generated.

        grammar: as for `generate`; or None, with `tools` or `response_format` among the parameters. An unsupported or
        malformed one is an answer (`GrammarCheck.error`), no error. text: up to 64 KiB. The model asked is `textgen`,
        whatever the client's own.
        """
        asked = wire.grammar_check_parameters(grammar, text, parameters)
        with self._start(None, False, DEFAULT_MODEL, request_id, timeout, headers, asked) as stream:
            return wire.grammar_check(wire.whole_answer(stream, stream.request_id))

    def adapters(self, *, timeout: float | None = None) -> list[Adapter]:
        """The LoRA adapters of the server, by whose names `generate` takes an `adapter_id`."""
        return self._command_adapters(wire.adapter_parameters("list"), timeout)

    def load_adapter(self, name: str, path: str | None = None, *, timeout: float | None = None) -> list[Adapter]:
        """Load an adapter from a folder below the one that the server allows; returns all there are then.

        path: relative to that folder; None: the name. Raises ValidationError for what the server refuses.
        """
        return self._command_adapters(wire.adapter_parameters("load", name, path), timeout)

    def unload_adapter(self, name: str, *, timeout: float | None = None) -> list[Adapter]:
        """Take an adapter away. Requests that run with it still end well; returns what there is then."""
        return self._command_adapters(wire.adapter_parameters("unload", name), timeout)

    def _command_adapters(self, parameters: Mapping[str, Any], timeout: float | None) -> list[Adapter]:
        with self._start(None, False, DEFAULT_MODEL, None, timeout, None, dict(parameters)) as stream:
            return wire.adapters(wire.whole_answer(stream, stream.request_id))

    def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        """The token ids of a text, without special tokens. timeout: seconds."""
        timeout = self.timeout if timeout is None else timeout
        return wire.token_ids(self._ask(self._stub.ModelInfer, wire.tokenize_request(text), timeout))

    def cancel(self, request_id: str, *, timeout: float = 5.0) -> None:
        """End the live request with this id, whoever started it, through whichever model; its client is told so.

        Raises ValidationError where the server knows no such request.
        """
        request = wire.cancel_request(request_id)
        with self._open(request, request_id, timeout, None) as stream:
            for _ in stream:
                pass

    def model_info(self, *, model: str | None = None, timeout: float | None = None) -> ModelInfo:
        """What the model says of itself: its name and limits. Answered also when it takes no more requests."""
        timeout = self.timeout if timeout is None else timeout
        request = wire.model_info_request(model or self.model)
        with self._open(request, request.id, deadline(timeout), None) as stream:
            return wire.model_info(wire.whole_answer(stream, request.id))

    def models(self, *, timeout: float = 5.0) -> list[ModelStatus]:
        """Every model version in the server's repository, with its state.

        A server started by scripts/serve.py answers this to its administrator only: `headers` of the client must have
        the key, as `triton-grpc-protocol-admin-key`. Without it: ServerUnavailable, with Triton's words.
        """
        index = self._ask(self._stub.RepositoryIndex, service_pb2.RepositoryIndexRequest(), timeout)
        return [ModelStatus(entry.name, entry.version, entry.state, entry.reason) for entry in index.models]

    def health(self, *, model: str | None = None, timeout: float = 5.0) -> Health:
        """Is the server live and ready, is the model ready, and does it really generate a token?

        Triton calls a model ready whose process has died, so only the last question counts. timeout: seconds, for
        each of the four questions. Never raises for an unwell server: `Health.problem` says what is wrong.
        """
        name = model or self.model
        live = ready = model_ready = False
        start_s = time.monotonic()
        try:
            live = self._ask(self._stub.ServerLive, service_pb2.ServerLiveRequest(), timeout).live
            ready = self._ask(self._stub.ServerReady, service_pb2.ServerReadyRequest(), timeout).ready
            model_ready = self._ask(self._stub.ModelReady, service_pb2.ModelReadyRequest(name=name), timeout).ready
            if not (live and ready and model_ready):
                return readiness(live, ready, model_ready, name)
            start_s = time.monotonic()
            self.generate(PROBE_PROMPT, model=name, timeout=timeout, **probe_parameters())
        except OverloadedError:
            pass
        except TextgenError as error:
            return Health(live, ready, model_ready, problem=str(error))
        return Health(live, ready, model_ready, inference=True, latency_s=time.monotonic() - start_s)

    def close(self) -> None:
        """Close the connection; requests that still run are cancelled."""
        self._channel.close()
        atexit.unregister(self._exit_hook)

    def __del__(self) -> None:
        if hasattr(self, "_exit_hook"):  # missing when __init__ failed
            atexit.unregister(self._exit_hook)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self,
        prompt: wire.Prompt | None,
        stream: bool,
        model: str | None,
        request_id: str | None,
        timeout_s: float | None,
        headers: Mapping[str, str] | None,
        parameters: Mapping[str, Any],
    ) -> Stream:
        request_id = request_id or wire.new_request_id()
        timeout_s = self.timeout if timeout_s is None else timeout_s
        request = wire.generate_request(
            model or self.model, request_id, prompt, stream=stream, timeout_s=timeout_s, parameters=parameters
        )
        return self._open(request, request_id, deadline(timeout_s), headers)

    def _open(
        self, request: Any, request_id: str, deadline_s: float | None, headers: Mapping[str, str] | None
    ) -> Stream:
        try:
            with InterruptCancels() as interrupt:
                call = self._stub.ModelStreamInfer(
                    iter((request,)), timeout=deadline_s, metadata=self._connection.metadata(headers)
                )
                interrupt.cancels(call)
        except ValueError as error:  # "Cannot invoke RPC on closed channel!"
            raise ServerUnavailable(f"{self.url}: {error}", request_id) from None
        return Stream(call, request_id, self)

    def _ask(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=self._connection.metadata(None))
        except grpc.RpcError as error:
            failure: TextgenError = error_from_status(error, self.url)
        except ValueError as error:
            failure = ServerUnavailable(f"{self.url}: {error}")
        raise failure  # outside, as in Stream: an error must not keep its call alive


def _close_channel(reference: weakref.ReferenceType[Any]) -> None:
    channel = reference()
    if channel is not None:
        channel.close()
