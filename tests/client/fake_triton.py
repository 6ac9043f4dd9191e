"""A real gRPC server that speaks Triton's protocol with scripted answers: the one seam at which the client is faked."""

from __future__ import annotations

import contextlib
import json
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc


def response(*, final: bool = False, error: str = "", **tensors: Any) -> Any:
    """One response of a stream; strings and lists of them become BYTES tensors, lists of ints UINT32."""
    message = service_pb2.ModelStreamInferResponse(error_message=error)
    message.infer_response.parameters["triton_final_response"].bool_param = final
    for name, value in tensors.items():
        values = [value] if isinstance(value, str) else value
        strings = all(isinstance(item, str) for item in values)
        tensor = message.infer_response.outputs.add(name=name, datatype="BYTES" if strings else "UINT32")
        tensor.shape.append(len(values))
        message.infer_response.raw_output_contents.append(
            b"".join(struct.pack("<I", len(item.encode())) + item.encode() for item in values)
            if strings
            else struct.pack(f"<{len(values)}I", *values)
        )
    return message


def strings_of(request: Any, name: str) -> list[str] | None:
    """The strings of a request's input tensor, None if it has no such input."""
    for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.name == name:
            values, at = [], 0
            while at < len(content):
                (length,) = struct.unpack_from("<I", content, at)
                values.append(content[at + 4 : at + 4 + length].decode())
                at += 4 + length
            return values
    return None


def parameters_of(request: Any) -> dict[str, Any]:
    """What the request's sampling_parameters tensor says."""
    raw = strings_of(request, "sampling_parameters")
    return {} if raw is None else dict(json.loads(raw[0]))


def flag_of(request: Any, name: str) -> bool | None:
    """The value of a BOOL input, None if the request has no such input."""
    for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.name == name:
            return bool(content == b"\x01")
    return None


MODEL_LIMITS = {
    "max_concurrent_requests": 9,
    "max_best_of": 2,
    "max_stop_sequences": 4,
    "max_top_n_tokens": 5,
    "max_input_tokens": 99,
    "max_total_tokens": 100,
}

Script = Callable[[Any, "Call"], Iterator[Any]]


@dataclass
class Call:
    """One request as the fake saw it. `left` is set when its client has gone."""

    request: Any
    context: grpc.ServicerContext
    metadata: dict[str, str] = field(default_factory=dict)
    left: threading.Event = field(default_factory=threading.Event)


def echo(request: Any, call: Call) -> Iterator[Any]:
    """The prompt, word by word when streaming."""
    text = (strings_of(request, "text_input") or strings_of(request, "messages") or ["ids"])[0]
    if not flag_of(request, "stream"):
        yield response(
            final=True, text_output=text, finish_reason="length", num_input_tokens=[3], num_output_tokens=[len(text)]
        )
        return
    words = text.split(" ")
    for number, word in enumerate(words):
        last = number == len(words) - 1
        yield response(final=last, text_output=word if last else word + " ", finish_reason="eos_token" if last else "")


def endless(request: Any, call: Call) -> Iterator[Any]:
    """A word, and then silence until the client leaves."""
    yield response(text_output="word ")
    call.left.wait(30)


def last_word(**tensors: Any) -> tuple[Script, list[bool]]:
    """A script whose one response is final, and what becomes of its streams: did the client leave before the end?"""
    left: list[bool] = []

    def script(request: Any, call: Call) -> Iterator[Any]:
        yield response(final=True, **tensors)
        left.append(call.left.wait(0.3))

    return script, left


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers every stream as `script` says; ready and live as told."""

    def __init__(self) -> None:
        self.url = ""
        self.script: Script = echo
        self.calls: list[Call] = []
        self.model_ready = True
        self.info: dict[str, Any] = {"model_id": "fake", "device": "cpu", **MODEL_LIMITS}
        self.adapters: list[dict[str, Any]] = []
        self.adapter_commands: list[Any] = []
        self.template = ""  # the chat template's source

    def ModelStreamInfer(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for request in requests:
            if flag_of(request, "model_info"):
                yield response(final=True, text_output=json.dumps(self.info))
                continue
            if "adapter_command" in parameters_of(request):
                self.adapter_commands.append(request)
                yield response(final=True, text_output=json.dumps({"adapters": self.adapters}))
                continue
            call = Call(request, context, dict(context.invocation_metadata()))
            context.add_callback(call.left.set)
            self.calls.append(call)
            yield from self.script(request, call)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        """The tokenizer: a character is a token, and a rendered conversation ends as the template does."""
        (action,) = strings_of(request, "action") or ["encode"]
        if action in ("render", "template"):
            answer = service_pb2.ModelInferResponse(model_name=request.model_name)
            name = "prompt_text" if action == "render" else "text"
            answer.outputs.add(name=name, datatype="BYTES", shape=[1])
            text = self.template.encode()
            answer.raw_output_contents.append(struct.pack("<I", len(text)) + text)
            return answer
        ids = [ord(character) for character in (strings_of(request, "text_input") or [""])[0]]
        message = service_pb2.ModelInferResponse(model_name=request.model_name)
        message.outputs.add(name="input_ids", datatype="INT32", shape=[len(ids)])
        message.raw_output_contents.append(struct.pack(f"<{len(ids)}i", *ids))
        return message

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ServerReadyResponse(ready=self.model_ready)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.model_ready and request.name == "textgen")

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:
        index = service_pb2.RepositoryIndexResponse()
        index.models.add(name="textgen", version="1", state="READY")
        index.models.add(name="broken", version="2", state="UNAVAILABLE", reason="failed to load")
        return index


@contextlib.contextmanager
def running_fake(port: int = 0) -> Iterator[FakeTriton]:
    """A fake that listens on a port of this machine; 0: any free one."""
    fake = FakeTriton()
    server = grpc.server(ThreadPoolExecutor(max_workers=16))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    fake.url = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield fake
    finally:
        server.stop(grace=None).wait()
