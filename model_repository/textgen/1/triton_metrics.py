"""Publishes the engine's and the adapter's measurements on Triton's metrics port, as triton_metric_names.py lists them.

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
from triton_metric_names import FAMILIES, Family, buckets

from textgen_engine.errors import EngineError
from textgen_engine.messages import EngineInfo
from textgen_engine.metrics import EngineGauges, StepMetrics
from textgen_engine.request import Timings

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.2
# Observations of one series per interval; with more, evenly spaced ones stand for the rest (their share of the
# publishing thread would otherwise grow with the token rate).
_MAX_OBSERVATIONS = 500

# A series of a family: the values of its own label and of `adapter`, "" where it has none.
_Series = tuple[str, str, str]


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
        self._info = info
        self._is_ready = is_ready
        self._num_restarts = num_restarts
        self._labels = labels
        self._lock = threading.Lock()
        self._counts: Counter[_Series] = Counter()
        self._gauges = EngineGauges()
        self._observations: dict[_Series, list[float]] = {}
        self._stopping = threading.Event()
        # A metric stops working when its family is collected: the families are kept as long as the metrics.
        self._families: dict[str, Any] = {}
        self._metrics: dict[_Series, Any] = {}
        for name, family in FAMILIES.items():
            kind = getattr(pb_utils.MetricFamily, family.kind.upper())
            self._families[name] = pb_utils.MetricFamily(name, family.text, kind)
            # Every series is shown from the start: a rate over one that does not exist yet is no rate.
            for value in family.values or ("",):
                self._metric((name, value, ""))
        self._metric(("tgi_batch_max_total_tokens", "", "")).set(info.num_blocks * info.block_size)
        self._thread = threading.Thread(target=self._publish_loop, name="metrics-publisher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Publish what is left and end the thread."""
        self._stopping.set()
        self._thread.join(5.0)

    def count(self, name: str, amount: int = 1, *, value: str = "") -> None:
        """Add to a counter; value: of the label that the counter has beside model and version."""
        with self._lock:
            self._counts[name, value, ""] += amount

    def note_failure(self, error: EngineError) -> None:
        """Count a failed request under its public type (TGI's label `err`)."""
        self.count("tgi_request_failure", value=error.public_type)

    def note_queued(self, max_new_tokens: int) -> None:
        """Take in one request that goes to the engine."""
        with self._lock:
            self._observe("tgi_request_max_new_tokens", max_new_tokens)

    def note_step(self, step: StepMetrics, filter_s: float) -> None:
        """Take in what one step measured. filter_s: the time it took to hand its outputs to the sender."""
        with self._lock:
            self._counts["tgi_generated_tokens", "", ""] += step.num_generated_tokens
            self._counts["tgi_jump_forward_tokens", "", ""] += step.num_forced_tokens
            self._counts["tgi_guessed_tokens", "", ""] += step.num_guessed_tokens
            self._counts["tgi_guessed_tokens_right", "", ""] += step.num_guessed_right
            self._counts["tgi_prefill_tokens", "", ""] += step.num_prefill_tokens
            self._counts["tgi_prefix_cache_hit_tokens", "", ""] += step.num_cached_tokens
            self._counts["tgi_preemptions", "", ""] += step.num_preemptions
            self._gauges = step.gauges
            self._observe("tgi_time_to_first_token_seconds", *step.time_to_first_token_s)
            self._observe("tgi_inter_token_latency_seconds", *step.inter_token_s)
            self._observe("tgi_request_queue_duration", *step.queue_s)
            self._observe("tgi_request_skipped_tokens", *step.skipped_tokens)
            self._observe("tgi_grammar_compile_seconds", *step.grammar_compile_s)
            if step.batch_size:
                self._note_batch(step, filter_s)

    def _note_batch(self, step: StepMetrics, filter_s: float) -> None:
        method = "prefill" if step.is_prefill else "decode"
        self._counts["tgi_batch_inference_count", method, ""] += 1
        self._observe("tgi_batch_inference_duration", step.step_s, value=method)
        if step.num_started:
            self._observe("tgi_batch_next_size", step.num_started)
        if step.joined_because is not None:
            self._counts["tgi_batch_concat", step.joined_because, ""] += 1
            self._observe("tgi_batch_concat_duration", step.prepare_s, value="decode")
        if step.has_failed:
            self._counts["tgi_batch_inference_failure", method, ""] += 1
            return
        self._counts["tgi_batch_inference_success", method, ""] += 1
        self._observe("tgi_batch_forward_duration", step.forward_s, value=method)
        self._observe("tgi_batch_decode_duration", step.decode_s, value=method)
        self._observe("tgi_batch_filter_duration", filter_s, value=method)

    def note_success(
        self, timings: Timings | None, *, num_input: int, num_output: int, validation_s: float, adapter_id: str | None
    ) -> None:
        """Take in one answered request. timings: None where it generated nothing (a grammar check)."""
        adapter = adapter_id or ""
        with self._lock:
            self._counts["tgi_request_success", "", adapter] += 1
            if timings is None:
                return
            self._observe("tgi_request_input_length", num_input, adapter=adapter)
            self._observe("tgi_request_generated_tokens", num_output, adapter=adapter)
            self._observe("tgi_request_validation_duration", validation_s)
            if timings.finished_s is not None and timings.scheduled_s is not None:
                inference_s = timings.finished_s - timings.scheduled_s
                mean_s = inference_s / max(num_output, 1)
                self._observe("tgi_request_duration", timings.finished_s - timings.arrival_s, adapter=adapter)
                self._observe("tgi_request_inference_duration", inference_s, adapter=adapter)
                self._observe("tgi_request_mean_time_per_token_duration", mean_s, adapter=adapter)

    def _observe(self, name: str, *observed: float, value: str = "", adapter: str = "") -> None:
        if observed:
            self._observations.setdefault((name, value, adapter), []).extend(observed)

    # ---- the publishing thread ---------------------------------------------------------------------------------

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
        for series, amount in counts.items():
            if amount:
                self._metric(series).increment(amount)
        if now != shown:
            gauges = now[0]
            self._metric(("tgi_queue_size", "", "")).set(gauges.num_waiting)
            self._metric(("tgi_batch_current_size", "", "")).set(gauges.num_running)
            self._metric(("tgi_batch_current_max_tokens", "", "")).set(gauges.max_tokens)
            self._metric(("tgi_kv_cache_usage_ratio", "", "")).set(gauges.kv_cache_usage)
            self._metric(("tgi_engine_ready", "", "")).set(1 if is_ready else 0)
        for series, values in observations.items():
            metric, stride = self._metric(series), -(-len(values) // _MAX_OBSERVATIONS)
            for value in values[::stride]:
                metric.observe(value)
        return now

    def _metric(self, series: _Series) -> Any:
        metric = self._metrics.get(series)
        if metric is None:
            name, value, adapter = series
            family: Family = FAMILIES[name]
            labels = dict(self._labels)
            if family.label:
                labels[family.label] = value
            if adapter:
                labels["adapter"] = adapter
            more: dict[str, Any] = {}
            if family.kind == "histogram":
                info = self._info
                more["buckets"] = buckets(
                    family, max_input_tokens=info.max_input_tokens, max_total_tokens=info.max_total_tokens
                )
            metric = self._metrics[series] = self._families[name].Metric(labels=labels, **more)
        return metric
