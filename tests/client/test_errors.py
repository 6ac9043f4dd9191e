"""Every error text and status code reaches the caller as its class."""

from __future__ import annotations

import pickle

import grpc
import pytest

from textgen_client import errors


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("Input validation error: `top_k` is -1", errors.ValidationError, "`top_k` is -1"),
        ("Template error: no template", errors.TemplateError, "no template"),
        ("Tool error: no such tool", errors.ToolError, "no such tool"),
        ("Model is overloaded: 128 requests", errors.OverloadedError, "128 requests"),
        ("Request failed during generation: it died", errors.GenerationError, "it died"),
        ("Request timeout: 3 s", errors.RequestTimeout, "3 s"),
        ("Request cancelled: by its client", errors.RequestCancelled, "by its client"),
        ("Model is not ready: stopping", errors.NotReadyError, "stopping"),
        ("Request for unknown model: 'x' is not found", errors.ValidationError, None),
        ("Request for unknown model: 'x' has no available versions", errors.NotReadyError, None),
        ("Stub process 'textgen_0_0' is not healthy.", errors.NotReadyError, None),
        ("unexpected inference input 'foo' for model 'textgen'", errors.ValidationError, None),
        ("[request id: 7] unexpected shape for input 'stop'. Expected [1]", errors.ValidationError, None),
        ("inference input 'x' data-type is 'INT8', but model 'textgen' expects 'BOOL'", errors.ValidationError, None),
        ("[request id: 7] Exceeds maximum queue size", errors.OverloadedError, "Exceeds maximum queue size"),
        ("something nobody foresaw", errors.GenerationError, "something nobody foresaw"),
        # A prefix counts only where a text begins.
        ("trouble: Input validation error: x", errors.GenerationError, "trouble: Input validation error: x"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("preamble", ["", "in ensemble 'ensemble', ", "[request id: a b] in ensemble 'ensemble', "])
def test_text_decides_the_class(preamble: str, text: str, kind: type[errors.TextgenError], message: str | None) -> None:
    error = errors.error_from_text(preamble + text, "id-1")
    assert type(error) is kind
    assert error.request_id == "id-1"
    if message is not None:
        assert error.message == message
        assert str(error) == f"{kind.prefix}: {message}"


class _RpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServerUnavailable),
        (grpc.StatusCode.UNIMPLEMENTED, errors.ServerUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.RequestTimeout),
        (grpc.StatusCode.CANCELLED, errors.RequestCancelled),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.OverloadedError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.ValidationError),
        (grpc.StatusCode.INTERNAL, errors.GenerationError),
    ],
)
def test_status_decides_where_no_text_does(code: grpc.StatusCode, kind: type[errors.TextgenError]) -> None:
    for details in (None, "several\nlines"):
        error = errors.error_from_status(_RpcError(code, details), "host:1", "id-1")
        assert type(error) is kind
        assert "\n" not in str(error)
    own_text = _RpcError(code, "Model is overloaded: 128 requests")
    assert type(errors.error_from_status(own_text, "host:1")) is errors.OverloadedError


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(errors.ToolError("no such tool", "id-1")))
    assert (type(error), str(error), error.request_id) == (errors.ToolError, "Tool error: no such tool", "id-1")
