"""The metrics on Triton's port count what was asked, exactly."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import generate_metric_docs
import pytest
from triton_metric_names import FAMILIES, buckets

from textgen_client.health import is_progressing

from .wire import wait_until, wait_until_idle

if TYPE_CHECKING:
    from ..running_server import RunningServer
    from .wire import Wire


@dataclass(frozen=True)
class Sample:
    """One line of the metrics page."""

    name: str
    labels: dict[str, str]
    value: float


def _page(server: RunningServer) -> str:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
        text: str = response.read().decode()
    return text


def samples(page: str) -> list[Sample]:
    found = []
    for line in page.splitlines():
        sample = re.fullmatch(r"(tgi_\w+)\{(.*)\} (\S+)", line)
        if sample is not None:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', sample[2]))
            found.append(Sample(sample[1], labels, float(sample[3])))
    return found


def sums(server: RunningServer) -> dict[str, float]:
    """Each counter, and count and sum of each histogram, over all series but by the family's own label; the gauges."""
    found: dict[str, float] = {}
    for sample in samples(_page(server)):
        family = FAMILIES.get(re.sub(r"_(bucket|count|sum)$", "", sample.name)) or FAMILIES[sample.name]
        if sample.name.endswith("_bucket"):
            continue
        name = sample.name + (f" {sample.labels[family.label]}" if family.label else "")
        found[name] = found.get(name, 0) + sample.value
    return found


def test_the_page_shows_what_the_table_says(server: RunningServer) -> None:
    page = _page(server)
    assert set(re.findall(r"^# TYPE (tgi_\w+) ", page, re.MULTILINE)) == set(FAMILIES)
    found = samples(page)
    for name, family in FAMILIES.items():
        assert f"# TYPE {name} {family.kind}\n" in page
        assert f"# HELP {name} {family.text}\n" in page
        series = [sample for sample in found if sample.name == name + ("_count" if family.buckets else "")]
        extra = [{k: v for k, v in sample.labels.items() if k not in ("model", "version")} for sample in series]
        wanted = [{family.label: value} for value in family.values] if family.label else [{}]
        assert sorted(extra, key=str) == sorted(wanted, key=str)
        assert all((sample.labels["model"], sample.labels["version"]) == ("textgen", "1") for sample in series)
        if family.buckets is not None:
            bounds = [
                float(sample.labels["le"])
                for sample in found
                if sample.name == f"{name}_bucket" and sample.labels.get(family.label, "") in ("", *family.values[:1])
            ]
            wanted_bounds = buckets(family, max_input_tokens=960, max_total_tokens=1024)
            assert bounds == pytest.approx([*wanted_bounds, float("inf")])
    assert server.metric("tgi_engine_ready") == 1
    assert server.metric("tgi_batch_max_total_tokens") == 16384


def test_50_known_traffic_is_counted_exactly(server: RunningServer, wire: Wire) -> None:
    """Every counter and every histogram's count; sums, where they can be known."""

    def is_quiet() -> bool:
        """What other tests left to be published has been: two looks, more than one interval apart, see the same."""
        earlier = sums(server)
        threading.Event().wait(0.5)
        return sums(server) == earlier

    prompt = list(range(1000, 1020))  # 20 tokens that no other test sends
    repeated: dict[str, Any] = {"input_ids": prompt, "sampling_parameters": {"max_new_tokens": 5}}
    wait_until_idle(server)
    wait_until(is_quiet, "no news")
    before = sums(server)
    for number in range(8):
        assert wire.ask(**repeated, stream=number % 2 == 1).errors == []
    assert wire.ask(**repeated, model="ensemble").errors == []
    assert wire.error_of(**repeated, text_input="too much")
    assert wire.error_of(request_id="nobody", cancel=True)  # no request to generate: counted nowhere
    # A stream of 900 tokens that another request joins, and that is cancelled.
    call = wire.open(
        input_ids=[7] * 20, stream=True, sampling_parameters={"max_new_tokens": 900, "ignore_eos_token": True}
    )
    next(call)
    assert wire.ask(input_ids=[8] * 20, sampling_parameters={"max_new_tokens": 2}).errors == []
    call.cancel()
    wait_until_idle(server)
    # A text of which the grammar forces all but, perhaps, the first token.
    grammar = {"type": "choice", "value": [f"The quick brown fox jumps over the lazy dog {threading.get_ident()}."]}
    sampling = {"grammar": grammar, "max_new_tokens": 50}
    forced = wire.ask(input_ids=[9] * 20, sampling_parameters=sampling, return_num_output_tokens=True)
    assert forced.errors == []
    num_forced = forced.responses[-1].tensors["num_output_tokens"][0]
    expected = {
        "tgi_request_count": 13,
        "tgi_request_success": 11,
        "tgi_request_failure validation": 1,
        "tgi_request_failure cancelled": 1,
        "tgi_request_max_new_tokens_count": 12,
        "tgi_request_max_new_tokens_sum": 9 * 5 + 900 + 2 + 50,
        "tgi_request_input_length_sum": 11 * 20,
        "tgi_request_generated_tokens_sum": 9 * 5 + 2 + num_forced,
        "tgi_time_to_first_token_seconds_count": 12,
        "tgi_request_queue_duration_count": 12,
        # The first block of 16 is cached from the second request on; other prompts are of one token, repeated.
        "tgi_prefix_cache_hit_tokens": 8 * 16,
        "tgi_prefill_tokens": 20 + 8 * 4 + 3 * 20,
        "tgi_grammar_compile_seconds_count": 1,
        "tgi_batch_next_size_count": 12,
        "tgi_batch_next_size_sum": 12,
        "tgi_batch_concat chunking": 1,
        "tgi_batch_concat_duration_count decode": 1,
    }
    answered = (
        "tgi_request_duration", "tgi_request_inference_duration", "tgi_request_validation_duration",
        "tgi_request_mean_time_per_token_duration", "tgi_request_input_length", "tgi_request_generated_tokens",
    )  # fmt: skip
    expected |= {f"{name}_count": 11 for name in answered}

    def gained() -> dict[str, float]:
        return {name: value - before[name] for name, value in sums(server).items()}

    wait_until_idle(server)
    wait_until(lambda: all(gained()[name] >= value for name, value in expected.items()), "published")
    wait_until(is_quiet, "no more")
    now = gained()
    assert {name: now[name] for name in expected} == expected
    # How many tokens the cancelled stream had is known only from the sum of all; what hangs on it, relatively.
    steps = {method: now[f"tgi_batch_inference_count {method}"] for method in ("prefill", "decode")}
    # The prompt that joins a running stream may be computed in chunks.
    assert steps["prefill"] >= 12
    for method, num in steps.items():
        assert now[f"tgi_batch_inference_success {method}"] == num
        for name in ("inference", "forward", "decode", "filter"):
            assert now[f"tgi_batch_{name}_duration_count {method}"] == num
        parts = sum(now[f"tgi_batch_{name}_duration_sum {method}"] for name in ("forward", "decode"))
        assert 0 < parts < now[f"tgi_batch_inference_duration_sum {method}"]
    skipped = now["tgi_jump_forward_tokens"]
    assert skipped > 0
    assert now["tgi_request_skipped_tokens_sum"] == skipped
    assert now["tgi_request_skipped_tokens_count"] > 0
    assert now["tgi_inter_token_latency_seconds_count"] == now["tgi_generated_tokens"] - skipped - 12
    # 9 x 4 steps decode for the repeated prompt, one for the joining request beside those of the stream.
    assert steps["decode"] >= 9 * 4 + 1
    still = {name for name, value in now.items() if value == 0}
    assert still == {
        "tgi_request_failure template_error", "tgi_request_failure tool_error", "tgi_request_failure overloaded",
        "tgi_request_failure timeout", "tgi_request_failure healthcheck", "tgi_request_failure generation",
        "tgi_batch_inference_failure prefill", "tgi_batch_inference_failure decode", "tgi_batch_concat backpressure",
        "tgi_batch_concat wait_exceeded", "tgi_guessed_tokens", "tgi_guessed_tokens_right",
        "tgi_preemptions", "tgi_engine_restarts", "tgi_queue_size",
        "tgi_batch_current_size", "tgi_batch_current_max_tokens", "tgi_batch_max_total_tokens",
        "tgi_kv_cache_usage_ratio", "tgi_engine_ready",
    }  # fmt: skip


def test_gauges_follow_what_runs(server: RunningServer, wire: Wire) -> None:
    wait_until_idle(server)
    sampling = {"max_new_tokens": 900, "ignore_eos_token": True}
    calls = [wire.open(text_input=f"Tale {i}:", stream=True, sampling_parameters=sampling) for i in range(3)]
    for call in calls:
        next(call)
    wait_until(lambda: server.metric("tgi_batch_current_size") == 3, "three run")
    assert 0 < server.metric("tgi_kv_cache_usage_ratio") < 1
    assert is_progressing(server.metrics_url, within_s=60), "a probe that sees this asks for no token of its own"
    assert 3 * 900 < server.metric("tgi_batch_current_max_tokens") < 3 * 960
    for call in calls:
        call.cancel()
    wait_until_idle(server)
    assert not is_progressing(server.metrics_url)
    assert not is_progressing(server.metrics_url.replace("metrics", "elsewhere"))


def test_triton_counts_its_own(server: RunningServer, wire: Wire) -> None:
    before = server.metric("nv_inference_request_success", model="tokenizer")
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    assert wire.ask(messages=messages, sampling_parameters={"max_new_tokens": 1}).errors == []
    wait_until(lambda: server.metric("nv_inference_request_success", model="tokenizer") > before, "tokenizer asked")


def test_the_page_of_the_documentation_is_current() -> None:
    page = generate_metric_docs.PAGE.read_text(encoding="utf-8")
    assert page == generate_metric_docs.render(), "run python scripts/generate_metric_docs.py"
