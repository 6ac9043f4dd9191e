"""The metrics on Triton's port count what was asked, exactly."""

from __future__ import annotations

import json
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

from .wire import wait_until, wait_until_idle

if TYPE_CHECKING:
    from ..running_server import RunningServer
    from .wire import Wire

COUNTERS = (
    "tgi_request_count",
    "tgi_request_success",
    "tgi_request_failure",
    "tgi_generated_tokens",
    "tgi_prefill_tokens",
    "tgi_prefix_cache_hit_tokens",
    "tgi_preemptions",
    "tgi_engine_restarts",
)
GAUGES = ("tgi_queue_size", "tgi_batch_current_size", "tgi_kv_cache_usage_ratio", "tgi_engine_ready")
HISTOGRAMS = (
    "tgi_time_to_first_token_seconds",
    "tgi_inter_token_latency_seconds",
    "tgi_request_duration",
    "tgi_request_validation_duration",
    "tgi_request_queue_duration",
    "tgi_request_inference_duration",
    "tgi_request_mean_time_per_token_duration",
    "tgi_request_input_length",
    "tgi_request_generated_tokens",
    "tgi_batch_inference_duration",
)


def _page(server: RunningServer) -> str:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        text: str = response.read().decode()
    return text


def test_every_name_is_there_with_its_type(server: RunningServer) -> None:
    page = _page(server)
    for kind, names in {"counter": COUNTERS, "gauge": GAUGES, "histogram": HISTOGRAMS}.items():
        for name in names:
            assert f"# TYPE {name} {kind}" in page
    assert server.metric("tgi_engine_ready", model="textgen", version="1") == 1


def test_known_traffic_is_counted_exactly(server: RunningServer, wire: Wire) -> None:
    prompt = list(range(1000, 1020))  # 20 tokens that no other test sends
    repeated: dict[str, Any] = {"input_ids": prompt, "sampling_parameters": {"max_new_tokens": 5}}
    names = (
        "tgi_request_count",
        "tgi_request_success",
        "tgi_generated_tokens",
        "tgi_time_to_first_token_seconds_count",
        "tgi_inter_token_latency_seconds_count",
        "tgi_request_duration_count",
        "tgi_request_queue_duration_count",
        "tgi_request_inference_duration_count",
        "tgi_request_validation_duration_count",
        "tgi_request_mean_time_per_token_duration_count",
        "tgi_request_input_length_count",
        "tgi_request_input_length_sum",
        "tgi_request_generated_tokens_count",
        "tgi_request_generated_tokens_sum",
        "tgi_prefix_cache_hit_tokens",
    )

    def counts() -> dict[str, float]:
        found = {name: server.metric(name) for name in names}
        return found | {"failed": server.metric("tgi_request_failure", err="validation")}

    def is_quiet() -> bool:
        """What other tests left to be published has been: two looks, more than one interval apart, see the same."""
        earlier = counts()
        threading.Event().wait(0.5)
        return counts() == earlier

    wait_until_idle(server)
    wait_until(is_quiet, "no news")
    before = counts()
    assert wire.ask(**repeated).errors == []
    assert wire.ask(**repeated, stream=True).errors == []  # its first block of 16 is cached now
    assert wire.ask(**repeated, model="ensemble").errors == []
    assert wire.error_of(**repeated, text_input="too much")
    assert wire.error_of(request_id="nobody", cancel=True)  # no request to generate: counted nowhere
    expected = {
        "tgi_request_count": 4,
        "tgi_inter_token_latency_seconds_count": 3 * 4,
        "tgi_generated_tokens": 3 * 5,
        "tgi_request_generated_tokens_sum": 3 * 5,
        "tgi_request_input_length_sum": 3 * 20,
        "tgi_prefix_cache_hit_tokens": 2 * 16,
        "failed": 1,
    }
    expected = dict.fromkeys(before, 3) | expected

    def gained() -> dict[str, float]:
        return {name: value - before[name] for name, value in counts().items()}

    wait_until(lambda: sum(gained().values()) >= sum(expected.values()), "published")
    assert gained() == expected


def test_gauges_follow_what_runs(server: RunningServer, wire: Wire) -> None:
    wait_until_idle(server)
    sampling = {"max_new_tokens": 900, "ignore_eos_token": True}
    calls = [wire.open(text_input=f"Tale {i}:", stream=True, sampling_parameters=sampling) for i in range(3)]
    for call in calls:
        next(call)
    wait_until(lambda: server.metric("tgi_batch_current_size") == 3, "three run")
    assert 0 < server.metric("tgi_kv_cache_usage_ratio") < 1
    for call in calls:
        call.cancel()
    wait_until_idle(server)


def test_triton_counts_its_own(server: RunningServer, wire: Wire) -> None:
    before = server.metric("nv_inference_request_success", model="tokenizer")
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    assert wire.ask(messages=messages, sampling_parameters={"max_new_tokens": 1}).errors == []
    wait_until(lambda: server.metric("nv_inference_request_success", model="tokenizer") > before, "tokenizer asked")
