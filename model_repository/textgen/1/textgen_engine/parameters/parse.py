"""A request's given parameters -> `RequestParameters`: names looked up, values read, combinations checked, once.

Nothing is ignored: an unknown name is refused, with the nearest known one. null means "not given". What a combination
means (does it sample, how many candidates) is decided here; docs/differences.md lists where TGI decides otherwise.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from textgen_engine.adapters.spec import AdapterCommand
from textgen_engine.errors import InvalidParameter, Unsupported
from textgen_engine.parameters.table import BY_NAME
from textgen_engine.parameters.values import Context, ParameterLimits
from textgen_engine.request import GrammarCheck, OutputParams, StoppingParams
from textgen_engine.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestParameters:
    """Everything a request asked beside its prompt.

    sampling, stopping, output, n, best_of, priority: go into `GenerationRequest` as they are, except that the ids of
    `bad_words` (strings) are still missing from `sampling.bad_words`; the tokenizer knows them.
    timeout_s: seconds from arrival. truncate: keep the last so many prompt tokens. The fields that are None were not
    given. grammar, response_format, tools and tool_choice are the client's JSON values, checked where they are used.
    """

    sampling: SamplingParams
    stopping: StoppingParams
    output: OutputParams
    n: int = 1
    best_of: int = 1
    priority: int = 0
    timeout_s: float | None = None
    truncate: int | None = None
    return_full_text: bool = False
    details: bool = False
    decoder_input_details: bool = False
    bad_words: tuple[str, ...] = ()
    adapter_id: str | None = None
    adapter_command: AdapterCommand | None = None
    grammar: Mapping[str, Any] | None = None
    grammar_backend: str | None = None
    grammar_whitespace: str | None = None
    grammar_property_order: str | None = None
    grammar_lenient: bool | None = None
    grammar_check: GrammarCheck | None = None
    response_format: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = False
    tool_prompt: str | None = None
    chat_template: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    trace_tokens: bool = False


def parse_parameters(
    given: Mapping[str, Any], *, limits: ParameterLimits, stream: bool, vocab_size: int | None
) -> RequestParameters:
    """Read a request's parameters.

    given: name -> JSON value (what `json.loads` returns), null meaning "not given". vocab_size: bound of token ids,
    None where it is not known. Draws a seed from the operating system when the request samples without one.
    Raises InvalidParameter, and Unsupported for what the server's options exclude.
    """
    values = _read_all(given, Context(limits, vocab_size))
    _check_together(values, limits, stream)
    samples = _samples(values)
    n = values.get("n", 1)
    best_of = values.get("best_of", n)
    _check_choices(values, n, best_of, samples, stream)

    details = values.get("details", False)
    decoder_input_details = values.get("decoder_input_details", False)
    top_n_tokens = _top_n_tokens(values)
    token_details = details or decoder_input_details
    return RequestParameters(
        sampling=SamplingParams(
            do_sample=samples,
            seed=values.get("seed", _draw_seed() if samples else None),
            temperature=values.get("temperature", 1.0),
            top_k=values.get("top_k", 0),
            top_p=values.get("top_p", 1.0),
            typical_p=values.get("typical_p", 1.0),
            min_p=values.get("min_p", 0.0),
            repetition_penalty=values.get("repetition_penalty", 1.0),
            frequency_penalty=values.get("frequency_penalty", 0.0),
            presence_penalty=values.get("presence_penalty", 0.0),
            logit_bias=values.get("logit_bias", ()),
            allowed_token_ids=values.get("allowed_token_ids"),
            bad_words=values.get("bad_words_ids", ()),
            watermark=values.get("watermark", False),
        ),
        stopping=StoppingParams(
            max_new_tokens=values.get("max_new_tokens"),
            min_new_tokens=values.get("min_new_tokens", 0),
            stop=values.get("stop", ()),
            stop_token_ids=values.get("stop_token_ids", ()),
            ignore_eos_token=values.get("ignore_eos_token", False),
            include_stop_str_in_output=values.get("include_stop_str_in_output", False),
        ),
        output=OutputParams(
            logprobs=token_details or top_n_tokens > 0 or values.get("logprobs", False) is not False,
            top_n_tokens=top_n_tokens,
            prompt_logprobs=decoder_input_details or values.get("prompt_logprobs", False),
            token_details=token_details,
            skip_special_tokens=values.get("skip_special_tokens", True),
        ),
        n=n,
        best_of=best_of,
        priority=values.get("priority", 0),
        timeout_s=values.get("timeout"),
        truncate=values.get("truncate"),
        return_full_text=values.get("return_full_text", False),
        details=details,
        decoder_input_details=decoder_input_details,
        bad_words=values.get("bad_words", ()),
        adapter_id=values.get("adapter_id"),
        adapter_command=values.get("adapter_command"),
        grammar=values.get("grammar"),
        grammar_backend=values.get("grammar_backend"),
        grammar_whitespace=values.get("grammar_whitespace"),
        grammar_property_order=values.get("grammar_property_order"),
        grammar_lenient=values.get("grammar_lenient"),
        grammar_check=values.get("grammar_check"),
        response_format=values.get("response_format"),
        tools=values.get("tools"),
        tool_choice=values.get("tool_choice"),
        parallel_tool_calls=values.get("parallel_tool_calls", False),
        tool_prompt=values.get("tool_prompt"),
        chat_template=values.get("chat_template"),
        add_generation_prompt=values.get("add_generation_prompt"),
        continue_final_message=values.get("continue_final_message"),
        add_special_tokens=values.get("add_special_tokens"),
        trace_tokens=values.get("trace_tokens", False),
    )


def _read_all(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Canonical name -> value read, for everything given that is not null."""
    values: dict[str, Any] = {}
    said_as: dict[str, str] = {}
    for name, value in given.items():
        parameter = BY_NAME.get(name)
        if parameter is None:
            raise InvalidParameter(_unknown(name))
        if value is None:
            continue
        read = parameter.reader.read(name, value, context)
        earlier = said_as.setdefault(parameter.name, name)
        if earlier != name and values[parameter.name] != read:
            raise InvalidParameter(
                f"`{earlier}` and `{name}` are the same parameter; given: {given[earlier]!r} and {value!r}"
            )
        values[parameter.name] = read
    return values


def _unknown(name: object) -> str:
    # A lone surrogate could not be sent back: what is no text is shown as its escape.
    shown = str(name).encode("utf-8", "backslashreplace").decode()
    shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
    nearest = difflib.get_close_matches(shown.lower(), BY_NAME, n=1)
    return f"unknown parameter `{shown}`" + (f"; did you mean `{nearest[0]}`?" if nearest else "")


def _samples(values: Mapping[str, Any]) -> bool:
    """TGI's rule (any filter or temperature means sampling), except that a temperature of 1.0 counts as well."""
    return bool(
        values.get("do_sample", False)
        or "temperature" in values
        or "top_k" in values
        or values.get("top_p", 1.0) < 1.0
        or values.get("typical_p", 1.0) < 1.0
        or values.get("min_p", 0.0) > 0.0
    )


def _check_choices(values: Mapping[str, Any], n: int, best_of: int, samples: bool, stream: bool) -> None:
    if best_of < n:
        raise InvalidParameter(f"`best_of` must be at least `n`, which is {n}; given: {best_of}")
    if n > 1 and not samples:
        raise InvalidParameter(f"`n` above 1 needs sampling (`do_sample: true`), or all texts are the same; given: {n}")
    if "best_of" in values and best_of > 1:
        if not samples:
            raise InvalidParameter(f"`best_of` above 1 needs sampling (`do_sample: true`); given: {best_of}")
        if "seed" in values:
            raise InvalidParameter(f"`best_of` above 1 cannot have a `seed`; given: {best_of} and {values['seed']}")
        if stream:
            raise InvalidParameter(f"`best_of` must be 1 on a stream; given: {best_of}")


def _check_together(values: Mapping[str, Any], limits: ParameterLimits, stream: bool) -> None:
    """Combinations that make no sense, beside those of `n` and `best_of`."""
    least, most = values.get("min_new_tokens", 0), values.get("max_new_tokens")
    if most is not None and least > most:
        raise InvalidParameter(f"`min_new_tokens` must be at most `max_new_tokens`, which is {most}; given: {least}")
    if limits.max_total_tokens is not None and least >= limits.max_total_tokens:
        allowed = f"below {limits.max_total_tokens} (max_total_tokens)"
        raise InvalidParameter.for_value("min_new_tokens", least, allowed)
    if stream and values.get("decoder_input_details", False):
        raise InvalidParameter("`decoder_input_details` must be false on a stream; given: true")
    for name in ("decoder_input_details", "prompt_logprobs"):
        if values.get(name, False) and not limits.enable_prefill_logprobs:
            raise Unsupported(f"`{name}` is off on this server (option `enable_prefill_logprobs`); given: true")
    if values.get("add_generation_prompt", False) and values.get("continue_final_message", False):
        raise InvalidParameter(
            "`add_generation_prompt` and `continue_final_message` exclude each other; given: true and true"
        )


def _top_n_tokens(values: Mapping[str, Any]) -> int:
    """top_n_tokens, or the count that `logprobs` carries; both must agree."""
    logprobs = values.get("logprobs", False)
    top_n_tokens: int | None = values.get("top_n_tokens")
    if isinstance(logprobs, bool):
        return top_n_tokens or 0
    if top_n_tokens not in (None, logprobs):
        raise InvalidParameter(
            f"`logprobs` as a number is the same as `top_n_tokens`; given: {logprobs} and {top_n_tokens}"
        )
    return int(logprobs)


def _draw_seed() -> int:
    return int.from_bytes(os.urandom(8), "little")
