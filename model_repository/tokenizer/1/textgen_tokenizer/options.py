"""The parameters of a request that change its prompt: names, types, defaults. Everything else belongs to `textgen`.

They come from two places, the JSON object of `sampling_parameters` and the request's own (scalar) parameters; the same
name with two different values is an error. Names not listed here are not looked at: `textgen` refuses unknown ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from textgen_tokenizer.errors import InvalidParameter, ToolError

Json = Any

_ALIASES = {"truncate_prompt_tokens": "truncate"}
# A request's trace, which may come as a header and in its parameters and concerns `textgen` alone.
_IGNORED = frozenset({"traceparent", "tracestate"})


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """Validated parameters.

    truncate: keep the last so many tokens. add_special_tokens: None adds them to a text and not to a rendered
    template, which writes its own. add_generation_prompt, continue_final_message: None lets the last message's role
    decide. chat_template: the name of one of the checkpoint's templates. tools: those the template shows, after
    `tool_choice`. tool_prompt: text after the last message when there are tools. documents, chat_template_kwargs: for
    templates that know them. skip_special_tokens: when decoding ids.
    """

    truncate: int | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    tools: tuple[dict[str, Json], ...] = ()
    tool_choice: Json = None
    tool_prompt: str | None = None
    documents: tuple[dict[str, Json], ...] | None = None
    chat_template_kwargs: Mapping[str, Json] = field(default_factory=dict)
    skip_special_tokens: bool = True


def parse_json(name: str, text: str) -> Json:
    """Parse the JSON in input `name`. Raises InvalidParameter with the position of the fault."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidParameter(
            f"`{name}` is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            f" (character {error.pos})"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
        raise InvalidParameter(f"`{name}` is not valid JSON: {error}") from error


def parse_options(sampling_parameters: str | None, parameters: Mapping[str, Json]) -> PromptOptions:
    """Read the parameters of one request. Raises InvalidParameter or ToolError."""
    values: dict[str, Json] = {}
    if sampling_parameters is not None and sampling_parameters.strip():
        parsed = parse_json("sampling_parameters", sampling_parameters)
        if not isinstance(parsed, dict):
            raise InvalidParameter.for_value("sampling_parameters", parsed, "a JSON object")
        _merge(values, parsed)
    _merge(values, parameters)
    tools = _tools(values.get("tools"))
    return PromptOptions(
        truncate=_truncate(values.get("truncate")),
        add_special_tokens=_flag(values, "add_special_tokens"),
        add_generation_prompt=_flag(values, "add_generation_prompt"),
        continue_final_message=_flag(values, "continue_final_message"),
        chat_template=_text(values, "chat_template"),
        tools=_chosen(tools, values.get("tool_choice")),
        tool_choice=values.get("tool_choice"),
        tool_prompt=_text(values, "tool_prompt"),
        documents=_documents(values.get("documents")),
        chat_template_kwargs=_template_arguments(values.get("chat_template_kwargs")),
        skip_special_tokens=_flag(values, "skip_special_tokens") is not False,
    )


def _merge(values: dict[str, Json], new: Mapping[str, Json]) -> None:
    for given_name, value in new.items():
        name = _ALIASES.get(given_name, given_name)
        if name in _IGNORED:
            continue
        if value is None:  # what JSON clients send for "not given"
            continue
        if name in values and values[name] != value:
            raise InvalidParameter(f"`{name}` is given twice, with different values: {values[name]!r} and {value!r}")
        values[name] = value


def _flag(values: Mapping[str, Json], name: str) -> bool | None:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidParameter.for_value(name, value, "true or false")
    return value


def _text(values: Mapping[str, Json], name: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidParameter.for_value(name, value, "a string")
    return value


def _truncate(value: Json) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidParameter.for_value("truncate", value, "a whole number of at least 1")
    return value


def _documents(value: Json) -> tuple[dict[str, Json], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(document, dict) for document in value):
        raise InvalidParameter.for_value("documents", value, "a list of objects")
    return tuple(value)


def _template_arguments(value: Json) -> dict[str, Json]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidParameter.for_value("chat_template_kwargs", value, "an object")
    return value


def _tools(value: Json) -> tuple[dict[str, Json], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ToolError(f"`tools` must be a list of tools; given: {type(value).__name__}")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ToolError(f'`tools[{i}]` must be an object like {{"type": "function", "function": {{"name": ...}}}}')
    return tuple(value)


def _chosen(tools: tuple[dict[str, Json], ...], choice: Json) -> tuple[dict[str, Json], ...]:
    """The tools that a template is to show: all, none for "none", or the one that is named."""
    if choice is None or choice in ("auto", "required"):
        return tools
    if choice == "none":
        return ()
    name = choice
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ToolError('`tool_choice` must be "auto", "required", "none", a tool\'s name, or an object that names one')
    chosen = tuple(tool for tool in tools if tool["function"]["name"] == name)
    if not chosen:
        known = ", ".join(tool["function"]["name"] for tool in tools) or "no tools"
        raise ToolError(f"`tool_choice` names {name!r}; given in `tools`: {known}")
    return chosen
