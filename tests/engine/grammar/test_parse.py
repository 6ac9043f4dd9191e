"""Request forms: what each becomes, and that every refusal names what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from textgen_engine.errors import GrammarError, InvalidParameter, RequestError, ToolError
from textgen_engine.grammar import GrammarLimits, GrammarSpec, parse_grammar

LIMITS = GrammarLimits()
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}, "required": ["b"]}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}


def parse(value: object, **options: Any) -> GrammarSpec | None:
    return parse_grammar(value, limits=LIMITS, **options)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json", "value": json.dumps(SCHEMA, indent=2)},
        {"type": "json_schema", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}},
        {"type": "json_schema", "value": {"name": "x", "schema": json.dumps(SCHEMA)}},
        {"type": "json_object", "value": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        json.dumps({"type": "json", "value": SCHEMA}),
    ],
)
def test_every_spelling_of_a_schema_is_the_same(form: object) -> None:
    spec = parse(form)
    assert spec is not None
    assert spec.value == TEXT, "compact, key order kept"


def test_other_kinds() -> None:
    assert parse({"type": "json_object"}) == GrammarSpec("json_object", '{"type":"object"}', "llguidance")
    assert parse({"type": "regex", "value": "a+"}) == GrammarSpec("regex", "a+", "llguidance")
    assert parse({"type": "choice", "value": ["é", "b"]}) == GrammarSpec("choice", '["é","b"]', "llguidance")
    assert parse({"type": "gbnf", "value": 'root ::= "a"'}) == GrammarSpec("ebnf", 'root ::= "a"', "llguidance")
    assert parse({"type": "json", "value": True}) == GrammarSpec("json_schema", "true", "llguidance")


@pytest.mark.parametrize(
    "form", [None, {"type": "text"}, {"type": "tools", "value": {"tools": [TOOL], "tool_choice": "none"}}]
)
def test_no_grammar(form: object) -> None:
    assert parse(form) is None


def test_options() -> None:
    spec = parse({"type": "regex", "value": "a", "backend": "lm-format-enforcer"}, whitespace="none", lenient=True)
    assert spec == GrammarSpec("regex", "a", "lmfe", "none", True)
    assert parse({"type": "regex", "value": "a"}, default_backend="xgrammar") == GrammarSpec("regex", "a", "xgrammar")
    with pytest.raises(InvalidParameter, match="twice"):
        parse({"type": "regex", "value": "a", "backend": "xgrammar"}, backend="lmfe")


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ("auto", "auto", ["f", "g"]),
        ("required", "required", ["f", "g"]),
        ("g", "required", ["g"]),
        ({"type": "function", "function": {"name": "f"}}, "required", ["f"]),
        ({"function": {"name": "f"}}, "required", ["f"]),
    ],
)
def test_tool_choice(choice: object, mode: str, names: list[str]) -> None:
    tools = [TOOL, {"type": "function", "function": {"name": "g"}}]
    spec = parse({"type": "tools", "value": {"tools": tools, "tool_choice": choice}})
    assert spec is not None
    content = json.loads(spec.value)
    assert content["mode"] == mode
    assert [tool["name"] for tool in content["tools"]] == names
    several = parse({"type": "tools", "value": {"tools": tools, "tool_choice": choice, "parallel_tool_calls": True}})
    assert several is not None
    assert json.loads(several.value).get("parallel", False) == (len(names) > 1)  # a tool named is one call


@pytest.mark.parametrize(
    ("form", "kind", "words"),
    [
        ("{", GrammarError, "line 1 column 2"),
        ("[]", InvalidParameter, "object"),
        (3, InvalidParameter, "object"),
        ({"value": "a"}, InvalidParameter, "grammar.type"),
        ({"type": "yaml", "value": "a"}, InvalidParameter, "'yaml'"),
        ({"type": ["regex"], "value": "a"}, InvalidParameter, "grammar.type"),
        ({"type": "regex"}, InvalidParameter, "grammar.value"),
        ({"type": "regex", "value": ""}, InvalidParameter, "non-empty"),
        ({"type": "regex", "value": {"a": 1}}, InvalidParameter, "non-empty string"),
        ({"type": "regex", "value": "a\0"}, GrammarError, "NUL character at position 1"),
        ({"type": "regex", "value": "a\ud800"}, GrammarError, "lone surrogate at position 1"),
        ({"type": "regex", "value": "a", "flags": "i"}, InvalidParameter, "flags"),
        ({"type": "regex", "value": "a" * 70_000}, GrammarError, "65536"),
        ({"type": "regex", "value": "(" * 100 + ")" * 100}, GrammarError, "nested deeper"),
        ({"type": "choice", "value": []}, InvalidParameter, "non-empty list"),
        ({"type": "choice", "value": ["a", 1]}, InvalidParameter, "strings"),
        ({"type": "choice", "value": ["a", ""]}, GrammarError, "text 1 is empty"),
        ({"type": "choice", "value": ["x"] * 5000}, GrammarError, "4096"),
        ({"type": "json", "value": '{"a": 1, "a": 2}'}, GrammarError, "twice"),
        ({"type": "json", "value": '{"minimum": NaN}'}, GrammarError, "NaN"),
        ({"type": "json", "value": {"minimum": float("inf")}}, GrammarError, "not JSON"),
        ({"type": "json", "value": "[" * 200}, GrammarError, "nested deeper than 64 at position 64"),
        ({"type": "json", "value": {"type": "object", "properties": []}}, GrammarError, "'properties'"),
        ({"type": "json", "value": {"required": "a"}}, GrammarError, "'required'"),
        ({"type": "json", "value": {"properties": {"a": {"minLength": -1}}}}, GrammarError, "#/properties/a"),
        ({"type": "json", "value": {"$defs": {"x/y": {"enum": []}}}}, GrammarError, "#/$defs/x~1y"),
        ({"type": "json", "value": {"anyOf": [{}, {"multipleOf": 0}]}}, GrammarError, "#/anyOf/1"),
        ({"type": "json", "value": {"patternProperties": {"a\\": {}}}}, GrammarError, "dangling backslash"),
        ({"type": "json", "value": {"items": 3}}, GrammarError, "'items'"),
        ({"type": "json", "value": "x" * 300_000}, GrammarError, "262144"),
        ({"type": "regex", "value": "a", "backend": "outlines"}, InvalidParameter, "outlines"),
        ({"type": "regex", "value": "a", "whitespace": "some"}, InvalidParameter, "grammar_whitespace"),
        ({"type": "regex", "value": "a", "lenient": "yes"}, InvalidParameter, "grammar_lenient"),
        ({"type": "tools", "value": []}, ToolError, "empty"),
        ({"type": "tools", "value": [{"type": "function"}]}, ToolError, "tool 0"),
        ({"type": "tools", "value": [TOOL, TOOL]}, ToolError, "two tools"),
        ({"type": "tools", "value": {"tools": [TOOL], "tool_choice": "other"}}, ToolError, "other"),
        (
            {"type": "tools", "value": [{"function": {"name": "f", "parameters": {"type": "x"}}}]},
            GrammarError,
            "tool 'f'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "",
)
def test_refusals(form: object, kind: type[RequestError], words: str) -> None:
    with pytest.raises(kind) as caught:
        parse(form)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1100


def test_schema_keywords_are_not_looked_for_in_data() -> None:
    """Property names and constants may look like keywords."""
    schema = {
        "properties": {"required": {"const": {"type": "strin", "minimum": "x"}}, "type": {"enum": [{"items": 3}]}},
        "default": {"type": 3},
    }
    assert parse({"type": "json", "value": schema}) is not None
