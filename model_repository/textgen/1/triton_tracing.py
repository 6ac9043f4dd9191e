"""OpenTelemetry spans of requests: request -> validate -> grammar -> queue -> prefill -> decode.

The spans are made from times that the engine reports anyway, when a request has ended, on a thread of their own; the
OpenTelemetry SDK batches and exports them on another. So tracing costs a request two calls that only note something,
and a request that is not sampled one. Without an endpoint there is no `Tracer`, and nothing of OpenTelemetry is
imported. Attributes are those of OpenTelemetry's conventions for generative AI; never a prompt, never a text.

Knows `LiveRequest` and the engine's records, nothing of Triton.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from textgen_engine.config import TracingConfig
from textgen_engine.errors import EngineError, EngineFailure
from textgen_engine.messages import StepReport
from textgen_engine.request import Timings

if TYPE_CHECKING:
    from triton_requests import ParsedRequest
    from triton_responder import LiveRequest

logger = logging.getLogger(__name__)

_EXPORT_TIMEOUT_S = 5.0
# A collector that does not answer must not keep the server from stopping.
_STOP_TIMEOUT_S = 3.0
# A span with more token events than this loses the rest: it would fill the exporter's queue alone.
_MAX_EVENTS = 10_000
_PROVIDER = "triton-textgen"


@dataclass(slots=True)
class RequestTrace:
    """One sampled request. span: its root, open. tokens: (seconds of `time.monotonic()`, choice, tokens) where asked.

    offset_ns: what is to be added to `time.monotonic_ns()` to get the time of day, the same for all spans of a request
    even if the clock is set meanwhile. submitted_s: when the engine got the request. has_grammar: it waited for one.
    seen: the times as they show from here, for a request whose engine died and reports none.
    """

    span: Any
    trace_id: str
    wants_tokens: bool
    offset_ns: int
    seen: Timings
    has_grammar: bool = False
    submitted_s: float | None = None
    tokens: list[tuple[float, int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A request that has ended, copied for the thread that makes its spans. Times are seconds of time.monotonic()."""

    trace: RequestTrace
    arrival_s: float
    ended_s: float
    timings: Timings | None
    facts: dict[str, Any]
    error: EngineError | None


@dataclass(frozen=True, slots=True)
class Phase:
    """One stage of a request. complete: it was left for the next one, not by the request's end."""

    name: str
    start_s: float
    end_s: float
    complete: bool


def start_tracer(config: TracingConfig, labels: Mapping[str, str], model_id: str) -> Tracer | None:
    """A running Tracer, or None where no endpoint is set. labels: the metrics' labels, `model` and `version`."""
    return None if config.endpoint is None else Tracer(config, labels, model_id)


class Tracer:
    """Thread safe. `begin` and `end` are called once per request, whatever becomes of it."""

    def __init__(self, config: TracingConfig, labels: Mapping[str, str], model_id: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._wants_tokens = config.token_events
        self._model_id = model_id
        self._server_kind = SpanKind.SERVER
        self._failed = lambda text: Status(StatusCode.ERROR, text)
        self._below = set_span_in_context
        self._propagator = TraceContextTextMapPropagator()
        resource = Resource.create({"service.name": config.service_name})
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            resource=resource,
            span_limits=SpanLimits(max_events=_MAX_EVENTS),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(_exporter(config)))
        self._tracer = self._provider.get_tracer("triton-textgen")
        self._common = {
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.request.model": labels["model"],
            "gen_ai.response.model": model_id,
            "textgen.model.version": labels["version"],
        }
        # Written by the thread that admits a request, read by the one that takes reports in.
        self._submitted: dict[str, RequestTrace] = {}
        self._ended: queue.SimpleQueue[_Ended | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._make_spans, name="tracer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Export what is left, for a few seconds at most."""
        self._ended.put(None)
        self._thread.join(_STOP_TIMEOUT_S)
        # In a thread of its own, which nobody waits for once its time is up: the SDK would wait half a minute.
        flush = threading.Thread(target=self._provider.shutdown, name="tracer-flush", daemon=True)
        flush.start()
        flush.join(_STOP_TIMEOUT_S)

    def begin(self, live: LiveRequest, context: Mapping[str, str]) -> None:
        """Open the request's root span, unless it is not sampled. context: traceparent and tracestate, if any came.

        A context that makes no sense is as none: W3C's rule, and a trace is no reason to refuse a request.
        """
        offset_ns = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            "generate",
            context=self._propagator.extract(context),
            kind=self._server_kind,
            attributes={**self._common, "gen_ai.response.id": live.client_id or live.key},
            start_time=_wall_ns(live.arrival_s, offset_ns),
        )
        if span.is_recording():
            live.trace = RequestTrace(
                span, f"{span.get_span_context().trace_id:032x}", self._wants_tokens, offset_ns, Timings(live.arrival_s)
            )

    def note_parsed(self, live: LiveRequest, parsed: ParsedRequest) -> None:
        """Put what the client asked on the root span."""
        trace = live.trace
        if trace is None:
            return
        attributes = dict(_asked(parsed))
        trace.span.update_name(f"{attributes['gen_ai.operation.name']} {self._common['gen_ai.request.model']}")
        trace.span.set_attributes(attributes)
        trace.has_grammar = parsed.grammar is not None
        trace.wants_tokens = trace.wants_tokens or parsed.parameters.trace_tokens

    def note_submitted(self, live: LiveRequest) -> None:
        """The engine gets the request now."""
        if live.trace is not None:
            live.trace.submitted_s = live.arrival_s + live.validation_s
            self._submitted[live.key] = live.trace

    def note_report(self, report: StepReport) -> None:
        """Note what a step says of traced requests: that they started, and tokens where an event for each is wanted."""
        for request_id in report.started:
            trace = self._submitted.get(request_id)
            if trace is not None:
                trace.seen.grammar_ready_s = trace.seen.scheduled_s = time.monotonic()
        for output in report.outputs:
            trace = self._submitted.get(output.request_id)
            if trace is not None and output.token_ids:
                trace.seen.first_token_s = trace.seen.first_token_s or report.time_s
                if trace.wants_tokens:
                    trace.tokens.append((report.time_s, output.choice, len(output.token_ids)))

    def end(self, live: LiveRequest, error: EngineError | None = None) -> None:
        """The request has ended: close its spans, soon."""
        trace = live.trace
        if trace is None:
            return
        live.trace = None
        self._submitted.pop(live.key, None)
        facts: dict[str, Any] = {"gen_ai.usage.output_tokens": sum(live.num_tokens.values())}
        if live.num_input_tokens:
            facts["gen_ai.usage.input_tokens"] = live.num_input_tokens
            facts["gen_ai.usage.cache_read.input_tokens"] = live.num_cached_tokens
        if live.reasons:
            facts["gen_ai.response.finish_reasons"] = [live.reasons[choice] for choice in sorted(live.reasons)]
        self._ended.put(_Ended(trace, live.arrival_s, time.monotonic(), live.timings, facts, error))

    # ---- the thread that makes spans ---------------------------------------------------------------------------

    def _make_spans(self) -> None:
        while True:
            ended = self._ended.get()
            if ended is None:
                return
            try:
                self._close(ended)
            except Exception:  # a trace that cannot be made costs nobody anything else
                logger.exception("a request could not be traced")

    def _close(self, ended: _Ended) -> None:
        root, offset_ns = ended.trace.span, ended.trace.offset_ns
        root.set_attributes(ended.facts)
        first_token_s = (ended.timings or ended.trace.seen).first_token_s
        if first_token_s is not None:
            root.set_attribute("gen_ai.response.time_to_first_chunk", first_token_s - ended.arrival_s)
        context = self._below(root)
        phases = _phases(ended)
        for phase in phases:
            child = self._tracer.start_span(phase.name, context=context, start_time=_wall_ns(phase.start_s, offset_ns))
            if phase.name == "decode":
                self._add_tokens(child, ended.trace.tokens, offset_ns)
            if ended.error is not None and not phase.complete:
                child.set_attribute("error.type", ended.error.public_type)
                child.set_status(self._failed(ended.error.public_type))
            child.end(_wall_ns(phase.end_s, offset_ns))
        if ended.error is not None:
            root.set_attribute("error.type", ended.error.public_type)
            # Of other errors the text may repeat what the client sent.
            told = ended.error.message if isinstance(ended.error, EngineFailure) else ended.error.public_type
            root.set_status(self._failed(told))
        root.end(_wall_ns(ended.ended_s, offset_ns))

    def _add_tokens(self, span: Any, tokens: list[tuple[float, int, int]], offset_ns: int) -> None:
        so_far: dict[int, int] = {}
        for time_s, choice, num_tokens in tokens:
            so_far[choice] = so_far.get(choice, 0) + num_tokens
            attributes = {
                "textgen.choice": choice,
                "textgen.tokens": num_tokens,
                "textgen.tokens_so_far": so_far[choice],
            }
            span.add_event("token", attributes, _wall_ns(time_s, offset_ns))


def _phases(ended: _Ended) -> list[Phase]:
    """The stages that a request went through, in order; the last one ends with the request if it was not completed."""
    trace, times = ended.trace, ended.timings or ended.trace.seen
    marks: list[tuple[str, float | None]] = [("validate", trace.submitted_s)]
    if trace.has_grammar:
        marks.append(("grammar", times.grammar_ready_s))
    marks += [("queue", times.scheduled_s), ("prefill", times.first_token_s), ("decode", times.finished_s)]
    phases = []
    start_s = ended.arrival_s
    for name, end_s in marks:
        if end_s is None:
            phases.append(Phase(name, start_s, ended.ended_s, complete=False))
            break
        phases.append(Phase(name, start_s, max(start_s, end_s), complete=True))
        start_s = max(start_s, end_s)
    return phases


def _asked(parsed: ParsedRequest) -> Iterator[tuple[str, Any]]:
    """What the client asked, as attributes; what it left open is left out."""
    parameters = parsed.parameters
    sampling, stopping = parameters.sampling, parameters.stopping
    if parsed.prompt_form is None:
        yield "gen_ai.operation.name", "adapter_command" if parameters.adapter_command else "grammar_check"
        return
    yield "gen_ai.operation.name", "chat" if parsed.prompt_form == "messages" else "text_completion"
    yield "gen_ai.request.stream", parsed.options.stream
    if stopping.max_new_tokens is not None:
        yield "gen_ai.request.max_tokens", stopping.max_new_tokens
    if sampling.do_sample:
        yield "gen_ai.request.temperature", sampling.temperature
        if sampling.seed is not None:
            # Seeds have 64 bits without a sign, attributes have one.
            yield "gen_ai.request.seed", sampling.seed if sampling.seed < 2**63 else str(sampling.seed)
    if sampling.top_p < 1:
        yield "gen_ai.request.top_p", sampling.top_p
    if sampling.top_k:
        yield "gen_ai.request.top_k", sampling.top_k
    if sampling.frequency_penalty:
        yield "gen_ai.request.frequency_penalty", sampling.frequency_penalty
    if sampling.presence_penalty:
        yield "gen_ai.request.presence_penalty", sampling.presence_penalty
    if parameters.n > 1:
        yield "gen_ai.request.choice.count", parameters.n
    if parsed.grammar is not None:
        yield "gen_ai.output.type", "json" if "json" in parsed.grammar.kind else "text"
    if parameters.adapter_id is not None:
        yield "textgen.adapter", parameters.adapter_id


def _exporter(config: TracingConfig) -> Any:
    """Sends batches of spans. Headers and certificates come from OpenTelemetry's own OTEL_EXPORTER_OTLP_* variables."""
    assert config.endpoint is not None
    if config.protocol == "http":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        endpoint = config.endpoint.rstrip("/")
        if not endpoint.endswith("/v1/traces"):
            endpoint += "/v1/traces"
        return HttpExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    is_plain = config.endpoint.startswith("http://")
    return GrpcExporter(endpoint=config.endpoint, insecure=is_plain, timeout=_EXPORT_TIMEOUT_S)


def _wall_ns(monotonic_s: float, offset_ns: int) -> int:
    return int(monotonic_s * 1e9) + offset_ns
