"""How one JSON value of a request is read: a class per kind of value, which checks it and says what is allowed.

Nothing is converted (a number in a string is refused, and so is a boolean for a number), and a message names the
parameter, the value and the limit. Knows no parameter by its name; strings stay strings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from textgen_engine.adapters.spec import AdapterCommand
from textgen_engine.errors import InvalidParameter
from textgen_engine.request import GrammarCheck

INT32_MAX = 2**31 - 1
UINT32_MAX = 2**32 - 1
UINT64_MAX = 2**64 - 1
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
class Context:
    """What bounds a value beside its kind. vocab_size: None where it is not known."""

    limits: ParameterLimits
    vocab_size: int | None


class Reader(Protocol):
    """How one kind of value is read."""

    def read(self, name: str, value: Any, context: Context) -> Any:
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
        return {INT32_MAX: "2**31 - 1", UINT32_MAX: "2**32 - 1", UINT64_MAX: "2**64 - 1"}.get(bound, str(bound))  # type: ignore[arg-type]
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

    def read(self, name: str, value: Any, context: Context) -> int:
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

    def read(self, name: str, value: Any, context: Context) -> float:
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

    def read(self, name: str, value: Any, context: Context) -> bool:
        if not isinstance(value, bool):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return value

    def describe(self, limits: ParameterLimits | None) -> str:
        return "true or false"


@dataclass(frozen=True, slots=True)
class BooleanOrInteger:
    """true, false, or a count; OpenAI's chat and completions routes use one name for both."""

    high: Bound

    def read(self, name: str, value: Any, context: Context) -> bool | int:
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

    def read(self, name: str, value: Any, context: Context) -> str:
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

    def read(self, name: str, value: Any, context: Context) -> tuple[str, ...]:
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

    def read(self, name: str, value: Any, context: Context) -> tuple[int, ...]:
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

    def read(self, name: str, value: Any, context: Context) -> tuple[tuple[int, ...], ...]:
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

    def read(self, name: str, value: Any, context: Context) -> tuple[tuple[int, float], ...]:
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

    def read(self, name: str, value: Any, context: Context) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return value

    def describe(self, limits: ParameterLimits | None) -> str:
        return "an object"


@dataclass(frozen=True, slots=True)
class Objects:
    """A list of JSON objects, kept as they are."""

    def read(self, name: str, value: Any, context: Context) -> tuple[Mapping[str, Any], ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping) for one in value):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return tuple(value)

    def describe(self, limits: ParameterLimits | None) -> str:
        return "a list of objects"


@dataclass(frozen=True, slots=True)
class TextOrObject:
    """A string or a JSON object."""

    def read(self, name: str, value: Any, context: Context) -> str | Mapping[str, Any]:
        if not (isinstance(value, str) and value) and not isinstance(value, Mapping):
            raise InvalidParameter.for_value(name, value, self.describe(context.limits))
        return value

    def describe(self, limits: ParameterLimits | None) -> str:
        return "a string, not empty, or an object"


@dataclass(frozen=True, slots=True)
class Check:
    """true, or an object with a text; false is the same as not given."""

    def read(self, name: str, value: Any, context: Context) -> GrammarCheck | None:
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

    def read(self, name: str, value: Any, context: Context) -> AdapterCommand:
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


def _check_list(name: str, value: Any, most: Bound, allowed: str, context: Context) -> None:
    limit = _resolve(most, context.limits)
    if not isinstance(value, list | tuple):
        raise InvalidParameter.for_value(name, value, allowed)
    if limit is not None and len(value) > limit:
        raise InvalidParameter(f"`{name}` must be {allowed}; given: {len(value)} entries")


def _token_id(name: str, value: Any, context: Context) -> int:
    most = INT32_MAX if context.vocab_size is None else context.vocab_size - 1
    if not _is_integer(value) or not 0 <= value <= most:
        allowed = f"made of token ids, which are integers between 0 and {_show(most, None)}"
        raise InvalidParameter.for_value(name, value, allowed)
    return int(value)
