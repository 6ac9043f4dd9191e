"""A small stand-in for `triton_python_backend_utils`, the module that exists only inside Triton's stub.

What it records is what Triton would have been told; what it refuses is what would end the real server.
"""

from __future__ import annotations

import json
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FINAL = 1


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class InferenceRequest:
    """Both what arrives and, made with keywords as Triton demands, what is asked of another model."""

    def __init__(
        self,
        *,
        model_name: str = "",
        model_version: int = -1,
        requested_output_names: list[str] | None = None,
        inputs: list[Tensor] | None = None,
        parameters: Mapping[str, Any] | None = None,
        timeout_us: int = 0,
        traced_by_triton: dict[str, str] | None = None,
    ) -> None:
        self._traced_by_triton = traced_by_triton
        self.model_name, self.requested = model_name, requested_output_names
        self.model_version = model_version
        self.inputs = {tensor.name(): tensor for tensor in inputs or []}
        self._parameters, self._timeout_us = dict(parameters or {}), timeout_us

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""

    def timeout(self) -> int:
        return self._timeout_us

    def trace(self) -> InferenceRequest:
        return self

    def get_context(self) -> str | None:
        return None if self._traced_by_triton is None else json.dumps(self._traced_by_triton)


@dataclass
class Sent:
    """One call of `send`. response None: the final flag alone."""

    response: InferenceResponse | None
    final: bool

    def __getitem__(self, name: str) -> list[Any]:
        assert self.response is not None
        [tensor] = [tensor for tensor in self.response.output_tensors() if tensor.name() == name]
        return [e.decode() if isinstance(e, bytes) else e for e in tensor.as_numpy().reshape(-1).tolist()]

    @property
    def names(self) -> set[str]:
        return set() if self.response is None else {tensor.name() for tensor in self.response.output_tensors()}

    @property
    def error(self) -> str | None:
        failure = self.response.error() if self.response is not None else None
        return None if failure is None else failure.message()


@dataclass
class Sender:
    """A response sender. crimes: uses of it that crash tritonserver or confuse the client."""

    cancelled: bool = False
    before_send: Callable[[Sent], None] = lambda sent: None
    while_asked: Callable[[], None] = lambda: None
    sent: list[Sent] = field(default_factory=list)
    crimes: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        sent = Sent(response, flags == FINAL)
        self.before_send(sent)
        with self._changed:
            if self.is_closed:
                self.crimes.append("sent after the final flag")
            self.sent.append(sent)
            self._changed.notify_all()

    def is_cancelled(self) -> bool:
        if self.is_closed:
            self.crimes.append("asked after the final flag")
        self.while_asked()
        if self.is_closed:
            self.crimes.append("closed while it was asked")
        return self.cancelled

    @property
    def is_closed(self) -> bool:
        return any(sent.final for sent in self.sent)

    def wait_for(self, condition: Callable[[list[Sent]], bool]) -> list[Sent]:
        """What was sent, once it fulfils the condition."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.sent), 10), self.sent
            return list(self.sent)

    def wait_for_number(self, number: int) -> list[Sent]:
        return self.wait_for(lambda sent: len(sent) >= number)

    def wait_for_end(self) -> list[Sent]:
        return self.wait_for(lambda sent: any(one.final for one in sent))


def request(
    *,
    parameters: Mapping[str, Any] | None = None,
    timeout_us: int = 0,
    traced_by_triton: dict[str, str] | None = None,
    **inputs: Any,
) -> InferenceRequest:
    """A request as the stub sees it: strings as bytes objects, flags as booleans, ids as int32."""
    tensors = []
    for name, value in inputs.items():
        if isinstance(value, bool):
            array = np.array([value])
        elif name == "input_ids":
            array = np.array(value, dtype=np.int32)
        else:
            if isinstance(value, dict) or name == "messages":
                value = json.dumps(value)
            values = value if isinstance(value, list) else [value]
            array = np.array([v.encode() if isinstance(v, str) else v for v in values], dtype=np.object_)
        tensors.append(Tensor(name, array))
    return InferenceRequest(
        inputs=tensors, parameters=parameters, timeout_us=timeout_us, traced_by_triton=traced_by_triton
    )


def make_module() -> types.ModuleType:
    """The module, as much of it as the adapter uses."""
    module = types.ModuleType("triton_python_backend_utils")
    module.__dict__.update(
        Tensor=Tensor,
        TritonError=TritonError,
        TritonModelException=type("TritonModelException", (Exception,), {}),
        InferenceRequest=InferenceRequest,
        InferenceResponse=InferenceResponse,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
        get_output_tensor_by_name=lambda response, name: next(
            (tensor for tensor in response.output_tensors() if tensor.name() == name), None
        ),
    )
    return module
