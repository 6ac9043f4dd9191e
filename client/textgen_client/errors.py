"""Every failure a caller can meet, in one tree, and how a failure is recognised.

    TextgenError
      ValidationError       the request is wrong; the same request will always be refused
        TemplateError       the chat template is missing or refused the messages
        ToolError           the tools or the tool choice make no sense
      OverloadedError       the server took no more requests; the same request may succeed later
      GenerationError       the server failed while it worked on the request
      RequestTimeout        the request's time was up
      RequestCancelled      ended by this client, or by a `cancel` with the request's id
      NotReadyError         the server runs, the model does not (yet)
      ServerUnavailable     nobody answered at the address, or the connection broke

A Triton stream carries a model's error as text alone, so the server's texts begin with a fixed prefix and the prefix
decides the class. Failures of the connection come as gRPC status codes. This file knows nothing of requests.
"""

from __future__ import annotations

import re
from typing import ClassVar

import grpc


class TextgenError(Exception):
    """Base of all errors of this package. `str(error)` is one line: prefix and message.

    message: the text without its prefix. request_id: of the request that failed, None where there was none.
    public_type: Text Generation Inference's `error_type` for it (`cancelled` and `unavailable` are ours).
    """

    public_type: ClassVar[str] = "generation"
    prefix: ClassVar[str] = "Request failed"

    def __init__(self, message: str, request_id: str | None = None) -> None:
        super().__init__(message, request_id)
        self.message = message
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.prefix}: {self.message}"


class ValidationError(TextgenError):
    """The request is malformed, unsupported or over a limit. Nothing was generated."""

    public_type = "validation"
    prefix = "Input validation error"


class TemplateError(ValidationError):
    """The chat template is missing, or refused the messages."""

    public_type = "template_error"
    prefix = "Template error"


class ToolError(ValidationError):
    """The tools or the tool choice cannot be honoured."""

    public_type = "tool_error"
    prefix = "Tool error"


class OverloadedError(TextgenError):
    """Admission refused at once; nothing was generated, and the same request may succeed later."""

    public_type = "overloaded"
    prefix = "Model is overloaded"


class GenerationError(TextgenError):
    """The server failed while it worked on the request; text already received is lost or incomplete."""

    public_type = "generation"
    prefix = "Request failed during generation"


class RequestTimeout(TextgenError):
    """The request's `timeout` passed before it was answered in full."""

    public_type = "timeout"
    prefix = "Request timeout"


class RequestCancelled(TextgenError):
    """The request was ended by this client, or by a `cancel` with its id."""

    public_type = "cancelled"
    prefix = "Request cancelled"


class NotReadyError(TextgenError):
    """The server answers, but the model is starting, stopping or gone."""

    public_type = "healthcheck"
    prefix = "Model is not ready"


class ServerUnavailable(TextgenError):
    """Nobody answered at the address, the connection broke, or who answered is no Triton server."""

    public_type = "unavailable"
    prefix = "Server unavailable"


_BY_PREFIX: tuple[type[TextgenError], ...] = (
    ValidationError,
    TemplateError,
    ToolError,
    OverloadedError,
    GenerationError,
    RequestTimeout,
    RequestCancelled,
    NotReadyError,
)

# What Triton itself says before a model sees the request; it has no prefix of ours.
_TRITON_TEXTS: tuple[tuple[re.Pattern[str], type[TextgenError]], ...] = (
    (re.compile(r"unknown model: .* is not found"), ValidationError),
    (re.compile(r"unknown model: .* has no available versions|is not at ready state|is not ready"), NotReadyError),
    (re.compile(r"Stub process .* is not healthy"), NotReadyError),
    (re.compile(r"unexpected inference input|unexpected shape for input|data-type is '.*', but"), ValidationError),
    (re.compile(r"Exceeds maximum queue size"), OverloadedError),
    (re.compile(r"Request timeout expired"), RequestTimeout),
)

# Triton names the request, and an ensemble itself, in front of a model's text, in either order.
_PREAMBLE = re.compile(r"^(?:\[request id: [^\]]*\] |in ensemble '[^']*', )+")


def error_from_text(text: str, request_id: str | None = None) -> TextgenError:
    """The error that a response's error text announces; `GenerationError` where nothing in it is known."""
    own = _PREAMBLE.sub("", text)
    for kind in _BY_PREFIX:
        if own.startswith(kind.prefix + ": "):
            return kind(own[len(kind.prefix) + 2 :], request_id)
    for pattern, kind in _TRITON_TEXTS:
        if pattern.search(text):
            return kind(own, request_id)
    return GenerationError(own, request_id)


_BY_STATUS: dict[grpc.StatusCode, type[TextgenError]] = {
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.UNIMPLEMENTED: ServerUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeout,
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.INVALID_ARGUMENT: ValidationError,
    grpc.StatusCode.NOT_FOUND: ValidationError,
    grpc.StatusCode.UNAUTHENTICATED: ValidationError,
    grpc.StatusCode.PERMISSION_DENIED: ValidationError,
}


def error_from_status(error: grpc.RpcError, url: str, request_id: str | None = None) -> TextgenError:
    """The error for a failed gRPC call to `url`; a text of ours in its details is preferred to the status code."""
    code: grpc.StatusCode = error.code()
    details = " ".join((error.details() or code.name).split())  # gRPC's texts may have several lines
    from_text = error_from_text(details, request_id)
    if type(from_text) is not GenerationError or details.startswith(GenerationError.prefix):
        return from_text
    kind = _BY_STATUS.get(code, GenerationError)
    if kind is ServerUnavailable:
        return ServerUnavailable(f"{url}: {details}", request_id)
    if kind is RequestTimeout:
        return RequestTimeout(f"no answer from {url} within the client's deadline", request_id)
    return kind(details, request_id)
