"""From the request's JSON to a `GrammarSpec`: which forms exist, and every check that needs no grammar library.

Accepted forms (`value` of parse_grammar, a JSON object or its text):

    {"type": "json" | "json_schema", "value": <schema or its text>}           TGI; value may be {"name", "schema"}
    {"type": "json_object"}  {"type": "json_object", "value": <schema>}        any object; TGI's alias of json
    {"type": "regex", "value": "<pattern>"}                                    TGI
    {"type": "choice", "value": ["<text>", ...]}
    {"type": "lark" | "ebnf", "value": "<grammar>"}
    {"type": "tools", "value": [<tool>, ...] or {"tools": [...], "tool_choice": ...}}
    {"type": "json_schema", "json_schema": {"name", "schema", "strict"}}       OpenAI's response_format
    {"type": "text"}, null, tool_choice "none"                                 no grammar: None

beside which `backend`, `whitespace`, `property_order` and `lenient` may stand. Runs in the front process, before a
request is queued.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from textgen_engine.errors import GrammarError, InvalidParameter, ToolError
from textgen_engine.grammar.base import (
    BACKEND_NAMES,
    GRAMMAR_KINDS,
    PROPERTY_ORDERS,
    WHITESPACE_MODES,
    GrammarKind,
    GrammarLimits,
    GrammarSpec,
    PropertyOrder,
    Whitespace,
)
from textgen_engine.grammar.json_schema import check_schema
from textgen_engine.grammar.json_text import canonical_json, parse_json
from textgen_engine.grammar.regex import check_nesting, to_rust_regex
from textgen_engine.grammar.tools import select_tools

_BACKEND_ALIASES = {
    "guidance": "llguidance",
    "lm-format-enforcer": "lmfe",
    "lm_format_enforcer": "lmfe",
}
_KIND_ALIASES: dict[str, GrammarKind] = {
    "json": "json_schema",
    "gbnf": "ebnf",
}
_OPTION_KEYS = {"backend", "whitespace", "property_order", "lenient"}


def parse_grammar(
    value: object,
    *,
    limits: GrammarLimits,
    default_backend: str = "llguidance",
    backend: str | None = None,
    whitespace: str | None = None,
    property_order: str | None = None,
    lenient: bool | None = None,
) -> GrammarSpec | None:
    """Check one `grammar` (or `response_format`) value; None where it asks for no constraint.

    backend, whitespace, property_order, lenient: the request's own `grammar_*` parameters, None where absent; the same
    option inside `value` must agree. Raises GrammarError (naming keyword or position), ToolError or InvalidParameter.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = parse_json(value, what="grammar", max_bytes=limits.max_schema_bytes, max_nesting=limits.max_nesting)
    if not isinstance(value, Mapping):
        raise InvalidParameter.for_value("grammar", value, "an object {type, value}")
    if value.get("type") == "text":
        return None
    kind, content = _kind_and_content(value)
    text = _CHECKS[kind](content, limits)
    if text is None:
        return None
    chosen = _agree("grammar_backend", backend, value.get("backend")) or default_backend
    chosen = _BACKEND_ALIASES.get(chosen, chosen) if isinstance(chosen, str) else chosen
    if chosen not in BACKEND_NAMES:
        raise InvalidParameter.for_value("grammar_backend", chosen, "one of " + ", ".join(BACKEND_NAMES))
    mode = _agree("grammar_whitespace", whitespace, value.get("whitespace")) or "bounded"
    if mode not in WHITESPACE_MODES:
        raise InvalidParameter.for_value("grammar_whitespace", mode, "one of " + ", ".join(WHITESPACE_MODES))
    order = _agree("grammar_property_order", property_order, value.get("property_order")) or "any"
    if order not in PROPERTY_ORDERS:
        raise InvalidParameter.for_value("grammar_property_order", order, "one of " + ", ".join(PROPERTY_ORDERS))
    relaxed = _agree("grammar_lenient", lenient, value.get("lenient"))
    if not isinstance(relaxed, bool | None):
        raise InvalidParameter.for_value("grammar_lenient", relaxed, "true or false")
    return GrammarSpec(kind, text, cast(str, chosen), cast(Whitespace, mode), bool(relaxed), cast(PropertyOrder, order))


def _agree(name: str, parameter: Any, inside: Any) -> Any:
    """One option that may be given in two places; raises InvalidParameter where the two differ."""
    if parameter is not None and inside is not None and parameter != inside:
        raise InvalidParameter(f"`{name}` is given twice with different values: {parameter!r:.60} and {inside!r:.60}")
    return inside if parameter is None else parameter


def _kind_and_content(value: Mapping[str, Any]) -> tuple[GrammarKind, Any]:
    name = value.get("type")
    kind = _KIND_ALIASES.get(name, name) if isinstance(name, str) else name
    if kind not in GRAMMAR_KINDS:
        allowed = ", ".join([*GRAMMAR_KINDS, *_KIND_ALIASES, "text"])
        raise InvalidParameter.for_value("grammar.type", name, "one of " + allowed)
    content_keys = {"value", "json_schema"} & set(value)
    unknown = set(value) - {"type"} - _OPTION_KEYS - content_keys
    if unknown:
        raise InvalidParameter(f"`grammar` has an unknown key: {sorted(unknown)[0]!r:.100}")
    if len(content_keys) > 1:
        raise InvalidParameter("`grammar` has both `value` and `json_schema`")
    if "json_schema" in value and kind != "json_schema":
        raise InvalidParameter(f"`grammar.json_schema` goes with type json_schema, not {kind}")
    if not content_keys:
        if kind == "json_object":
            return "json_object", {"type": "object"}
        raise InvalidParameter(f"`grammar.value` is required for type {name}")
    return cast(GrammarKind, kind), value[content_keys.pop()]


def _schema_text(content: Any, limits: GrammarLimits) -> str:
    bounds = {"max_bytes": limits.max_schema_bytes, "max_nesting": limits.max_nesting}
    if isinstance(content, str):
        content = parse_json(content, what="JSON schema", **bounds)
    if _is_named_schema(content):
        content = content["schema"]
        if isinstance(content, str):
            content = parse_json(content, what="JSON schema", **bounds)
    text = canonical_json(content, what="JSON schema", **bounds)
    check_schema(content, max_nodes=limits.max_nodes)
    return text


def _is_named_schema(content: Any) -> bool:
    """OpenAI's and TGI's wrapper {"name", "schema", "strict", "description"}: no schema keyword is called `schema`."""
    return (
        isinstance(content, dict)
        and "schema" in content
        and set(content) <= {"name", "schema", "strict", "description"}
    )


def _regex_text(content: Any, limits: GrammarLimits) -> str:
    pattern = _plain_text(content, "regex", limits.max_regex_bytes)
    check_nesting(pattern, limits.max_nesting)
    to_rust_regex(pattern)
    return pattern


def _choice_text(content: Any, limits: GrammarLimits) -> str:
    if not isinstance(content, list) or not content or not all(isinstance(text, str) for text in content):
        raise InvalidParameter.for_value("grammar.value", content, "a non-empty list of strings for type choice")
    if len(content) > limits.max_choices:
        raise GrammarError(f"choice: {len(content)} texts; at most {limits.max_choices} are allowed")
    if "" in content:
        raise GrammarError(f"choice: text {content.index('')} is empty")
    return canonical_json(content, what="choice", max_bytes=limits.max_schema_bytes, max_nesting=limits.max_nesting)


def _lark_text(content: Any, limits: GrammarLimits) -> str:
    text = _plain_text(content, "lark grammar", limits.max_grammar_bytes)
    check_nesting(text, limits.max_nesting)
    return text


def _ebnf_text(content: Any, limits: GrammarLimits) -> str:
    text = _plain_text(content, "ebnf grammar", limits.max_grammar_bytes)
    check_nesting(text, limits.max_nesting)
    return text


def _plain_text(content: Any, what: str, max_bytes: int) -> str:
    if not isinstance(content, str) or not content:
        raise InvalidParameter.for_value("grammar.value", content, f"a non-empty string for a {what}")
    try:
        size = len(content.encode())
    except UnicodeEncodeError as error:
        raise GrammarError(f"{what}: lone surrogate at position {error.start}") from None
    if size > max_bytes:
        raise GrammarError(f"{what}: {size} bytes; at most {max_bytes} are allowed")
    if "\0" in content:
        raise GrammarError(f"{what}: NUL character at position {content.index(chr(0))}")
    return content


def _tools_text(content: Any, limits: GrammarLimits) -> str | None:
    if isinstance(content, str):
        content = parse_json(content, what="tools", max_bytes=limits.max_schema_bytes, max_nesting=limits.max_nesting)
    if isinstance(content, list):
        content = {"tools": content, "tool_choice": "required"}
    known = {"tools", "tool_choice", "parallel_tool_calls"}
    if not isinstance(content, dict) or set(content) - known or "tools" not in content:
        raise InvalidParameter.for_value("grammar.value", content, "a list of tools or {tools, tool_choice}")
    if not isinstance(content["tools"], list):
        raise ToolError("`tools` must be a list")
    if len(content["tools"]) > limits.max_tools:
        raise ToolError(f"{len(content['tools'])} tools; at most {limits.max_tools} are allowed")
    selected = select_tools(content["tools"], content.get("tool_choice", "auto"), content.get("parallel_tool_calls"))
    if selected is None:
        return None
    for tool in selected["tools"]:
        check_schema(tool["parameters"], max_nodes=limits.max_nodes, where=f"tool {tool['name']!r}, parameters")
    # The schema made of the tools nests theirs three levels deeper; the bound is on what the client wrote.
    return canonical_json(selected, what="tools", max_bytes=limits.max_schema_bytes, max_nesting=limits.max_nesting + 4)


_CHECKS = {
    "json_schema": _schema_text,
    "json_object": _schema_text,
    "regex": _regex_text,
    "choice": _choice_text,
    "lark": _lark_text,
    "ebnf": _ebnf_text,
    "tools": _tools_text,
}
