#!/usr/bin/env python3
"""What the metrics cost: microseconds of each step of the engine, and of the adapter's publishing thread.

    metrics_cost.py [--model FOLDER] [--batches 1,4,16] [--context 300]

The engine's part is all that a step does for metrics alone: clocks, sums, and their share of the message to the
adapter. The adapter's part is counted in calls into Triton's metrics, each of which takes about 23 microseconds there
(measured in Triton 2.51); it runs on another thread of another process.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "model_repository" / "textgen" / "1")]

from benchmark.decode_step import make_engine, timed_step  # noqa: E402

from textgen_engine.engine import Engine  # noqa: E402
from textgen_engine.messages import StepReport  # noqa: E402
from textgen_engine.metrics import StepMetrics  # noqa: E402

CALL_US = 23.0
CLOCKS_A_STEP = 6
ROUNDS = 2000


class CountingFamily:
    """Triton's `MetricFamily`, as far as the publisher uses it; counts the calls that would travel to Triton."""

    COUNTER, GAUGE, HISTOGRAM = range(3)
    calls = 0

    def __init__(self, name: str, text: str, kind: int) -> None:
        pass

    def Metric(self, **_: Any) -> CountingFamily:
        return self

    def observe(self, _: float) -> None:
        CountingFamily.calls += 1

    increment = set = observe


def microseconds(work: Callable[[], Any]) -> float:
    """The median of one call."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def one_step(engine: Engine) -> StepReport:
    """A decode step's report."""
    reports: list[StepReport] = []
    engine._emit = reports.append
    engine.step()
    return reports[-1]


def engine_cost(engine: Engine, report: StepReport) -> float:
    """Microseconds a step."""
    batch = engine._scheduler.schedule()
    live = [
        engine._requests.by_id[choice.sequence.request.request_id] for choice in engine._requests.choice_of.values()
    ]
    pairs = list(zip(live, list(engine._requests.choice_of.values()), strict=True))

    def note() -> None:
        again = StepReport(metrics=StepMetrics())
        for request, choice in pairs:
            engine._meter.time_tokens(request, choice, 1, time.monotonic(), again)
        engine._meter.measure(batch, again, 0.01, engine._requests.by_id.values())

    without = StepReport(outputs=report.outputs)
    message = microseconds(lambda: pickle.dumps(report)) - microseconds(lambda: pickle.dumps(without))
    return microseconds(note) + message + CLOCKS_A_STEP * microseconds(time.monotonic)


def adapter_calls(engine: Engine, report: StepReport, steps: int = 100) -> float:
    """Calls into Triton's metrics a step, with steps gathered over one interval of a step's length each."""
    backend = types.ModuleType("triton_python_backend_utils")
    backend.__dict__.update(MetricFamily=CountingFamily, TritonModelException=RuntimeError)
    sys.modules["triton_python_backend_utils"] = backend
    from triton_metrics import MetricsPublisher

    labels = {"model": "textgen", "version": "1"}
    publisher = MetricsPublisher(engine.info, labels, is_ready=lambda: True, num_restarts=lambda: 0)
    publisher.stop()
    CountingFamily.calls = 0
    assert report.metrics is not None
    shown = None
    for number in range(steps):
        publisher.note_step(report.metrics, 1e-5)
        if number % 10 == 9:
            shown = publisher._publish(shown)
    return CountingFamily.calls / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m-instruct")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print("| streams | a step, ms | of it for metrics, µs | share | calls of the adapter a step | its thread, µs |")
    print("|---|---|---|---|---|---|", flush=True)
    for batch in map(int, options.batches.split(",")):
        engine = make_engine(options.model, batch, options.context, 80, options.threads, compiled=True)
        step_ms = statistics.median(timed_step(engine) for _ in range(20))
        report = one_step(engine)
        cost_us = engine_cost(engine, report)
        calls = adapter_calls(engine, report)
        cells = (
            f"{batch}", f"{step_ms:.1f}", f"{cost_us:.0f}", f"{cost_us / step_ms / 10:.3f} %", f"{calls:.1f}",
            f"{calls * CALL_US:.0f}",
        )  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
