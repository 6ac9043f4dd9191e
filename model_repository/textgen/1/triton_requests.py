"""A Triton request to a `GenerationRequest`: its inputs and parameters, read and checked before anything is queued.

In two steps, since the prompt may need the tokenizer: `parse_request` reads everything that the client sent,
`build_request` puts the prompt's ids to it. Functions without state; what is wrong is raised as one of our errors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import triton_python_backend_utils as pb_utils
from triton_responses import ResponseOptions
from triton_tensors import read_flag, read_strings, read_text

from textgen_engine.config import GrammarConfig
from textgen_engine.errors import (
    EngineError,
    GrammarError,
    InvalidParameter,
    PromptTooLong,
    ToolError,
    Unsupported,
)
from textgen_engine.grammar.base import GrammarSpec, grammar_limits
from textgen_engine.grammar.check import GrammarVerdict
from textgen_engine.grammar.parse import parse_grammar
from textgen_engine.messages import EngineInfo
from textgen_engine.parameters import ParameterLimits, RequestParameters, parse_parameters
from textgen_engine.request import GenerationRequest

PROMPT_FORMS = ("text_input", "messages", "input_ids")
_FLAGS = (
    "stream", "exclude_input_in_output", "return_finish_reason", "return_num_input_tokens",
    "return_num_output_tokens", "return_logprobs", "cancel",
)  # fmt: skip
# Request parameters that belong to Triton or its clients and say nothing about generation.
_FOREIGN_PARAMETERS = frozenset({"sequence_id", "sequence_start", "sequence_end", "binary_data_output"})
# W3C's names of the trace that a request is part of. Triton makes parameters of the headers that it is told to forward.
_TRACE_CONTEXT = ("traceparent", "tracestate")


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


# ---- what a request is about ---------------------------------------------------------------------------------------


def is_cancel_request(request: Any) -> bool:
    """True for a request whose `cancel` input is true. Raises InvalidParameter for a malformed one."""
    return read_flag(request, "cancel") is True


def is_info_request(request: Any) -> bool:
    """True for a request whose `model_info` input is true: it asks what is served. Raises InvalidParameter."""
    return read_flag(request, "model_info") is True


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
        return found or _context_of(json.loads(read_text(request, "sampling_parameters") or "{}"))
    except (ValueError, RecursionError, EngineError):
        return {}


def _context_of(given: Any) -> dict[str, str]:
    if not isinstance(given, dict):
        return {}
    return {name: given[name] for name in _TRACE_CONTEXT if isinstance(given.get(name), str)}


# ---- reading -------------------------------------------------------------------------------------------------------


def parse_request(
    request: Any, *, limits: ParameterLimits, vocab_size: int, grammar_config: GrammarConfig
) -> ParsedRequest:
    """Read every input and parameter. Raises RequestError naming what is wrong."""
    flags = {name: read_flag(request, name) for name in _FLAGS}
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
        prompt_text=read_text(request, "prompt_text"),
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
    _refuse_prompt(request, "grammar_check")
    grammar, refusal = None, None
    try:
        grammar = _grammar_spec(parameters, config)
    except (GrammarError, ToolError, Unsupported) as error:
        refusal = GrammarVerdict(False, error=error.message)
    if grammar is None and refusal is None:
        raise InvalidParameter("`grammar_check` needs a grammar (`grammar`, `response_format` or `tools`); given: none")
    return _without_prompt(parameters, given_parameters, stream=stream, grammar=grammar, grammar_refusal=refusal)


def _parse_adapter_command(
    request: Any, parameters: RequestParameters, given_parameters: dict[str, Any], *, stream: bool
) -> ParsedRequest:
    _refuse_prompt(request, "adapter_command")
    return _without_prompt(parameters, given_parameters, stream=stream)


def _without_prompt(
    parameters: RequestParameters,
    given_parameters: dict[str, Any],
    *,
    stream: bool,
    grammar: GrammarSpec | None = None,
    grammar_refusal: GrammarVerdict | None = None,
) -> ParsedRequest:
    return ParsedRequest(
        prompt_form=None,
        input_ids=[],
        prompt_text=None,
        parameters=parameters,
        grammar=grammar,
        grammar_refusal=grammar_refusal,
        given_parameters=given_parameters,
        options=ResponseOptions(stream=stream),
    )


def _refuse_prompt(request: Any, name: str) -> None:
    forms = _given_forms(request)
    if forms:
        raise InvalidParameter(f"`{name}` takes no prompt; given: {' and '.join(forms)}")


def _given_forms(request: Any) -> list[str]:
    return [name for name in PROMPT_FORMS if pb_utils.get_input_tensor_by_name(request, name) is not None]


def _prompt_form(request: Any) -> str:
    given = _given_forms(request)
    if len(given) != 1:
        what = "none was" if not given else " and ".join(given) + " were"
        raise InvalidParameter(f"exactly one of text_input, messages and input_ids must be given; {what} given")
    return given[0]


def _input_ids(request: Any) -> list[int]:
    ids: list[int] = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy().reshape(-1).tolist()
    if not ids:
        raise InvalidParameter("`input_ids` must have at least one token; given: none")
    return ids


def _given_parameters(request: Any) -> dict[str, Any]:
    """Scalar request parameters, the `sampling_parameters` JSON and the `stop` input as one mapping."""
    given: dict[str, Any] = {}
    text = read_text(request, "sampling_parameters")
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
    stop = read_strings(request, "stop")
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


# ---- the engine's request ------------------------------------------------------------------------------------------


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
