"""Names and JSON values of request parameters -> `RequestParameters`, all checked, once, before anything is queued.

Owns the table `PARAMETERS`: every name a client may send, its aliases, type, range and one sentence of documentation
(docs/parameters.md is generated from it). Names are those of Text Generation Inference (TGI) where it has one; what
OpenAI's API and vLLM call otherwise is an alias. Knows no tokenizer, no model and no Triton: strings stay strings.

Principles: nothing is ignored (an unknown name is refused, with the nearest known one), nothing is converted (a
number in a string is refused, and so is a boolean for a number), null means "not given", and a message names the
parameter, the value and the limit. docs/differences.md lists where TGI decides otherwise.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from textgen_engine.adapters.spec import AdapterCommand
from textgen_engine.errors import InvalidParameter, Unsupported
from textgen_engine.request import GrammarCheck, OutputParams, StoppingParams
from textgen_engine.sampling.params import SamplingParams

_INT32_MAX = 2**31 - 1
_UINT32_MAX = 2**32 - 1
_UINT64_MAX = 2**64 - 1
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ParameterLimits:
    """What one request may ask of this server; names and defaults of TGI's launcher options where it has them.

    max_input_tokens, max_total_tokens: None where not known yet; the length of a prompt is checked elsewhere.
    max_list_entries: of logit_bias, bad_words, bad_words_ids and stop_token_ids, which cost time in every step.
    max_checked_bytes: of the text of grammar_check, in UTF-8.
    """

    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    enable_prefill_logprobs: bool = True
    max_list_entries: int = 1024
    max_checked_bytes: int = 64 * 1024


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


@dataclass(frozen=True, slots=True)
class _Context:
    limits: ParameterLimits
    vocab_size: int | None


class Reader(Protocol):
    """How one kind of value is read."""

    def read(self, name: str, value: Any, context: _Context) -> Any:
        """The value in our form. Raises InvalidParameter."""

    def describe(self, limits: ParameterLimits | None) -> str:
        """What is allowed, as it follows "must be"; without limits, by the names of the limits."""


# Every step compares the end of each text with each phrase, so phrases are phrases and not documents.
_MAX_PHRASE_CHARS = 1000
_MAX_PHRASE_IDS = 64
_MAX_TEXT_CHARS = 65536

Bound = int | float | str | None  # a str names a field of ParameterLimits


def _resolve(bound: Bound, limits: ParameterLimits) -> int | float | None:
    return getattr(limits, bound) if isinstance(bound, str) else bound


def _show(bound: Bound, limits: ParameterLimits | None) -> str:
    if not isinstance(bound, str):
        return {_INT32_MAX: "2**31 - 1", _UINT32_MAX: "2**32 - 1", _UINT64_MAX: "2**64 - 1"}.get(bound, str(bound))  # type: ignore[arg-type]
    return f"`{bound}`" if limits is None else f"{getattr(limits, bound)} ({bound})"


def _check_unicode(name: str, text: str) -> None:
    """JSON can spell half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidParameter(
            f"`{name}` must be Unicode text; a lone surrogate is at position {error.start}"
        ) from None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or isinstance(value, float)


@dataclass(frozen=True, slots=True)
class Integer:
    """A JSON integer between two bounds, both included."""

    low: int
    high: Bound

    def read(self, name: str, value: Any, context: _Context) -> int:
        high = _resolve(self.high, context.limits)
        if not _is_integer(value) or value < self.low or (high is not None and value > high):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return int(value)

    def describe(self, limits: ParameterLimits | None) -> str:
        if limits is not None and _resolve(self.high, limits) is None:
            return f"an integer of {self.low} or more"
        return f"an integer between {self.low} and {_show(self.high, limits)}"


@dataclass(frozen=True, slots=True)
class Number:
    """A finite JSON number. above: excluded lower bound; low and high: included bounds. hint: follows the range."""

    above: float | None = None
    low: float | None = None
    high: float | None = None
    hint: str = ""

    def read(self, name: str, value: Any, context: _Context) -> float:
        # An integer may exceed every float, so it is compared before it is converted.
        good = (
            _is_number(value)
            and (_is_integer(value) or math.isfinite(value))
            and (self.above is None or value > self.above)
            and (self.low is None or value >= self.low)
            and (value <= self.high if self.high is not None else abs(value) <= 1e30)
        )
        if not good:
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return float(value)

    def describe(self, limits: ParameterLimits | None) -> str:
        if self.above is not None and self.high is not None:
            text = f"a number above {self.above:g} and at most {self.high:g}"
        elif self.above is not None:
            text = f"a number above {self.above:g}"
        else:
            assert self.low is not None and self.high is not None
            text = f"a number between {self.low:g} and {self.high:g}"
        return f"{text} {self.hint}".rstrip()


@dataclass(frozen=True, slots=True)
class Boolean:
    """true or false."""

    def read(self, name: str, value: Any, context: _Context) -> bool:
        if not isinstance(value, bool):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return value

    def describe(self, limits: ParameterLimits | None) -> str:
        return "true or false"


@dataclass(frozen=True, slots=True)
class BooleanOrInteger:
    """true, false, or a count; OpenAI's chat and completions routes use one name for both."""

    high: Bound

    def read(self, name: str, value: Any, context: _Context) -> bool | int:
        if isinstance(value, bool):
            return value
        high = _resolve(self.high, context.limits)
        if not _is_integer(value) or value < 0 or (high is not None and value > high):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return int(value)

    def describe(self, limits: ParameterLimits | None) -> str:
        return f"true, false or an integer between 0 and {_show(self.high, limits)}"


@dataclass(frozen=True, slots=True)
class Text:
    """A string; not the empty one."""

    def read(self, name: str, value: Any, context: _Context) -> str:
        if not isinstance(value, str) or not value or len(value) > _MAX_TEXT_CHARS:
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        _check_unicode(name, value)
        return value

    def describe(self, limits: ParameterLimits | None) -> str:
        return f"a string of 1 to {_MAX_TEXT_CHARS} characters"


@dataclass(frozen=True, slots=True)
class Texts:
    """A list of strings, none of them empty; one string stands for a list of one."""

    most: Bound

    def read(self, name: str, value: Any, context: _Context) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        _check_list(name, texts, self.most, self.describe(context.limits), context)
        for text in texts:
            if not isinstance(text, str) or not 0 < len(text) <= _MAX_PHRASE_CHARS:
                raise InvalidParameter.for_value(name, value, self.describe(context.limits))
            _check_unicode(name, text)
        return tuple(dict.fromkeys(texts))

    def describe(self, limits: ParameterLimits | None) -> str:
        most = _show(self.most, limits)
        return f"a string or a list of at most {most} strings, each of 1 to {_MAX_PHRASE_CHARS} characters"


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A list of token ids. most: how many at most, None for the vocabulary; empty: whether it may be empty."""

    most: Bound
    empty: bool = True

    def read(self, name: str, value: Any, context: _Context) -> tuple[int, ...]:
        allowed = self.describe(context.limits)
        _check_list(name, value, self.most, allowed, context)
        if not value and not self.empty:
            raise InvalidParameter.for_value(name, value, allowed)
        return tuple(dict.fromkeys(_token_id(name, token_id, context) for token_id in value))

    def describe(self, limits: ParameterLimits | None) -> str:
        count = "" if self.most is None else f"at most {_show(self.most, limits)} "
        return f"a list of {count}token ids" + ("" if self.empty else ", not empty")


@dataclass(frozen=True, slots=True)
class TokenIdSequences:
    """A list of lists of token ids."""

    most: Bound

    def read(self, name: str, value: Any, context: _Context) -> tuple[tuple[int, ...], ...]:
        _check_list(name, value, self.most, self.describe(context.limits), context)
        for ids in value:
            if not isinstance(ids, list | tuple) or not 0 < len(ids) <= _MAX_PHRASE_IDS:
                raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        sequences = (tuple(_token_id(name, token_id, context) for token_id in ids) for ids in value)
        return tuple(dict.fromkeys(sequences))

    def describe(self, limits: ParameterLimits | None) -> str:
        return f"a list of at most {_show(self.most, limits)} lists of 1 to {_MAX_PHRASE_IDS} token ids"


@dataclass(frozen=True, slots=True)
class Biases:
    """OpenAI's logit_bias: an object of token id (a string, as JSON keys are) -> bias between -100 and 100."""

    most: Bound

    def read(self, name: str, value: Any, context: _Context) -> tuple[tuple[int, float], ...]:
        allowed = self.describe(context.limits)
        most = _resolve(self.most, context.limits)
        if not isinstance(value, Mapping) or (most is not None and len(value) > most):
            raise InvalidParameter.for_value(name, value, allowed)
        biases: dict[int, float] = {}
        for key, bias in value.items():
            if isinstance(key, str) and _TOKEN_ID.fullmatch(key):
                key = int(key)
            token_id = _token_id(name, key, context)
            if not _is_number(bias) or not -100 <= bias <= 100:
                raise InvalidParameter.for_value(name, {str(key): bias}, allowed)
            biases[token_id] = float(bias)
        return tuple(sorted(biases.items()))

    def describe(self, limits: ParameterLimits | None) -> str:
        return f"an object of at most {_show(self.most, limits)} entries, token id to a bias between -100 and 100"


@dataclass(frozen=True, slots=True)
class Object:
    """A JSON object, kept as it is."""

    def read(self, name: str, value: Any, context: _Context) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return value

    def describe(self, limits: ParameterLimits | None) -> str:
        return "an object"


@dataclass(frozen=True, slots=True)
class Objects:
    """A list of JSON objects, kept as they are."""

    def read(self, name: str, value: Any, context: _Context) -> tuple[Mapping[str, Any], ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return tuple(value)

    def describe(self, limits: ParameterLimits | None) -> str:
        return "a list of objects"


@dataclass(frozen=True, slots=True)
class TextOrObject:
    """A string or a JSON object."""

    def read(self, name: str, value: Any, context: _Context) -> str | Mapping[str, Any]:
        if not (isinstance(value, str) and value) and not isinstance(value, Mapping):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return value

    def describe(self, limits: ParameterLimits | None) -> str:
        return "a string, not empty, or an object"


@dataclass(frozen=True, slots=True)
class Check:
    """true, or an object with a text; false is the same as not given."""

    def read(self, name: str, value: Any, context: _Context) -> GrammarCheck | None:
        allowed = self.describe(context.limits)
        if isinstance(value, bool):
            return GrammarCheck() if value else None
        text = value.get("text") if isinstance(value, Mapping) else None
        if not isinstance(text, str) or len(value) != 1:
            raise InvalidParameter.for_value(name, value, allowed)
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidParameter(f"`{name}`: the text has a lone surrogate at position {error.start}") from None
        if size > context.limits.max_checked_bytes:
            raise InvalidParameter(f"`{name}` must be {allowed}; given: {size} bytes")
        return GrammarCheck(text)

    def describe(self, limits: ParameterLimits | None) -> str:
        return f'true, false or an object {{"text": string}} of at most {_show("max_checked_bytes", limits)} bytes'


@dataclass(frozen=True, slots=True)
class Command:
    """An object that says what to do with the server's adapters."""

    def read(self, name: str, value: Any, context: _Context) -> AdapterCommand:
        fields = dict(value) if isinstance(value, Mapping) else {}
        action, adapter, path = (fields.pop(field, None) for field in ("action", "name", "path"))
        is_named = isinstance(adapter, str) and len(adapter) > 0
        if (
            fields
            or action not in ("list", "load", "unload")
            or (is_named if action == "list" else not is_named)
            or not (path is None or (action == "load" and isinstance(path, str) and path))
        ):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return AdapterCommand(action, adapter, path)

    def describe(self, limits: ParameterLimits | None) -> str:
        return (
            'an object: {"action": "list"}, {"action": "load", "name": string, "path": string (may be left out)} '
            'or {"action": "unload", "name": string}'
        )


def _check_list(name: str, value: Any, most: Bound, allowed: str, context: _Context) -> None:
    limit = _resolve(most, context.limits)
    if not isinstance(value, list | tuple):
        raise InvalidParameter.for_value(name, value, allowed)
    if limit is not None and len(value) > limit:
        raise InvalidParameter(f"`{name}` must be {allowed}; given: {len(value)} entries")


def _token_id(name: str, value: Any, context: _Context) -> int:
    most = _INT32_MAX if context.vocab_size is None else context.vocab_size - 1
    if not _is_integer(value) or not 0 <= value <= most:
        allowed = f"made of token ids, which are integers between 0 and {_show(most, None)}"
        raise InvalidParameter.for_value(name, value, allowed)
    return int(value)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One row of the table. default: as the documentation shows it. doc: one or two sentences of Markdown."""

    name: str
    reader: Reader
    default: str
    doc: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """A section of the documentation."""

    title: str
    parameters: tuple[Parameter, ...]


PARAMETERS: tuple[ParameterGroup, ...] = (
    ParameterGroup(
        "Choosing tokens",
        (
            Parameter(
                "do_sample",
                Boolean(),
                "false",
                "Draw each token at random; otherwise the most likely token is taken. Giving `temperature`, `top_k`, "
                "`top_p` or `typical_p` below 1, or `min_p` above 0 turns sampling on, even beside `do_sample: false`.",
            ),
            Parameter(
                "seed",
                Integer(0, _UINT64_MAX),
                "drawn at random",
                "Start of the random numbers. The same seed gives the same text, alone or under load. The one that was "
                "used is reported in `details`. Allowed, without effect, when not sampling.",
                aliases=("random_seed",),
            ),
            Parameter(
                "temperature",
                Number(above=0, hint="(for the most likely token leave it out, or set do_sample to false)"),
                "1.0",
                "Divides the logits: below 1 makes likely tokens likelier. Given explicitly it turns sampling on, 1.0 "
                "included.",
            ),
            Parameter(
                "top_k",
                Integer(1, _INT32_MAX),
                "off",
                "Sample among the k most likely tokens; exactly k, ties go to the lower id.",
            ),
            Parameter(
                "top_p",
                Number(above=0, high=1),
                "1.0 (off)",
                "Sample among the most likely tokens that together reach this probability (nucleus sampling).",
            ),
            Parameter(
                "typical_p",
                Number(above=0, high=1),
                "1.0 (off)",
                "Sample among the tokens whose surprise is nearest to the expected one and that together reach this "
                "probability (locally typical sampling).",
            ),
            Parameter(
                "min_p",
                Number(low=0, high=1),
                "0.0 (off)",
                "Sample among the tokens at least this many times as likely as the most likely one.",
            ),
            Parameter(
                "repetition_penalty",
                Number(above=0),
                "1.0 (off)",
                "Divides positive and multiplies negative logits of tokens that the prompt or the output holds (CTRL).",
            ),
            Parameter(
                "frequency_penalty",
                Number(low=-2, high=2),
                "0.0 (off)",
                "Subtracted from a token's logit once for each time the output holds it (OpenAI's definition).",
            ),
            Parameter(
                "presence_penalty",
                Number(low=-2, high=2),
                "0.0 (off)",
                "Subtracted from a token's logit when the output holds it (OpenAI's definition).",
            ),
            Parameter(
                "logit_bias",
                Biases("max_list_entries"),
                "{}",
                'Added to the logits of these tokens, as in OpenAI\'s API: `{"1234": -100}`.',
            ),
            Parameter(
                "bad_words",
                Texts("max_list_entries"),
                "[]",
                "Texts that must not be generated, each as the tokenizer writes it at the start of a word and inside "
                "one.",
            ),
            Parameter(
                "bad_words_ids",
                TokenIdSequences("max_list_entries"),
                "[]",
                "Token id sequences that must not be completed.",
            ),
            Parameter(
                "allowed_token_ids",
                TokenIds(None, empty=False),
                "all",
                "The only tokens that may be generated. Include an end-of-sequence token if the text may end.",
            ),
            Parameter(
                "watermark",
                Boolean(),
                "false",
                "Favour a pseudo-random half of the vocabulary after each token, so that the text can be recognized "
                "later (Kirchenbauer et al.); `watermark_gamma` and `watermark_delta` are options of the server.",
            ),
        ),
    ),
    ParameterGroup(
        "Choices",
        (
            Parameter(
                "n",
                Integer(1, "max_best_of"),
                "1",
                "How many texts to generate for the prompt, which is computed once. More than one needs sampling.",
            ),
            Parameter(
                "best_of",
                Integer(1, "max_best_of"),
                "`n`",
                "Generate this many texts and report the `n` with the highest mean token log-probability. Above 1 it "
                "needs sampling, and neither a seed nor a stream.",
            ),
        ),
    ),
    ParameterGroup(
        "Length and end",
        (
            Parameter(
                "max_new_tokens",
                Integer(1, _UINT32_MAX),
                "what `max_total_tokens` leaves",
                "Most tokens to generate. Prompt and new tokens together must not exceed `max_total_tokens`.",
                aliases=("max_tokens", "max_completion_tokens"),
            ),
            Parameter(
                "min_new_tokens",
                Integer(0, _UINT32_MAX),
                "0",
                "Tokens to generate before the text may end by an end token.",
                aliases=("min_tokens",),
            ),
            Parameter(
                "stop",
                Texts("max_stop_sequences"),
                "[]",
                "The text ends where one of these first appears, also inside a token.",
                aliases=("stop_sequences",),
            ),
            Parameter(
                "stop_token_ids",
                TokenIds("max_list_entries"),
                "[]",
                "Tokens that end the text as an end-of-sequence token does.",
            ),
            Parameter(
                "include_stop_str_in_output",
                Boolean(),
                "false",
                "Keep the stop string at the end of the text.",
            ),
            Parameter(
                "ignore_eos_token",
                Boolean(),
                "false",
                "Go on after an end-of-sequence token; for measurements with fixed lengths.",
                aliases=("ignore_eos",),
            ),
        ),
    ),
    ParameterGroup(
        "What is reported",
        (
            Parameter(
                "details",
                Boolean(),
                "false",
                "Report finish reason, seed, timings and every token with its log-probability.",
            ),
            Parameter(
                "decoder_input_details",
                Boolean(),
                "false",
                "Also report the prompt's tokens with their log-probabilities. Not on a stream.",
            ),
            Parameter(
                "top_n_tokens",
                Integer(0, "max_top_n_tokens"),
                "0",
                "Report the n most likely tokens at each position; exactly n, ties go to the lower id.",
                aliases=("top_logprobs",),
            ),
            Parameter(
                "logprobs",
                BooleanOrInteger("max_top_n_tokens"),
                "false",
                "Report the log-probability of each token; a number also sets `top_n_tokens`, as in OpenAI's "
                "completions. Log-probabilities are the model's own, before penalties and filters.",
            ),
            Parameter(
                "prompt_logprobs",
                Boolean(),
                "false",
                "Report the log-probability of each prompt token.",
            ),
            Parameter(
                "return_full_text",
                Boolean(),
                "false",
                "Put the prompt in front of the generated text.",
                aliases=("echo",),
            ),
            Parameter(
                "skip_special_tokens",
                Boolean(),
                "true",
                "Leave special tokens out of the text.",
            ),
        ),
    ),
    ParameterGroup(
        "Form of the output",
        (
            Parameter(
                "grammar",
                Object(),
                "none",
                'Force the output into a form: `{"type": "json", "value": <JSON Schema>}`, or type `regex`, `choice`, '
                "`json_object`, `lark` or `ebnf` (see grammar.md).",
            ),
            Parameter(
                "grammar_backend",
                Text(),
                "the server's",
                "Library that enforces the grammar: `llguidance`, `xgrammar` or `lmfe`.",
            ),
            Parameter(
                "grammar_whitespace",
                Text(),
                "`bounded`",
                "Whitespace between the tokens of JSON: `bounded`, `flexible` or `none`.",
            ),
            Parameter(
                "grammar_property_order",
                Text(),
                "`any`",
                "Order of the properties in JSON objects: `any`, or that of the `schema`.",
            ),
            Parameter(
                "grammar_lenient",
                Boolean(),
                "false",
                "Drop schema keywords that cannot be enforced, with a warning, instead of refusing the schema.",
            ),
            Parameter(
                "grammar_check",
                Check(),
                "false",
                "Generate nothing: say whether the grammar is supported, and whether a text obeys it. The request has "
                "no prompt, and its other parameters have no effect. `text_output` is a JSON object: `supported`, "
                "`backend`, `warnings`, `error` (why not supported), `accepted` (null: not decided, or no text given), "
                "`accepted_prefix` (characters that the grammar takes), `reason` (why not accepted).",
            ),
            Parameter(
                "response_format",
                Object(),
                "none",
                "The same in OpenAI's spelling: `json_object`, or `json_schema` with a schema.",
            ),
            Parameter("tools", Objects(), "none", "Functions the model may call, as in OpenAI's chat API."),
            Parameter(
                "tool_choice",
                TextOrObject(),
                "`auto`",
                "`auto`, `none`, `required`, a function's name, or OpenAI's object that names one.",
            ),
            Parameter(
                "parallel_tool_calls",
                Boolean(),
                "`false`",
                "Allow several calls in one answer, as a list; a `tool_choice` that names a function means one call. "
                "OpenAI's routes of the gateway allow them unless told otherwise.",
            ),
            Parameter("tool_prompt", Text(), "the server's", "Text put before the tools when the template has none."),
        ),
    ),
    ParameterGroup(
        "The prompt",
        (
            Parameter(
                "truncate",
                Integer(1, "max_input_tokens"),
                "off",
                "Keep only the last so many tokens of the prompt.",
                aliases=("truncate_prompt_tokens",),
            ),
            Parameter(
                "add_special_tokens",
                Boolean(),
                "true for text, false for messages",
                "Let the tokenizer add its special tokens (such as the one that begins a sequence).",
            ),
            Parameter(
                "chat_template",
                Text(),
                "the model's default",
                "Name of the chat template, for a model that has several. A template itself is not accepted.",
            ),
            Parameter(
                "add_generation_prompt",
                Boolean(),
                "true unless the last message is the assistant's",
                "End the rendered messages with the header of an answer.",
            ),
            Parameter(
                "continue_final_message",
                Boolean(),
                "true if the last message is the assistant's",
                "Continue the last message instead of answering it.",
            ),
            Parameter("documents", Objects(), "none", "Documents for chat templates that take them."),
            Parameter("chat_template_kwargs", Object(), "none", "Further variables of the chat template."),
        ),
    ),
    ParameterGroup(
        "Service",
        (
            Parameter(
                "priority",
                Integer(-100, 100),
                "0",
                "Larger is served sooner. A waiting request gains priority with time.",
            ),
            Parameter(
                "timeout",
                Number(above=0),
                "the server's",
                "Seconds from arrival after which the request ends: a stream with what it has, otherwise with an "
                "error. Triton's own request timeout counts too, whichever is shorter.",
            ),
            Parameter(
                "adapter_id",
                Text(),
                "none",
                "LoRA adapter to generate with (see adapters.md); a name that is not loaded is refused.",
                aliases=("lora_name",),
            ),
            Parameter(
                "trace_tokens",
                Boolean(),
                "false",
                "An event for every token in the request's trace, where the server makes traces (`OTLP_ENDPOINT`).",
            ),
            Parameter(
                "adapter_command",
                Command(),
                "none",
                "Generate nothing: load or unload an adapter where the server allows it, or list them. The request has "
                "no prompt, and its other parameters have no effect. `text_output` is a JSON object (see adapters.md).",
            ),
        ),
    ),
)


def parse_parameters(
    given: Mapping[str, Any], *, limits: ParameterLimits, stream: bool, vocab_size: int | None
) -> RequestParameters:
    """Read a request's parameters.

    given: name -> JSON value (what `json.loads` returns), null meaning "not given". vocab_size: bound of token ids,
    None where it is not known. Draws a seed from the operating system when the request samples without one.
    Raises InvalidParameter, and Unsupported for what the server's options exclude.
    """
    values = _read_all(given, _Context(limits, vocab_size))
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


def _read_all(given: Mapping[str, Any], context: _Context) -> dict[str, Any]:
    """Canonical name -> value read, for everything given that is not null."""
    values: dict[str, Any] = {}
    said_as: dict[str, str] = {}
    for name, value in given.items():
        parameter = _BY_NAME.get(name)
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
    nearest = difflib.get_close_matches(shown.lower(), _BY_NAME, n=1)
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


def _names(groups: Sequence[ParameterGroup]) -> dict[str, Parameter]:
    table: dict[str, Parameter] = {}
    for group in groups:
        for parameter in group.parameters:
            for name in (parameter.name, *parameter.aliases):
                assert name not in table, f"the name {name} is taken"
                table[name] = parameter
    return table


_BY_NAME: Mapping[str, Parameter] = _names(PARAMETERS)
