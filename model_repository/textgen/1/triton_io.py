"""Triton tensors and parameters to `GenerationRequest`; `TokenOutput` to responses; our errors to Triton's.

With model.py the only file that imports `triton_python_backend_utils`. Functions without state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from textgen_engine.config import EngineConfig, GrammarConfig
from textgen_engine.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    GrammarError,
    InvalidParameter,
    NotReady,
    Overloaded,
    PromptTooLong,
    RequestError,
    TemplateError,
    ToolError,
    Unsupported,
)
from textgen_engine.grammar.base import GrammarSpec, grammar_limits
from textgen_engine.grammar.check import GrammarVerdict
from textgen_engine.grammar.parse import parse_grammar
from textgen_engine.messages import EngineInfo
from textgen_engine.parameters import ParameterLimits, RequestParameters, parse_parameters
from textgen_engine.request import GenerationRequest, Timings, TokenDetail, TokenOutput

PROMPT_FORMS = ("text_input", "messages", "input_ids")

_FLAGS = (
    "stream", "exclude_input_in_output", "return_finish_reason", "return_num_input_tokens",
    "return_num_output_tokens", "return_logprobs", "cancel",
)  # fmt: skip

# Request parameters that belong to Triton or its clients and say nothing about generation.
_DEAD_STUB = re.compile(r"Stub process '\w+' is not healthy")
_FOREIGN_PARAMETERS = frozenset({"sequence_id", "sequence_start", "sequence_end", "binary_data_output"})
# W3C's names of the trace that a request is part of. Triton makes parameters of the headers that it is told to forward.
_TRACE_CONTEXT = ("traceparent", "tracestate")


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
class ParsedRequest:
    """A Triton request, read and checked as far as that goes without the tokenizer.

    prompt_form: which of PROMPT_FORMS is given; None for a grammar check and for an adapter command, which have no
    prompt (and empty input_ids).
    input_ids, prompt_text: given ones. grammar_refusal: a grammar check's answer, where the grammar is refused here.
    given_parameters: sampling parameters as given, for the tokenizer model.
    """

    prompt_form: str | None
    input_ids: list[int] | None
    prompt_text: str | None
    parameters: RequestParameters
    grammar: GrammarSpec | None
    grammar_refusal: GrammarVerdict | None
    given_parameters: dict[str, Any]
    options: ResponseOptions


@dataclass(frozen=True)
class ChoiceNews:
    """What one response says of one choice. output None: nothing new. num_tokens: generated so far, this included."""

    output: TokenOutput | None
    num_tokens: int
    finish_reason: str | None


# ---- requests ------------------------------------------------------------------------------------------------------


def is_cancel_request(request: Any) -> bool:
    """True for a request whose `cancel` input is true. Raises InvalidParameter for a malformed one."""
    return _flag(request, "cancel") is True


def trace_context(request: Any) -> dict[str, str]:
    """The trace that the request is part of; empty where it is part of none.

    Triton's own span, where Triton traces the request; else what came as a header or as a parameter. Never raises: who
    sends nonsense is told so by `parse_request`.
    """
    try:
        of_triton = request.trace().get_context()
        if of_triton:
            return _context_of(json.loads(of_triton))
        found = _context_of(json.loads(request.parameters() or "{}"))
        return found or _context_of(json.loads(_text(request, "sampling_parameters") or "{}"))
    except (ValueError, RecursionError, EngineError):
        return {}


def _context_of(given: Any) -> dict[str, str]:
    if not isinstance(given, dict):
        return {}
    return {name: given[name] for name in _TRACE_CONTEXT if isinstance(given.get(name), str)}


def is_info_request(request: Any) -> bool:
    """True for a request whose `model_info` input is true: it asks what is served. Raises InvalidParameter."""
    return _flag(request, "model_info") is True


def parse_request(
    request: Any, *, limits: ParameterLimits, vocab_size: int, grammar_config: GrammarConfig
) -> ParsedRequest:
    """Read every input and parameter. Raises RequestError naming what is wrong."""
    flags = {name: _flag(request, name) for name in _FLAGS}
    stream = flags["stream"] or False
    given_parameters = _given_parameters(request)
    parameters = parse_parameters(given_parameters, limits=limits, stream=stream, vocab_size=vocab_size)
    if parameters.adapter_command is not None:
        return _parse_adapter_command(request, parameters, given_parameters, stream=stream)
    if parameters.grammar_check is not None:
        return _parse_grammar_check(request, parameters, given_parameters, grammar_config, stream=stream)
    prompt_form = _prompt_form(request)
    grammar = _grammar_spec(parameters, grammar_config)
    full_text = parameters.return_full_text
    if flags["exclude_input_in_output"] is not None:
        wanted = not flags["exclude_input_in_output"]
        if full_text and not wanted:
            raise InvalidParameter(
                "`exclude_input_in_output` and `return_full_text` exclude each other; both given: true"
            )
        full_text = wanted
    options = ResponseOptions(
        stream=stream,
        return_full_text=full_text,
        finish_reason=flags["return_finish_reason"] or False,
        num_input_tokens=flags["return_num_input_tokens"] or False,
        num_output_tokens=flags["return_num_output_tokens"] or False,
        logprobs=flags["return_logprobs"] or (parameters.output.logprobs and not parameters.output.token_details),
        details=parameters.details or parameters.output.prompt_logprobs,
        num_choices=parameters.n,
    )
    if options.logprobs:
        parameters = replace(parameters, output=replace(parameters.output, logprobs=True))
    return ParsedRequest(
        prompt_form=prompt_form,
        input_ids=_input_ids(request) if prompt_form == "input_ids" else None,
        prompt_text=_text(request, "prompt_text"),
        parameters=parameters,
        grammar=grammar,
        grammar_refusal=None,
        given_parameters=given_parameters,
        options=options,
    )


def _parse_grammar_check(
    request: Any,
    parameters: RequestParameters,
    given_parameters: dict[str, Any],
    config: GrammarConfig,
    *,
    stream: bool,
) -> ParsedRequest:
    """A request that only asks about its grammar. That the grammar cannot be had is then an answer, not an error."""
    forms = _given_forms(request)
    if forms:
        raise InvalidParameter(f"`grammar_check` takes no prompt; given: {' and '.join(forms)}")
    grammar, refusal = None, None
    try:
        grammar = _grammar_spec(parameters, config)
    except (GrammarError, ToolError, Unsupported) as error:
        refusal = GrammarVerdict(False, error=error.message)
    if grammar is None and refusal is None:
        raise InvalidParameter("`grammar_check` needs a grammar (`grammar`, `response_format` or `tools`); given: none")
    return ParsedRequest(
        prompt_form=None,
        input_ids=[],
        prompt_text=None,
        parameters=parameters,
        grammar=grammar,
        grammar_refusal=refusal,
        given_parameters=given_parameters,
        options=ResponseOptions(stream=stream),
    )


def _parse_adapter_command(
    request: Any, parameters: RequestParameters, given_parameters: dict[str, Any], *, stream: bool
) -> ParsedRequest:
    forms = _given_forms(request)
    if forms:
        raise InvalidParameter(f"`adapter_command` takes no prompt; given: {' and '.join(forms)}")
    return ParsedRequest(
        prompt_form=None,
        input_ids=[],
        prompt_text=None,
        parameters=parameters,
        grammar=None,
        grammar_refusal=None,
        given_parameters=given_parameters,
        options=ResponseOptions(stream=stream),
    )


def tokenizer_request(request: Any, parsed: ParsedRequest, version: int = -1) -> Any:
    """The BLS request that turns the prompt of a parsed request into ids. version: of the tokenizer; -1: the latest."""
    assert parsed.prompt_form is not None
    inputs = [pb_utils.get_input_tensor_by_name(request, parsed.prompt_form)]
    if parsed.given_parameters:
        inputs.append(_string_tensor("sampling_parameters", [json.dumps(parsed.given_parameters)]))
    return pb_utils.InferenceRequest(
        model_name="tokenizer",
        model_version=version,
        requested_output_names=["input_ids", "prompt_text"],
        inputs=inputs,
    )


def read_tokenizer_response(response: Any) -> tuple[list[int], str]:
    """Ids and prompt text. Raises the RequestError that the tokenizer's message stands for."""
    if response.has_error():
        raise error_from_text(response.error().message())
    ids = pb_utils.get_output_tensor_by_name(response, "input_ids").as_numpy()
    text = pb_utils.get_output_tensor_by_name(response, "prompt_text").as_numpy()
    return ids.reshape(-1).tolist(), text.reshape(-1)[0].decode()


def is_from_dead_stub(response: Any) -> bool:
    """Whether Triton itself answered, for a process of the model that has died."""
    return bool(response.has_error()) and _DEAD_STUB.search(response.error().message()) is not None


def error_from_text(text: str) -> EngineError:
    """The error whose public text this is; anything unknown is an EngineFailure of the tokenizer."""
    for kind in (TemplateError, ToolError, NotReady, Overloaded):
        if kind.prefix in text:
            return kind(text.split(kind.prefix + ": ", 1)[-1])
    if RequestError.prefix in text:
        return RequestError(text.split(RequestError.prefix + ": ", 1)[-1])
    return EngineError(f"the tokenizer failed: {text.splitlines()[0][:300] if text else 'no reason given'}")


def build_request(
    parsed: ParsedRequest, *, request_id: str, prompt_ids: Sequence[int], info: EngineInfo, arrival_s: float,
    timeout_s: float | None,
) -> GenerationRequest:  # fmt: skip
    """The engine's request. Raises PromptTooLong or InvalidParameter when the prompt does not fit."""
    parameters = parsed.parameters
    deadline_s = None if timeout_s is None else arrival_s + timeout_s
    if parameters.adapter_command is not None:
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=(),
            adapter_command=parameters.adapter_command,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
        )
    if parameters.grammar_check is not None:
        return GenerationRequest(
            request_id=request_id,
            prompt_token_ids=(),
            grammar=parsed.grammar,
            grammar_check=parameters.grammar_check,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
        )
    if not prompt_ids:
        raise InvalidParameter("the prompt is empty: at least one token is needed")
    for position, token_id in enumerate(prompt_ids):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidParameter(
                f"`input_ids` must be from 0 to {info.vocab_size - 1}; given: {token_id} at position {position}"
            )
    if parsed.input_ids is not None and parameters.truncate is not None:
        prompt_ids = prompt_ids[-parameters.truncate :]
    num_prompt = len(prompt_ids)
    if num_prompt > info.max_input_tokens:
        raise PromptTooLong(
            f"the prompt has {num_prompt} tokens; allowed are {info.max_input_tokens} (MAX_INPUT_TOKENS)"
        )
    max_new = parameters.stopping.max_new_tokens
    if max_new is not None and num_prompt + max_new > info.max_total_tokens:
        raise PromptTooLong(
            f"the prompt has {num_prompt} tokens and `max_new_tokens` is {max_new}; together allowed are "
            f"{info.max_total_tokens} (MAX_TOTAL_TOKENS)"
        )
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt_ids),
        sampling=parameters.sampling,
        stopping=parameters.stopping,
        output=parameters.output,
        n=parameters.n,
        best_of=parameters.best_of,
        bad_words=parameters.bad_words,
        grammar=parsed.grammar,
        adapter_id=parameters.adapter_id,
        stream=parsed.options.stream,
        priority=parameters.priority,
        arrival_s=arrival_s,
        deadline_s=deadline_s,
    )


def request_timeout_s(request: Any, parameters: RequestParameters, default_s: float | None) -> float | None:
    """Seconds from arrival: the smaller of Triton's own timeout (microseconds) and the parameter, else the default."""
    given = [parameters.timeout_s] if parameters.timeout_s is not None else []
    if request.timeout() > 0:
        given.append(request.timeout() / 1e6)
    return min(given) if given else default_s


def _given_forms(request: Any) -> list[str]:
    return [name for name in PROMPT_FORMS if pb_utils.get_input_tensor_by_name(request, name) is not None]


def _prompt_form(request: Any) -> str:
    given = _given_forms(request)
    if len(given) != 1:
        what = "none was" if not given else " and ".join(given) + " were"
        raise InvalidParameter(f"exactly one of text_input, messages and input_ids must be given; {what} given")
    return given[0]


def _given_parameters(request: Any) -> dict[str, Any]:
    """Scalar request parameters, the `sampling_parameters` JSON and the `stop` input as one mapping."""
    given: dict[str, Any] = {}
    text = _text(request, "sampling_parameters")
    if text is not None and text.strip():
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidParameter(f"`sampling_parameters` must be a JSON object; given: no JSON ({error})") from None
        if not isinstance(given, dict):
            raise InvalidParameter.for_value("sampling_parameters", given, "a JSON object")
    for name in _TRACE_CONTEXT:
        given.pop(name, None)
    scalars = json.loads(request.parameters() or "{}")
    for name, value in scalars.items():
        if name in _TRACE_CONTEXT or name in _FOREIGN_PARAMETERS or name.startswith("triton_"):
            continue
        if name in given and given[name] != value:
            raise InvalidParameter(
                f"`{name}` is given twice with different values: {given[name]!r} in sampling_parameters, "
                f"{value!r} as a request parameter"
            )
        given[name] = value
    stop = _strings(request, "stop")
    if stop is not None:
        if "stop" in given and given["stop"] not in (stop, stop[0] if len(stop) == 1 else None):
            raise InvalidParameter("`stop` is given twice with different values, as an input and as a parameter")
        given["stop"] = stop
    return given


def _grammar_spec(parameters: RequestParameters, config: GrammarConfig) -> GrammarSpec | None:
    """The one grammar among `grammar`, `response_format` and `tools`; None where the text is free."""
    forms: dict[str, Any] = {"grammar": parameters.grammar, "response_format": parameters.response_format}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) > 1:
        raise InvalidParameter("`grammar` and `response_format` exclude each other; given: both")
    value = forms[given[0]] if given else None
    if parameters.tools is not None:
        if value is not None:
            raise ToolError(f"`{given[0]}` and `tools` exclude each other; given: both")
        choice = "auto" if parameters.tool_choice is None else parameters.tool_choice
        # An empty list of tools asks for nothing, like no list at all.
        if parameters.tools or parameters.tool_choice is not None:
            several = {"parallel_tool_calls": True} if parameters.parallel_tool_calls else {}
            value = {"type": "tools", "value": {"tools": list(parameters.tools), "tool_choice": choice, **several}}
    elif parameters.tool_choice not in (None, "none", "auto"):
        raise ToolError(f"`tool_choice` {parameters.tool_choice!r:.100} needs `tools`; given: none")
    if value is None:
        return None
    if not config.enabled:
        raise Unsupported("grammars are off on this server (option `disable_grammar_support`)")
    return parse_grammar(
        value,
        limits=grammar_limits(config),
        default_backend=config.default_backend,
        backend=parameters.grammar_backend,
        whitespace=parameters.grammar_whitespace,
        property_order=parameters.grammar_property_order,
        lenient=parameters.grammar_lenient,
    )


def _flag(request: Any, name: str) -> bool | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy().reshape(-1)
    if len(values) != 1:
        raise InvalidParameter(f"`{name}` must have exactly one element; given: {len(values)}")
    return bool(values[0])


def _strings(request: Any, name: str) -> list[str] | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    strings = []
    for value in tensor.as_numpy().reshape(-1):
        try:
            strings.append(value.decode() if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            raise InvalidParameter(f"`{name}` must be UTF-8 text; byte {error.start} is not") from None
    return strings


def _text(request: Any, name: str) -> str | None:
    strings = _strings(request, name)
    if strings is None:
        return None
    if len(strings) != 1:
        raise InvalidParameter(f"`{name}` must have exactly one element; given: {len(strings)}")
    return strings[0]


def _input_ids(request: Any) -> list[int]:
    ids: list[int] = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy().reshape(-1).tolist()
    if not ids:
        raise InvalidParameter("`input_ids` must have at least one token; given: none")
    return ids


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
    tensors = [_string_tensor("text_output", texts)]
    if options.finish_reason:
        tensors.append(_string_tensor("finish_reason", [item.finish_reason or "None" for item in news]))
    if options.num_input_tokens:
        num_input = max((output.num_prompt_tokens for output in outputs if output is not None), default=0)
        tensors.append(pb_utils.Tensor("num_input_tokens", np.array([num_input], dtype=np.uint32)))
    if options.num_output_tokens:
        counts = [len(output.token_ids) if output is not None else 0 for output in outputs]
        tensors.append(pb_utils.Tensor("num_output_tokens", np.array(counts, dtype=np.uint32)))
    if options.logprobs:
        tensors.append(_string_tensor("logprobs", [_vllm_logprobs(output) for output in outputs]))
    warnings = [warning for output in outputs if output is not None for warning in output.warnings]
    if options.details or warnings:  # what the client should know comes unasked
        details = _details(news, others, validation_s) if options.details else {"warnings": warnings}
        tensors.append(_string_tensor("details", [json.dumps(details, ensure_ascii=False)]))
    return pb_utils.InferenceResponse(tensors)


def text_response(text: str) -> Any:
    """A response with text alone."""
    return pb_utils.InferenceResponse([_string_tensor("text_output", [text])])


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


def send(sender: Any, response: Any, *, final: bool) -> None:
    """Send one response; `final` puts the final flag on it."""
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


def send_final_flag(sender: Any) -> None:
    """The final flag alone, for when no response could be built or sent."""
    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


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


def _string_tensor(name: str, texts: Sequence[str]) -> Any:
    return pb_utils.Tensor(name, np.array([text.encode() for text in texts], dtype=np.object_))


def _token_json(detail: TokenDetail) -> dict[str, Any]:
    return {"id": detail.id, "text": detail.text, "logprob": _finite(detail.logprob), "special": detail.special}


def _finite(value: float | None) -> float | None:
    return value if value is not None and value > float("-inf") else None  # JSON has no infinities


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
