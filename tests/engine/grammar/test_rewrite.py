"""Rebuilt schemas allow the values of the original: all of them, or, with a warning, fewer; never another.

The judge is the jsonschema package on both sides, over written-out cases and over generated schemas and values.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from textgen_engine.errors import GrammarError
from textgen_engine.grammar import GrammarLimits, GrammarSpec, parse_grammar
from textgen_engine.grammar.capabilities import LLGUIDANCE, LMFE, XGRAMMAR, Capabilities
from textgen_engine.grammar.regex import pattern_of_all_but
from textgen_engine.grammar.rewrite import PreparedSchema, prepare_schema

jsonschema = pytest.importorskip("jsonschema")
LIMITS = GrammarLimits()
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
REWRITTEN = {
    *("not", "oneOf", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains"),
    *("minContains", "maxContains", "propertyNames", "unevaluatedProperties", "unevaluatedItems", "uniqueItems"),
}
VALUES = [
    *(None, True, False, 0, 1, 2, 3, 5, -1, 1.5, 2.5, "", "a", "b", "ab", "abc", "foo", "x" * 12),
    *(
        [],
        [1],
        [2],
        [1, 1],
        [1, 2],
        [2, 1],
        ["a"],
        ["a", "b"],
        ["a", 1],
        [1, 2, 3],
        [[1], [1]],
        [True, False],
        [None, 1, "a"],
    ),
    *({}, {"a": 1}, {"a": 2}, {"a": "x"}, {"b": 1}, {"a": 1, "b": 2}, {"a": 1, "c": 3}, {"a": 1, "b": 2, "c": 3}),
    *({"c": None}, {"kind": "x"}, {"kind": "y"}, {"kind": "x", "a": 1}, {"kind": "y", "a": 1}, {"kind": "y", "b": "s"}),
    *({"a": {"a": 1}}, {"a": [1, 2]}, {"ab": 1}, {"abc": 1, "a": 2}, {"foo": "bar"}, {"foo": 1, "bar": 2}),
]


def rebuilt(schema: Any, capabilities: Capabilities = LLGUIDANCE) -> PreparedSchema:
    spec = parse_grammar({"type": "json_schema", "value": schema}, limits=LIMITS)
    assert spec is not None
    return prepare_schema(spec, capabilities, LIMITS, rebuild=True)


def validator(schema: Any) -> Any:
    return jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)


def keywords(schema: Any) -> set[str]:
    """Every key at a schema position of a rebuilt schema (its maps of names left out)."""
    if isinstance(schema, list):
        return {key for item in schema for key in keywords(item)}
    if not isinstance(schema, dict):
        return set()
    found = set(schema)
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs"):
            found |= {inner for item in value.values() for inner in keywords(item)}
        elif key not in ("enum", "const"):
            found |= keywords(value)
    return found


def check(schema: Any, values: list[Any], capabilities: Capabilities = LLGUIDANCE) -> PreparedSchema:
    prepared = rebuilt(schema, capabilities)
    assert not keywords(prepared.schema) & REWRITTEN
    before, after = validator(schema), jsonschema.Draft202012Validator(prepared.schema)
    for value in values:
        if after.is_valid(value):
            assert before.is_valid(value), f"{value!r} is let in by {json.dumps(prepared.schema)}"
        elif not prepared.warnings:
            assert not before.is_valid(value), f"{value!r} is kept out by {json.dumps(prepared.schema)}"
    return prepared


EXACT: dict[str, Any] = {
    "not const": {"not": {"const": 1}},
    "not enum of strings": {"type": "string", "not": {"enum": ["a", "ab", "foo"]}},
    "not type": {"not": {"type": ["string", "object"]}},
    "not required": {"type": "object", "not": {"required": ["a"]}},
    "not all required": {"type": "object", "not": {"required": ["a", "b"]}},
    "not any of required": {"type": "object", "not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}},
    "not properties": {"not": {"properties": {"a": {"type": "string"}}}},
    "not not": {"not": {"not": {"type": "string", "minLength": 2}}},
    "not length": {"not": {"type": "string", "minLength": 2, "maxLength": 3}},
    "holes outside an interval": {"type": "number", "maximum": 1, "minimum": 0, "not": {"enum": [-3, 0, 0.5, 1.5]}},
    "a hole at the bound": {"type": "number", "maximum": 1, "not": {"const": 1}},
    "not not an integer": {"not": {"allOf": [{"not": {"type": "integer"}}]}},
    "not bounds": {"type": "integer", "not": {"minimum": 1, "maximum": 2}},
    "not items count": {"type": "array", "not": {"minItems": 1, "maxItems": 2}},
    "not closed": {"type": "object", "not": {"properties": {"a": {}}, "additionalProperties": False}},
    "not empty schema": {"properties": {"a": {"not": {}}}},
    "one of types": {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    "one of consts": {
        "oneOf": [
            {"properties": {"kind": {"const": "x"}, "a": {"type": "integer"}}, "required": ["kind"], "type": "object"},
            {"properties": {"kind": {"const": "y"}, "b": {"type": "string"}}, "required": ["kind"], "type": "object"},
        ]
    },
    "one of required": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "one of overlapping numbers": {"oneOf": [{"type": "integer", "minimum": 1}, {"type": "integer", "maximum": 2}]},
    "one of overlapping lengths": {"type": "string", "oneOf": [{"minLength": 2}, {"maxLength": 3}]},
    "one of three, two alike": {"oneOf": [{"const": 1}, {"const": 1}, {"type": "string"}]},
    "one of refs": {
        "oneOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/s"}],
        "$defs": {"n": {"type": "number"}, "s": {"type": "string", "minLength": 1}},
    },
    "if then else": {
        "type": "object",
        "properties": {"kind": {"enum": ["x", "y"]}},
        "required": ["kind"],
        "if": {"properties": {"kind": {"const": "x"}}},
        "then": {"required": ["a"]},
        "else": {"required": ["b"]},
    },
    "if without else": {"if": {"type": "string"}, "then": {"minLength": 2}},
    "if alone": {"type": "integer", "if": {"minimum": 3}},
    "several ifs": {
        "type": "object",
        "allOf": [
            {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": {"required": [name]}}
            for kind, name in (("x", "a"), ("y", "b"))
        ],
    },
    "dependent required": {"dependentRequired": {"a": ["b"]}},
    "dependencies": {"$schema": DRAFT_7, "dependencies": {"a": ["b"], "c": {"required": ["a"]}}},
    "dependent schemas": {"dependentSchemas": {"a": {"properties": {"b": {"type": "string"}}}}},
    "unique booleans": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True},
    "unique of few": {"type": "array", "items": {"enum": ["a", "b", 1]}, "uniqueItems": True, "minItems": 1},
    "unique of one": {"type": "array", "uniqueItems": True, "maxItems": 1},
    "contains in a short array": {"type": "array", "maxItems": 3, "contains": {"const": 1}},
    "contains nothing": {"type": "array", "contains": {"const": 9}, "minContains": 0},
    "contains at most": {
        "type": "array",
        "maxItems": 3,
        "contains": {"type": "string"},
        "minContains": 0,
        "maxContains": 1,
    },
    "contains what items are": {"type": "array", "items": {"type": "integer"}, "contains": {"type": "number"}},
    "not contains": {"type": "array", "not": {"contains": {"const": 1}}},
    "names of a list": {"propertyNames": {"enum": ["a", "b"]}},
    "names by length": {"type": "object", "propertyNames": {"maxLength": 2}},
    "names by pattern": {
        "type": "object",
        "propertyNames": {"pattern": "^a"},
        "properties": {"b": {}, "abc": {"type": "integer"}},
    },
    "names not": {"type": "object", "propertyNames": {"not": {"enum": ["a", "ab"]}}},
    "one property at least": {
        "type": "object",
        "properties": {"a": {}, "b": {}, "c": {}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "one property at most": {
        "type": "object",
        "properties": {"a": {}, "b": {}, "c": {}},
        "additionalProperties": False,
        "maxProperties": 1,
    },
    "two of three": {
        "type": "object",
        "properties": {"a": {}, "b": {}, "c": {}},
        "additionalProperties": False,
        "minProperties": 2,
        "maxProperties": 2,
    },
    "open, counted": {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1, "maxProperties": 2},
    "unevaluated properties": {
        "allOf": [{"properties": {"a": {}}}],
        "properties": {"b": {}},
        "unevaluatedProperties": False,
    },
    "unevaluated beside any": {
        "anyOf": [
            {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {}}, "required": ["b"]},
        ],
        "unevaluatedProperties": False,
    },
    "unevaluated beside not not": {"not": {"not": {"properties": {"a": {}}}}, "unevaluatedProperties": False},
    "unevaluated beside if": {
        "if": {"properties": {"kind": {"const": "x"}}, "required": ["kind"]},
        "then": {"properties": {"a": {}}},
        "else": {"properties": {"b": {}}},
        "unevaluatedProperties": False,
    },
    "unevaluated items": {"allOf": [{"prefixItems": [{"type": "integer"}]}], "unevaluatedItems": False},
    "unevaluated schema": {"properties": {"a": {}}, "unevaluatedProperties": {"type": "integer"}},
    "exclusive as in draft 4": {"type": "integer", "minimum": 1, "exclusiveMinimum": False},
    "whole floats": {"type": "array", "minItems": 1.0, "items": {"enum": [1.0, 2.0]}},
    "recursion": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/tree"}},
                "not": {"required": ["b"]},
            }
        },
    },
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    schema = EXACT[name]
    judged = {**schema, "$schema": schema.get("$schema", "https://json-schema.org/draft/2020-12/schema")}
    if "draft 4" in name:
        judged = {"type": "integer", "minimum": 1}
        assert rebuilt(schema).schema == {"type": "integer", "minimum": 1}
        return
    assert check(judged, VALUES).warnings == []


STRICTER: dict[str, Any] = {
    "not integer": {"not": {"type": "integer"}},
    "contains": {"type": "array", "contains": {"const": 1}},
    "two contained": {"type": "array", "contains": {"type": "integer"}, "minContains": 2},
    "an item breaks the rule": {"type": "array", "not": {"items": {"type": "integer"}}},
}


@pytest.mark.parametrize("name", STRICTER)
def test_stricter_says_so(name: str) -> None:
    assert check(STRICTER[name], VALUES).warnings


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True, "items": {"type": "string"}}, "uniqueItems"),
        ({"not": {"type": "string", "pattern": "^a"}}, "not"),
        ({"oneOf": [{"type": "string", "pattern": "a"}, {"type": "string", "pattern": "b"}]}, "not"),
        ({"type": "array", "not": {"items": {"const": 1}}, "oneOf": [{"minItems": 1}, {"maxItems": 3}]}, "oneOf"),
        ({"not": {"allOf": [{"not": {"items": {"type": "string"}}}]}}, "not"),
        ({"type": "number", "not": {"type": "integer"}}, "not"),
        ({"propertyNames": {"pattern": "^a"}, "patternProperties": {"b$": {}}}, "propertyNames"),
        ({"not": {"patternProperties": {"a": {"type": "string"}}}}, "not"),
        ({"allOf": [{"type": "string"}, {"not": {"type": "string"}}]}, "no value"),
        ({"not": {}}, "no value"),
    ],
)
def test_what_cannot_be_rewritten_is_refused_by_name(schema: Any, keyword: str) -> None:
    with pytest.raises(GrammarError, match=keyword):
        rebuilt(schema)


def test_place_of_a_refusal() -> None:
    schema = {"properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}}
    with pytest.raises(GrammarError, match="'uniqueItems' at #/properties/tags cannot be enforced by llguidance"):
        rebuilt(schema)


def test_rewriting_is_bounded() -> None:
    wide = {
        "allOf": [{"anyOf": [{"required": [f"p{i}_{j}"]} for j in range(8)]} for i in range(8)],
        "not": {"const": 1},
    }
    with pytest.raises(GrammarError, match=r"too many|too large"):
        prepare_schema(
            GrammarSpec("json_schema", json.dumps(wide), "llguidance"),
            LLGUIDANCE,
            GrammarLimits(max_rewritten_nodes=2000),
            rebuild=True,
        )


def test_library_options_inside_a_schema_are_ignored() -> None:
    schema = {"x-guidance": {"lenient": True}, "type": "string", "properties": {"x-guidance": {"x-guidance": {}}}}
    prepared = prepare_schema(
        GrammarSpec("json_schema", json.dumps(schema), "llguidance"), LLGUIDANCE, LIMITS, rebuild=False
    )
    assert prepared.schema == {"type": "string", "properties": {"x-guidance": {}}}


@pytest.mark.parametrize("capabilities", [XGRAMMAR, LMFE], ids=lambda c: c.name)
def test_weaker_backends_get_plain_schemas_or_refuse(capabilities: Capabilities) -> None:
    """No keyword they ignore is left in what they are given."""
    ignored = {
        "xgrammar": {"multipleOf", "allOf", "patternProperties"},
        "lmfe": {"prefixItems", "minimum", "allOf", "const"},
    }
    rebuilt_count = 0
    for schema in EXACT.values():
        try:
            prepared = check(schema, VALUES, capabilities)
        except GrammarError:
            continue
        rebuilt_count += 1
        assert not keywords(prepared.schema) & ignored[capabilities.name]
    assert rebuilt_count >= 10


@given(texts=st.sets(st.text("ab]^-\\\n.", max_size=4), min_size=1, max_size=6), text=st.text("ab]^-\\\n.", max_size=5))
def test_pattern_of_all_but(texts: set[str], text: str) -> None:
    import re

    assert (re.fullmatch(pattern_of_all_but(texts), text) is None) == (text in texts)


scalars = st.sampled_from([None, True, False, 0, 1, 2, 1.5, "a", "b", "ab"])
names = st.sampled_from(["a", "b", "c"])
simple = st.one_of(
    st.builds(lambda v: {"const": v}, scalars),
    st.builds(lambda v: {"enum": v}, st.lists(scalars, min_size=1, max_size=3)),
    st.builds(
        lambda t: {"type": t}, st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
    ),
    st.builds(
        lambda n, k: {k: n}, st.integers(0, 2), st.sampled_from(["minLength", "maxLength", "minItems", "maxItems"])
    ),
    st.builds(
        lambda n, k: {k: n},
        st.integers(0, 2),
        st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
    ),
    st.builds(lambda n, k: {k: n}, st.integers(0, 2), st.sampled_from(["minProperties", "maxProperties"])),
    st.builds(lambda n: {"required": n}, st.lists(names, unique=True, max_size=2)),
    st.just({}),
)


def compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.builds(lambda s: {"not": s}, inner),
        st.builds(lambda s: {"oneOf": s}, several),
        st.builds(lambda s: {"anyOf": s}, several),
        st.builds(lambda s: {"allOf": s}, several),
        st.builds(lambda a, b, c: {"if": a, "then": b, "else": c}, inner, inner, inner),
        st.builds(lambda p: {"properties": p}, st.dictionaries(names, inner, max_size=2)),
        st.builds(
            lambda p, a: {"type": "object", "properties": p, "additionalProperties": a},
            st.dictionaries(names, inner, max_size=2),
            st.booleans(),
        ),
        st.builds(
            lambda p, s: {"properties": p, "unevaluatedProperties": False, "anyOf": s},
            st.dictionaries(names, inner, max_size=1),
            several,
        ),
        st.builds(lambda s: {"items": s}, inner),
        st.builds(lambda p, s: {"prefixItems": p, "items": s}, several, inner),
        st.builds(lambda s: {"prefixItems": s, "unevaluatedItems": False}, several),
        st.builds(lambda s, n: {"type": "array", "contains": s, "maxItems": n}, inner, st.integers(1, 3)),
        st.builds(lambda s: {"uniqueItems": True, "items": s}, inner),
        st.builds(lambda n, s: {"dependentSchemas": {n: s}}, names, inner),
        st.builds(lambda n, s: {"dependentRequired": {n: s}}, names, st.lists(names, unique=True, max_size=2)),
        st.builds(lambda s: {"propertyNames": s}, inner),
        st.builds(lambda a, b: {**a, **b}, inner, inner),
    )


schemas = st.recursive(simple, compound, max_leaves=6)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(schema=schemas, values=st.lists(json_values, min_size=1, max_size=12))
@pytest.mark.parametrize("capabilities", [LLGUIDANCE, XGRAMMAR, LMFE], ids=lambda c: c.name)
def test_generated_schemas(capabilities: Capabilities, schema: Any, values: list[Any]) -> None:
    try:
        check(schema, [*VALUES, *values], capabilities)
    except GrammarError:
        assume(False)  # refusing is always right
