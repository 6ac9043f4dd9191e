"""Requests to a server as the wire carries them.

A client library hides what is tested here: each response with its tensors, whether the final flag is on it, statuses,
events, a socket that is closed at the wrong moment. Every gRPC request has a stream of its own.
"""

from __future__ import annotations

import http.client
import json
import struct
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

if TYPE_CHECKING:
    from ..running_server import RunningServer

# Longest silence of a server under test; far beyond what any answer takes, so that only a hang reaches it.
SILENCE_S = 120.0

_DATATYPES = {
    "text_input": "BYTES",
    "messages": "BYTES",
    "prompt_text": "BYTES",
    "sampling_parameters": "BYTES",
    "stop": "BYTES",
    "input_ids": "INT32",
}


@dataclass(frozen=True)
class Tensor:
    """An input as raw content, for what the usual conversion would refuse to send."""

    datatype: str
    shape: Sequence[int]
    content: bytes


@dataclass(frozen=True)
class Response:
    """One response of a stream. tensors: output name -> elements, BYTES as text. final: the flag; None: not told."""

    tensors: dict[str, list[Any]]
    error: str | None
    final: bool | None

    @property
    def text(self) -> str:
        """The new text of the first choice."""
        return self.tensors["text_output"][0] if "text_output" in self.tensors else ""

    @property
    def details(self) -> dict[str, Any]:
        details: dict[str, Any] = json.loads(self.tensors["details"][0])
        return details


class Call:
    """One running gRPC request; iterate for its responses. A broken call raises grpc.RpcError."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Response]:
        return self

    def __next__(self) -> Response:
        return _read(next(self._call))

    def cancel(self) -> None:
        self._call.cancel()


@dataclass
class Outcome:
    """What a whole stream brought. broken: the status of a call that gRPC itself ended. ended_s: time.monotonic()."""

    responses: list[Response] = field(default_factory=list)
    broken: grpc.StatusCode | None = None
    ended_s: float = 0.0

    @property
    def text(self) -> str:
        return "".join(response.text for response in self.responses)

    @property
    def errors(self) -> list[str]:
        return [response.error for response in self.responses if response.error is not None]

    @property
    def token_ids(self) -> list[int]:
        """Ids of the first choice's tokens; the request needs `details`."""
        return [
            token["id"]
            for response in self.responses
            if "details" in response.tensors
            for token in response.details["tokens"]
        ]


class EventStream:
    """The events of one HTTP generate_stream."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self.status = response.status

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._response:
            if line.startswith(b"data:"):
                yield json.loads(line.removeprefix(b"data:"))

    def close(self) -> None:
        """Leave, as a browser does that closes the page."""
        self._response.close()
        self._connection.close()


class Wire:
    """A server's gRPC and HTTP ports. Thread safe."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(server.grpc_url, options=options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._http = urllib.parse.urlsplit(server.http_url).netloc
        self._threads = ThreadPoolExecutor(128)

    def close(self) -> None:
        self._channel.close()
        self._threads.shutdown(wait=True)

    # ---- gRPC ------------------------------------------------------------------------------------------------------

    def open(
        self,
        *,
        model: str = "textgen",
        request_id: str = "",
        within_s: float = SILENCE_S,
        wants_empty_final: bool = True,
        parameters: Mapping[str, Any] | None = None,
        outputs: Sequence[str] = (),
        **inputs: Any,
    ) -> Call:
        """Start a request. inputs: by name, as Python values or `Tensor`; dicts and messages are sent as JSON."""
        request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
        if wants_empty_final:
            request.parameters["triton_enable_empty_final_response"].bool_param = True
        for name, value in (parameters or {}).items():
            kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
            setattr(request.parameters[name], kind, value)
        for name in outputs:
            request.outputs.add(name=name)
        for name, value in inputs.items():
            tensor = value if isinstance(value, Tensor) else _tensor(name, value)
            request.inputs.add(name=name, datatype=tensor.datatype, shape=tensor.shape)
            request.raw_input_contents.append(tensor.content)
        return Call(self._stub.ModelStreamInfer(iter((request,)), timeout=within_s))

    def ask(self, **request: Any) -> Outcome:
        """All responses of one request, whatever its end."""
        return _drain(self.open(**request))

    def ask_soon(self, **request: Any) -> Future[Outcome]:
        """`ask` on a thread of its own."""
        return self._threads.submit(lambda: self.ask(**request))

    def rest_soon(self, call: Call) -> Future[Outcome]:
        """The responses that a call still has, read on a thread of its own."""
        return self._threads.submit(_drain, call)

    def error_of(self, **request: Any) -> str:
        """The text of a request that is to fail before its first token; fails the test for any other answer."""
        outcome = self.ask(**request)
        assert [(r.tensors, r.final) for r in outcome.responses] == [({}, True)], outcome
        assert outcome.broken is None
        return outcome.errors[0]

    # ---- HTTP ------------------------------------------------------------------------------------------------------

    def post(self, body: Any, *, model: str = "textgen", route: str = "generate") -> tuple[int, dict[str, Any]]:
        """Status and answer of one POST; body: bytes are sent as they are, anything else as JSON."""
        connection = self._connection()
        try:
            response = self._send(connection, body, model, route)
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def open_events(self, body: Any, *, model: str = "textgen") -> EventStream:
        """A generate_stream. Triton answers with the first response, so this returns no earlier."""
        connection = self._connection()
        return EventStream(connection, self._send(connection, body, model, "generate_stream"))

    def send_and_leave(self, body: Any, *, after: Callable[[], None]) -> None:
        """Send a generate_stream, wait for `after`, and close the socket without having read anything."""
        connection = self._connection()
        payload = json.dumps(body).encode()
        connection.request("POST", "/v2/models/textgen/generate_stream", payload)
        after()
        connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._http, timeout=SILENCE_S)

    def _send(
        self, connection: http.client.HTTPConnection, body: Any, model: str, route: str
    ) -> http.client.HTTPResponse:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", f"/v2/models/{model}/{route}", payload)
        return connection.getresponse()


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    """Poll until it holds; fails the test with `what` when it never does."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        threading.Event().wait(0.02)


def wait_until_idle(server: RunningServer, within_s: float = 60.0) -> None:
    """Wait until no slot and no block is in use. The gauges follow a step by up to 0.2 s."""
    for name in ("tgi_batch_current_size", "tgi_queue_size", "tgi_kv_cache_usage_ratio"):
        wait_until(lambda name=name: server.metric(name) == 0, f"{name} is back to 0", within_s)  # type: ignore[misc]


def strings(*values: str | bytes) -> Tensor:
    """A BYTES tensor of any number of elements, valid UTF-8 or not."""
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    return Tensor("BYTES", [len(encoded)], b"".join(struct.pack("<I", len(value)) + value for value in encoded))


def _drain(call: Call) -> Outcome:
    outcome = Outcome()
    try:
        outcome.responses.extend(call)
    except grpc.RpcError as error:
        outcome.broken = error.code()
    outcome.ended_s = time.monotonic()
    return outcome


def _tensor(name: str, value: Any) -> Tensor:
    datatype = _DATATYPES.get(name, "BOOL")
    if datatype == "INT32":
        return Tensor("INT32", [len(value)], struct.pack(f"<{len(value)}i", *value))
    if datatype == "BOOL":
        return Tensor("BOOL", [1], b"\x01" if value else b"\x00")
    if name == "stop":
        return strings(*value)
    return strings(value if isinstance(value, str | bytes) else json.dumps(value, ensure_ascii=False))


def _read(message: Any) -> Response:
    parameters = message.infer_response.parameters
    final = parameters["triton_final_response"].bool_param if "triton_final_response" in parameters else None
    if message.error_message:
        return Response({}, message.error_message, final)
    result = InferResult(message.infer_response)
    tensors = {}
    for output in message.infer_response.outputs:
        elements = result.as_numpy(output.name).reshape(-1).tolist()
        tensors[output.name] = [e.decode() if isinstance(e, bytes) else e for e in elements]
    return Response(tensors, None, final)
