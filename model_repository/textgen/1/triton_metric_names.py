"""Every metric that `textgen` publishes: its name, type, label, buckets and one sentence.

Names, types and labels are those of Text Generation Inference (TGI) where it has the metric; the others begin with
`tgi_` as well, so that one pattern finds all. docs/metrics.md is generated from this table. Knows nothing of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Buckets = Literal["seconds", "input_tokens", "total_tokens", "sizes"]

# TGI's: 35, geometric, from 0.15 ms on.
SECONDS = tuple(0.00015 * 1.5**k for k in range(35))
# TGI has one for each size up to 1024, a thousand lines on every scrape.
SIZES = tuple(float(2**k) for k in range(11))


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. Every series has the labels `model` and `version`; label and values: one label more, each value of
    which is shown from the start. per_adapter: also `adapter`, for requests that named one and were answered.
    in_tgi: TGI has it."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    label: str = ""
    values: tuple[str, ...] = ()
    buckets: Buckets | None = None
    per_adapter: bool = False
    in_tgi: bool = True


def buckets(family: Family, *, max_input_tokens: int, max_total_tokens: int) -> list[float]:
    """Upper bounds of a histogram's buckets; Triton adds the infinite one."""
    if family.buckets == "seconds":
        return list(SECONDS)
    if family.buckets == "sizes":
        return list(SIZES)
    top = max_input_tokens if family.buckets == "input_tokens" else max_total_tokens
    return [top * k / 100 for k in range(1, 101)]


# The public types of errors.py: values of tgi_request_failure's label `err`.
_FAILURES = (
    "validation", "template_error", "tool_error", "overloaded", "timeout", "cancelled", "healthcheck", "generation"
)  # fmt: skip
# A step that computes any prompt's tokens is a prefill, even where others decode in it.
_METHODS = ("prefill", "decode")


def _counter(
    text: str, label: str = "", values: tuple[str, ...] = (), *, per_adapter: bool = False, in_tgi: bool = True
) -> Family:
    return Family("counter", text, label, values, per_adapter=per_adapter, in_tgi=in_tgi)


def _gauge(text: str, *, in_tgi: bool = True) -> Family:
    return Family("gauge", text, in_tgi=in_tgi)


def _seconds(
    text: str, label: str = "", values: tuple[str, ...] = (), *, per_adapter: bool = False, in_tgi: bool = True
) -> Family:
    return Family("histogram", text, label, values, "seconds", per_adapter=per_adapter, in_tgi=in_tgi)


FAMILIES: dict[str, Family] = {
    # Requests.
    "tgi_request_count": _counter("Requests received"),
    "tgi_request_success": _counter("Requests answered in full", per_adapter=True),
    "tgi_request_failure": _counter("Requests that failed, by reason", "err", _FAILURES),
    "tgi_request_duration": _seconds("Arrival to last token", per_adapter=True),
    "tgi_request_validation_duration": _seconds("Arrival to submission: reading, checking, tokenizing"),
    "tgi_request_queue_duration": _seconds("Arrival to first step"),
    "tgi_request_inference_duration": _seconds("First step to last token", per_adapter=True),
    "tgi_request_mean_time_per_token_duration": _seconds("Inference time by generated tokens", per_adapter=True),
    "tgi_request_input_length": Family(
        "histogram", "Prompt tokens of a request", buckets="input_tokens", per_adapter=True
    ),
    "tgi_request_generated_tokens": Family(
        "histogram", "Generated tokens of a request", buckets="total_tokens", per_adapter=True
    ),
    "tgi_request_max_new_tokens": Family(
        "histogram", "Tokens that a request may generate, when it is queued", buckets="total_tokens"
    ),
    "tgi_request_skipped_tokens": Family(
        "histogram",
        "Tokens that a step appended without a forward pass of their own, where there were any",
        buckets="sizes",
    ),
    # What clients feel.
    "tgi_time_to_first_token_seconds": _seconds("Arrival to first token", in_tgi=False),
    "tgi_inter_token_latency_seconds": _seconds("Gap between two tokens of a choice", in_tgi=False),
    # What runs and waits.
    "tgi_queue_size": _gauge("Requests waiting"),
    "tgi_batch_current_size": _gauge("Requests running"),
    "tgi_batch_current_max_tokens": _gauge("Tokens that the running requests have at most, when they end"),
    "tgi_batch_max_total_tokens": _gauge("Tokens that the KV cache holds"),
    "tgi_kv_cache_usage_ratio": _gauge("Share of the KV cache in use by running requests", in_tgi=False),
    "tgi_engine_ready": _gauge("1 while the engine can take requests, else 0", in_tgi=False),
    # Steps of the engine.
    "tgi_batch_inference_count": _counter("Steps of the engine", "method", _METHODS),
    "tgi_batch_inference_success": _counter("Steps that succeeded", "method", _METHODS),
    "tgi_batch_inference_failure": _counter(
        "Steps in which a request failed by the server's fault", "method", _METHODS
    ),
    "tgi_batch_inference_duration": _seconds("One step, whole", "method", _METHODS),
    "tgi_batch_forward_duration": _seconds("Forward pass and sampling, until the tokens are read", "method", _METHODS),
    "tgi_batch_decode_duration": _seconds("Tokens to text, and checks whether it ends", "method", _METHODS),
    "tgi_batch_filter_duration": _seconds("Handing a step's tokens to the sender", "method", _METHODS),
    "tgi_batch_next_size": Family("histogram", "Requests that a step started, where any", buckets="sizes"),
    "tgi_batch_concat": _counter(
        "Steps that started requests beside running ones: at once (chunking), because enough waited (backpressure), "
        "or long enough (wait_exceeded)",
        "reason",
        ("chunking", "backpressure", "wait_exceeded"),
    ),
    "tgi_batch_concat_duration": _seconds("Putting such a step's batch together", "method", ("decode",)),
    # Tokens.
    "tgi_generated_tokens": _counter("Tokens generated", in_tgi=False),
    "tgi_jump_forward_tokens": _counter(
        "Of these, tokens that a grammar forced and that took no forward pass of their own", in_tgi=False
    ),
    "tgi_guessed_tokens": _counter("Tokens guessed ahead (SPECULATE) and verified", in_tgi=False),
    "tgi_guessed_tokens_right": _counter(
        "Of these, tokens that came true, and took no forward pass of their own", in_tgi=False
    ),
    "tgi_prefill_tokens": _counter("Prompt tokens computed", in_tgi=False),
    "tgi_prefix_cache_hit_tokens": _counter("Prompt tokens found in the prefix cache", in_tgi=False),
    "tgi_preemptions": _counter("Sequences preempted for want of KV blocks", in_tgi=False),
    "tgi_grammar_compile_seconds": _seconds("Compilation of one grammar, where it was not cached", in_tgi=False),
    "tgi_engine_restarts": _counter("Restarts of the engine process", in_tgi=False),
}
