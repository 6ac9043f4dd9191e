"""The tracer by itself: off costs no import, HTTP export, sampling, names that exist, a dead collector."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

import textgen_engine
from textgen_engine.config import GrammarConfig, TracingConfig
from textgen_engine.configure import build_config
from textgen_engine.errors import ConfigError, EngineFailure
from textgen_engine.parameters import ParameterLimits
from textgen_engine.request import Timings

from ..otlp_receiver import otlp_receiver
from .fake_backend import request

LABELS = {"model": "textgen", "version": "1"}


@pytest.fixture(scope="module")
def triton_tracing(_backend: None) -> Any:
    return importlib.import_module("triton_tracing")


def _trace(tracer: Any, responder: Any, key: str, context: dict[str, str], parsed: Any = None) -> Any:
    """One whole request of three tokens, through the tracer's hands."""
    now_s = time.monotonic()
    live = responder.LiveRequest(key, "", None, now_s - 4)
    tracer.begin(live, context)
    if parsed is not None:
        tracer.note_parsed(live, parsed)
    tracer.note_submitted(live)
    live.timings = Timings(now_s - 4, now_s - 3.5, now_s - 3, now_s - 2, now_s - 1)
    live.num_tokens, live.reasons, live.num_input_tokens = {0: 3}, {0: "length"}, 5
    tracer.end(live)
    return live


def test_off_imports_nothing_of_opentelemetry() -> None:
    code = (
        "import sys, triton_tracing; from textgen_engine.config import TracingConfig; "
        "assert triton_tracing.start_tracer(TracingConfig(), {}, 'm') is None; "
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'grpc'))])"
    )
    folder = str(textgen_engine.__path__[0]).rpartition("/")[0]
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": folder}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_over_http_and_only_what_callers_sample(
    triton_tracing: Any, triton_responder: Any, triton_requests: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20key")
    everything = {
        "max_new_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 2**64 - 1, "n": 2,
        "frequency_penalty": 0.5, "presence_penalty": 0.5, "grammar": {"type": "json", "value": {"type": "object"}},
    }  # fmt: skip
    parsed = triton_requests.parse_request(
        request(text_input="Hi", sampling_parameters=everything),
        limits=ParameterLimits(),
        vocab_size=100,
        grammar_config=GrammarConfig(),
    )
    with otlp_receiver() as (receiver, _, url):
        config = TracingConfig(endpoint=url, protocol="http", sample_ratio=0.0, service_name="tales")
        tracer = triton_tracing.start_tracer(config, LABELS, "org/model")
        assert _trace(tracer, triton_responder, "a", {}).trace is None
        sampled = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "tracestate": "vendor=1"}
        _trace(tracer, triton_responder, "b", sampled, parsed)
        _trace(tracer, triton_responder, "c", {"traceparent": "00-" + "c" * 32 + "-" + "b" * 16 + "-00"})
        tracer.stop()
        spans = receiver.of_trace("a" * 32)
        assert sorted(span.name for span in spans) == sorted(
            ["text_completion textgen", "validate", "queue", "prefill", "decode", "grammar"]
        )
        assert receiver.of_trace("c" * 32) == []
        assert receiver.headers[0]["authorization"] == "Bearer key"
        assert len(receiver.raw) == 1
    root = next(span for span in spans if span.kind == 2)
    known = {name for name in vars(gen_ai_attributes).values() if isinstance(name, str)}
    assert {name for name in root.attributes if not name.startswith("textgen.")} <= known
    assert root.attributes["gen_ai.request.choice.count"] == 2
    assert root.attributes["gen_ai.request.seed"] == str(2**64 - 1)
    assert root.attributes["gen_ai.output.type"] == "json"


def test_a_collector_that_is_not_there_keeps_nobody(triton_tracing: Any, triton_responder: Any) -> None:
    tracer = triton_tracing.start_tracer(TracingConfig(endpoint="http://127.0.0.1:9"), LABELS, "m")
    for key in "abc":
        live = _trace(tracer, triton_responder, key, {})
        assert live.trace is None  # ended, and handed over
    begun_s = time.monotonic()
    tracer.stop()
    assert time.monotonic() - begun_s < 30


def test_a_request_whose_engine_reports_no_times(triton_tracing: Any) -> None:
    """Its phases are those that were seen from outside."""
    seen = Timings(1.0, None, 3.0, None, None)
    trace = triton_tracing.RequestTrace(SimpleNamespace(), "", False, 0, seen, False, 2.0)
    ended = triton_tracing._Ended(trace, 1.0, 9.0, None, {}, EngineFailure("was killed"))
    phases = triton_tracing._phases(ended)
    assert [(p.name, p.start_s, p.end_s, p.complete) for p in phases] == [
        ("validate", 1.0, 2.0, True),
        ("queue", 2.0, 3.0, True),
        ("prefill", 3.0, 9.0, False),
    ]


@pytest.mark.parametrize("url", ["localhost:4317", "ftp://host", "http://", "http://host:99999", "http://["])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(ConfigError, match="OTLP_ENDPOINT must be a URL like http"):
        build_config({}, {"MODEL_ID": "m", "OTLP_ENDPOINT": url})
