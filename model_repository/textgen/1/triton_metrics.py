"""Publishes the engine's and the adapter's measurements on Triton's metrics port, under TGI's names where it has one.

Every call into Triton's metrics costs a round trip of about 23 microseconds, so numbers are gathered as they come and
published a few times a second from a thread of their own.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from textgen_engine.errors import EngineError
from textgen_engine.messages import EngineInfo
from textgen_engine.metrics import EngineGauges, StepMetrics
from textgen_engine.request import Timings

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.2
# Observations of one histogram per interval; with more, evenly spaced ones stand for the rest (their share of the
# publishing thread would otherwise grow with the token rate).
_MAX_OBSERVATIONS = 500

# TGI's duration buckets: 35, geometric, from 0.15 ms on.
_DURATION_BUCKETS = [0.00015 * 1.5**k for k in range(35)]

_COUNTERS = {
    "tgi_request_count": "Requests received",
    "tgi_request_success": "Requests answered in full",
    "tgi_request_failure": "Requests that failed, by reason",
    "tgi_generated_tokens": "Tokens generated",
    "tgi_jump_forward_tokens": "Of these, tokens that a grammar forced and that took no forward pass of their own",
    "tgi_prefill_tokens": "Prompt tokens computed",
    "tgi_prefix_cache_hit_tokens": "Prompt tokens found in the prefix cache",
    "tgi_preemptions": "Sequences preempted for want of KV blocks",
    "tgi_engine_restarts": "Restarts of the engine process",
    "tgi_batch_inference_count": "Steps of the engine",
}
# The public types of errors.py: values of tgi_request_failure's label `err`.
_FAILURES = (
    "validation", "template_error", "tool_error", "overloaded", "timeout", "cancelled", "healthcheck", "generation"
)  # fmt: skip
_GAUGES = {
    "tgi_queue_size": "Requests waiting",
    "tgi_batch_current_size": "Requests running",
    "tgi_kv_cache_usage_ratio": "Share of the KV cache in use by running requests",
    "tgi_engine_ready": "1 while the engine can take requests, else 0",
}
_DURATIONS = {
    "tgi_time_to_first_token_seconds": "Arrival to first token",
    "tgi_inter_token_latency_seconds": "Gap between two tokens of a choice",
    "tgi_request_duration": "Arrival to last token",
    "tgi_request_validation_duration": "Arrival to submission",
    "tgi_request_queue_duration": "Arrival to first step",
    "tgi_request_inference_duration": "First step to last token",
    "tgi_request_mean_time_per_token_duration": "Inference time by generated tokens",
    "tgi_batch_inference_duration": "One step of the engine",
    "tgi_grammar_compile_seconds": "Compilation of one grammar, where it was not cached",
}
_LENGTHS = {
    "tgi_request_input_length": "Prompt tokens of a request",
    "tgi_request_generated_tokens": "Generated tokens of a request",
}


class MetricsPublisher:
    """Thread safe: anyone may count and observe; one thread publishes."""

    def __init__(
        self,
        info: EngineInfo,
        labels: dict[str, str],
        *,
        is_ready: Callable[[], bool],
        num_restarts: Callable[[], int],
    ) -> None:
        self._is_ready = is_ready
        self._num_restarts = num_restarts
        self._labels = labels
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # (name, err)
        self._gauges = EngineGauges()
        self._observations: dict[str, list[float]] = {}
        self._stopping = threading.Event()
        # A metric stops working when its family is collected: the families are kept as long as the metrics.
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, str], Any] = {}
        for name, text in _COUNTERS.items():
            self._families[name] = pb_utils.MetricFamily(name, text, pb_utils.MetricFamily.COUNTER)
            if name == "tgi_request_failure":
                # All reasons are shown from the start: a rate over a series that does not exist yet is no rate.
                for err in _FAILURES:
                    self._metrics[name, err] = self._families[name].Metric(labels={**labels, "err": err})
            else:
                self._metrics[name, ""] = self._families[name].Metric(labels=labels)
        for name, text in _GAUGES.items():
            self._families[name] = pb_utils.MetricFamily(name, text, pb_utils.MetricFamily.GAUGE)
            self._metrics[name, ""] = self._families[name].Metric(labels=labels)
        for name, text in (_DURATIONS | _LENGTHS).items():
            top = info.max_input_tokens if "input" in name else info.max_total_tokens
            buckets = _DURATION_BUCKETS if name in _DURATIONS else [top * k / 100 for k in range(1, 101)]
            self._families[name] = pb_utils.MetricFamily(name, text, pb_utils.MetricFamily.HISTOGRAM)
            self._metrics[name, ""] = self._families[name].Metric(labels=labels, buckets=buckets)
        self._thread = threading.Thread(target=self._publish_loop, name="metrics-publisher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish what is left and end the thread."""
        self._stopping.set()
        self._thread.join(5.0)

    def count(self, name: str, amount: int = 1, *, err: str = "") -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, err] += amount

    def note_failure(self, error: EngineError) -> None:
        """Count a failed request under its public type (TGI's label `err`)."""
        self.count("tgi_request_failure", err=error.public_type)

    def note_step(self, step: StepMetrics) -> None:
        """Take in what one step measured."""
        with self._lock:
            self._counts["tgi_generated_tokens", ""] += step.num_generated_tokens
            self._counts["tgi_jump_forward_tokens", ""] += step.num_forced_tokens
            self._counts["tgi_prefill_tokens", ""] += step.num_prefill_tokens
            self._counts["tgi_prefix_cache_hit_tokens", ""] += step.num_cached_tokens
            self._counts["tgi_preemptions", ""] += step.num_preemptions
            self._gauges = step.gauges
            self._observe("tgi_time_to_first_token_seconds", *step.time_to_first_token_s)
            self._observe("tgi_inter_token_latency_seconds", *step.inter_token_s)
            self._observe("tgi_request_queue_duration", *step.queue_s)
            self._observe("tgi_grammar_compile_seconds", *step.grammar_compile_s)
            if step.batch_size:
                self._counts["tgi_batch_inference_count", ""] += 1
                self._observe("tgi_batch_inference_duration", step.step_s)

    def note_success(self, timings: Timings | None, *, num_input: int, num_output: int, validation_s: float) -> None:
        """Take in one answered request. timings: None where it generated nothing (a grammar check)."""
        with self._lock:
            self._counts["tgi_request_success", ""] += 1
            if timings is None:
                return
            self._observe("tgi_request_input_length", num_input)
            self._observe("tgi_request_generated_tokens", num_output)
            self._observe("tgi_request_validation_duration", validation_s)
            if timings.finished_s is not None and timings.scheduled_s is not None:
                inference_s = timings.finished_s - timings.scheduled_s
                self._observe("tgi_request_duration", timings.finished_s - timings.arrival_s)
                self._observe("tgi_request_inference_duration", inference_s)
                self._observe("tgi_request_mean_time_per_token_duration", inference_s / max(num_output, 1))

    def _observe(self, name: str, *values: float) -> None:
        self._observations.setdefault(name, []).extend(values)

    def _publish_loop(self) -> None:
        shown: tuple[EngineGauges, bool] | None = None
        num_restarts = 0
        while True:
            is_last = self._stopping.wait(_INTERVAL_S)
            if self._num_restarts() != num_restarts:
                self.count("tgi_engine_restarts", self._num_restarts() - num_restarts)
                num_restarts = self._num_restarts()
            try:
                shown = self._publish(shown)
            except pb_utils.TritonModelException:
                logger.exception("metrics could not be published")
            if is_last:
                return

    def _publish(self, shown: tuple[EngineGauges, bool] | None) -> tuple[EngineGauges, bool]:
        is_ready = self._is_ready()
        with self._lock:
            counts, self._counts = self._counts, Counter()
            observations, self._observations = self._observations, {}
            if not is_ready:
                self._gauges = EngineGauges()
            now = (self._gauges, is_ready)
        for (name, err), amount in counts.items():
            if amount:
                self._metrics[name, err].increment(amount)
        if now != shown:
            gauges = now[0]
            self._metrics["tgi_queue_size", ""].set(gauges.num_waiting)
            self._metrics["tgi_batch_current_size", ""].set(gauges.num_running)
            self._metrics["tgi_kv_cache_usage_ratio", ""].set(gauges.kv_cache_usage)
            self._metrics["tgi_engine_ready", ""].set(1 if is_ready else 0)
        for name, values in observations.items():
            stride = -(-len(values) // _MAX_OBSERVATIONS) if values else 1
            for value in values[::stride]:
                self._metrics[name, ""].observe(value)
        return now
