"""An OpenTelemetry collector for tests: takes OTLP over gRPC and over HTTP, and keeps every span."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True)
class Span:
    """A span as it came, with what the tests look at. Times are nanoseconds since 1970; status_code 2 is an error."""

    name: str
    service: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    start: int
    end: int
    attributes: dict[str, Any]
    events: list[tuple[int, str, dict[str, Any]]]
    status_code: int
    status_text: str


class Receiver(TraceServiceServicer):
    """Both collectors. raw: every batch as it came. headers: of the HTTP requests."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self._spans: list[Span] = []
        self._changed = threading.Condition()

    def Export(self, request: Any, context: Any) -> Any:
        self.take(request)
        return ExportTraceServiceResponse()

    def take(self, request: Any) -> None:
        spans = list(_spans(request))
        with self._changed:
            self.raw.append(request.SerializeToString())
            self._spans += spans
            self._changed.notify_all()

    def of_trace(self, trace_id: str) -> list[Span]:
        """The spans of a trace so far, by their start."""
        with self._changed:
            return sorted((s for s in self._spans if s.trace_id == trace_id), key=lambda span: (span.start, span.end))

    def wait_for_root(self, found: Any, within_s: float = 60.0) -> Span:
        """The first root (a span of kind server) that `found` accepts; fails the test when none comes."""
        deadline = time.monotonic() + within_s
        with self._changed:
            while True:
                for span in self._spans:
                    if span.kind == 2 and found(span):
                        return span
                left_s = deadline - time.monotonic()
                assert left_s > 0, f"no such span within {within_s:g} s; there are {self._spans}"
                self._changed.wait(left_s)


@contextlib.contextmanager
def otlp_receiver() -> Iterator[tuple[Receiver, str, str]]:
    """A receiver, with the URLs of its gRPC and of its HTTP port."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.headers.append({name.lower(): value for name, value in self.headers.items()})
            receiver.take(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    server = grpc.server(ThreadPoolExecutor(4))
    add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield receiver, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{web.server_address[1]}"
    finally:
        server.stop(0)
        web.shutdown()
        web.server_close()


def _spans(request: Any) -> Iterator[Span]:
    for resource in request.resource_spans:
        service = _attributes(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    name=span.name,
                    service=service,
                    kind=span.kind,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    state=span.trace_state,
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    attributes=_attributes(span.attributes),
                    events=[(e.time_unix_nano, e.name, _attributes(e.attributes)) for e in span.events],
                    status_code=span.status.code,
                    status_text=span.status.message,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(entry) for entry in value.array_value.values]
    return getattr(value, kind)
