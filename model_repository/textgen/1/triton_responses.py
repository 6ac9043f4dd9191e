"""The engine's outputs and errors to Triton's responses, and the calls that send them.

What a response of tokens carries, `ResponseOptions` says. Functions without state.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from triton_tensors import text_tensor

from textgen_engine.config import EngineConfig
from textgen_engine.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    NotReady,
    Overloaded,
    RequestError,
    Unsupported,
)
from textgen_engine.messages import EngineInfo
from textgen_engine.request import Timings, TokenDetail, TokenOutput


@dataclass(frozen=True)
class ResponseOptions:
    """Which tensors a request's responses carry, and how its text begins."""

    stream: bool = False
    return_full_text: bool = False
    finish_reason: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    logprobs: bool = False
    details: bool = False
    num_choices: int = 1


@dataclass(frozen=True)
class ChoiceNews:
    """What one response says of one choice. output None: nothing new. num_tokens: generated so far, this included."""

    output: TokenOutput | None
    num_tokens: int
    finish_reason: str | None


# ---- responses -----------------------------------------------------------------------------------------------------


def output_response(
    options: ResponseOptions, news: Sequence[ChoiceNews], *, prompt_prefix: str, others: Sequence[TokenOutput],
    validation_s: float,
) -> Any:  # fmt: skip
    """One response with what is new for each choice.

    prompt_prefix: put before every choice's text (return_full_text, on the first response). others: candidates that
    best_of did not pick, for the details. validation_s: how long the request was checked before it was queued.
    """
    outputs = [item.output for item in news]
    texts = [prompt_prefix + (output.text if output is not None else "") for output in outputs]
    tensors = [text_tensor("text_output", texts)]
    if options.finish_reason:
        tensors.append(text_tensor("finish_reason", [item.finish_reason or "None" for item in news]))
    if options.num_input_tokens:
        num_input = max((output.num_prompt_tokens for output in outputs if output is not None), default=0)
        tensors.append(pb_utils.Tensor("num_input_tokens", np.array([num_input], dtype=np.uint32)))
    if options.num_output_tokens:
        counts = [len(output.token_ids) if output is not None else 0 for output in outputs]
        tensors.append(pb_utils.Tensor("num_output_tokens", np.array(counts, dtype=np.uint32)))
    if options.logprobs:
        tensors.append(text_tensor("logprobs", [_vllm_logprobs(output) for output in outputs]))
    warnings = [warning for output in outputs if output is not None for warning in output.warnings]
    if options.details or warnings:  # what the client should know comes unasked
        details = _details(news, others, validation_s) if options.details else {"warnings": warnings}
        tensors.append(text_tensor("details", [json.dumps(details, ensure_ascii=False)]))
    return pb_utils.InferenceResponse(tensors)


def text_response(text: str) -> Any:
    """A response with text alone."""
    return pb_utils.InferenceResponse([text_tensor("text_output", [text])])


def info_response(config: EngineConfig, info: EngineInfo) -> Any:
    """The answer to a request for `model_info`: what is served and its limits, as JSON text."""
    limits = config.limits
    told = {
        "model_id": config.model.model_id,
        "device": config.model.device,
        "max_concurrent_requests": limits.max_concurrent_requests,
        "max_best_of": limits.max_best_of,
        "max_stop_sequences": limits.max_stop_sequences,
        "max_top_n_tokens": limits.max_top_n_tokens,
        "max_input_tokens": info.max_input_tokens,
        "max_total_tokens": info.max_total_tokens,
    }
    return text_response(json.dumps(told, ensure_ascii=False))


def keep_alive_response() -> Any:
    """A response without tensors: it only makes the server write to the client's socket."""
    return pb_utils.InferenceResponse([])


def error_response(error: EngineError) -> Any:
    """The error as Triton carries it: a code, and our public text."""
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), _triton_code(error)))


def _triton_code(error: EngineError) -> Any:
    codes = pb_utils.TritonError
    if isinstance(error, Unsupported):
        return codes.UNSUPPORTED
    if isinstance(error, RequestError):
        return codes.INVALID_ARG
    if isinstance(error, (Overloaded, NotReady)):
        return codes.UNAVAILABLE
    if isinstance(error, (DeadlineExceeded, Cancelled)):
        return codes.CANCELLED
    return codes.INTERNAL


# ---- sending -------------------------------------------------------------------------------------------------------


def send(sender: Any, response: Any, *, final: bool) -> None:
    """Send one response; `final` puts the final flag on it."""
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


def send_final_flag(sender: Any) -> None:
    """The final flag alone, for when no response could be built or sent."""
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


# ---- details and log-probabilities, as JSON ------------------------------------------------------------------------


def _details(news: Sequence[ChoiceNews], others: Sequence[TokenOutput], validation_s: float) -> dict[str, Any]:
    """TGI's details of the first choice. Ours beside them: `choices` with those of all choices when there are several,
    and the timings that TGI gives as headers. A stream's responses each carry the new tokens alone; the last one adds
    the rest."""
    details = _choice_details(news[0].output, news[0].num_tokens, validation_s)
    if len(news) > 1:
        details["choices"] = [_choice_details(item.output, item.num_tokens, validation_s) for item in news]
    if others:
        details["best_of_sequences"] = [
            {"generated_text": other.text, **_choice_details(other, len(other.token_ids), validation_s)}
            for other in others
        ]
    return details


def _choice_details(output: TokenOutput | None, num_tokens: int, validation_s: float) -> dict[str, Any]:
    if output is None:
        return {"tokens": []}
    details: dict[str, Any] = {}
    if output.finish_reason is not None:
        details["finish_reason"] = output.finish_reason.value
        details["generated_tokens"] = num_tokens
        details["seed"] = output.seed
        details["input_length"] = output.num_prompt_tokens
        details["cached_tokens"] = output.num_cached_tokens
        if output.num_guessed_tokens:
            details["guessed_tokens"] = output.num_guessed_tokens
            details["guessed_right"] = output.num_guessed_right
    if output.prompt_details is not None or output.finish_reason is not None:
        details["prefill"] = [
            {"id": detail.id, "text": detail.text, "logprob": _finite(detail.logprob)}
            for detail in output.prompt_details or ()
        ]
    details["tokens"] = [_token_json(detail) for detail in output.details]
    if any(detail.top for detail in output.details):
        details["top_tokens"] = [[_token_json(top) for top in detail.top] for detail in output.details]
    if output.warnings:
        details["warnings"] = list(output.warnings)
    if output.timings is not None:
        details["timings"] = _timings(output.timings, num_tokens, validation_s)
    return details


def _token_json(detail: TokenDetail) -> dict[str, Any]:
    return {"id": detail.id, "text": detail.text, "logprob": _finite(detail.logprob), "special": detail.special}


def _timings(timings: Timings, num_tokens: int, validation_s: float) -> dict[str, float]:
    """Seconds, under the names of TGI's headers."""
    arrival_s, finished_s = timings.arrival_s, timings.finished_s
    assert finished_s is not None
    scheduled_s = finished_s if timings.scheduled_s is None else timings.scheduled_s
    inference_s = finished_s - scheduled_s
    return {
        "total_time": finished_s - arrival_s,
        "validation_time": validation_s,
        "queue_time": max(scheduled_s - arrival_s - validation_s, 0.0),
        "inference_time": inference_s,
        "time_per_token": inference_s / max(num_tokens, 1),
    }


def _vllm_logprobs(output: TokenOutput | None) -> str:
    """The new tokens as the vLLM backend reports them: [{token_id: {logprob, rank, decoded_token}}]."""
    entries = []
    for detail in output.details if output is not None else ():
        candidates = {detail.id: detail, **{top.id: top for top in detail.top}}
        ranks = {top.id: rank for rank, top in enumerate(detail.top, start=1)}
        entries.append(
            {
                str(token_id): {
                    "logprob": _finite(candidate.logprob),
                    "rank": ranks.get(token_id),
                    "decoded_token": candidate.text,
                }
                for token_id, candidate in candidates.items()
            }
        )
    return json.dumps(entries, ensure_ascii=False)


def _finite(value: float | None) -> float | None:
    return value if value is not None and value > float("-inf") else None  # JSON has no infinities
