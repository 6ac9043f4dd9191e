"""Objects in any order: every order of the members of a valid object passes, and nothing invalid does.

The judge is the jsonschema package, over written-out cases, over generated schemas and texts (names repeated, members
in any order), and over texts that random walks through the masks make.
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from textgen_engine.errors import GrammarError

jsonschema = pytest.importorskip("jsonschema")

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
PERSON = {
    "type": "object",
    "properties": {"name": STRING, "age": INTEGER, "note": {"type": "null"}},
    "required": ["name", "age"],
}
TREE = {
    "$ref": "#/$defs/t",
    "$defs": {"t": {"type": "object", "properties": {"n": INTEGER, "up": {"$ref": "#/$defs/t"}}}},
}


def schema_form(schema: Any) -> Any:
    return {"type": "json_schema", "value": schema}


def text_of(pairs: list[tuple[str, Any]]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs) + "}"


def is_valid(schema: Any, text: str) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)))


@pytest.mark.parametrize("closed", [False, True])
def test_every_order_and_nothing_twice(llguidance_walker: Any, closed: bool) -> None:
    compiled = llguidance_walker.compile(schema_form({**PERSON, **({"additionalProperties": False} if closed else {})}))
    assert not compiled.warnings
    pairs = [("name", "a"), ("age", 1), ("note", None)]
    for size in range(4):
        for chosen in itertools.permutations(pairs, size):
            accepted = llguidance_walker.accepts(compiled, text_of(list(chosen)))
            assert accepted == ({"name", "age"} <= {name for name, _ in chosen}), chosen
    for extra in [("name", "b"), ("age", 2), ("note", None)]:
        assert not llguidance_walker.accepts(compiled, text_of([*pairs, extra]))
    assert llguidance_walker.accepts(compiled, text_of([("other", 1), *pairs])) is not closed
    assert llguidance_walker.accepts(compiled, '{\n  "age": 1,\n  "name": "a"\n}')
    for broken in (
        '{"age": 1, "name": "a",}',
        '{, "age": 1, "name": "a"}',
        '{"age": 1 "name": "a"}',
        '{"age": 1,  "name": "a"}',
    ):
        assert not llguidance_walker.accepts(compiled, broken)


def test_the_order_of_the_schema_on_request(llguidance_walker: Any) -> None:
    compiled = llguidance_walker.compile(schema_form(PERSON), property_order="schema")
    assert llguidance_walker.accepts(compiled, '{"name": "a", "age": 1}')
    assert not llguidance_walker.accepts(compiled, '{"age": 1, "name": "a"}')


@pytest.mark.parametrize("order", ["any", "schema"])
@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (PERSON, r'{"name": "a", "age": 1, "\u006eote": 5}'),
        ({"properties": {"a": False}}, r'{"\u0061": 1}'),
        ({"properties": {'a"b': INTEGER}}, r'{"a\"b": "x"}'),
        ({"properties": {'a"b': INTEGER}}, r'{"a\u0022b": "x"}'),
        ({"patternProperties": {"^a": INTEGER}}, r'{"\u0061": "x"}'),
        ({"patternProperties": {"^a": INTEGER}, "additionalProperties": STRING}, r'{"a\n": "x"}'),
        ({"type": "object", "minProperties": 3}, '{"a": 1, "a": 2, "a": 3}'),
        ({"type": "object", "properties": {"a": INTEGER}, "maxProperties": 1}, '{"x": 1, "y": 2}'),
        ({"type": "object", "minProperties": 2, "maxProperties": 2}, '{"a": 1, "a": 2}'),
        ({"type": "string", "pattern": '^[^"]*$'}, r'"a\"b"'),
        ({"type": "string", "pattern": r"^[^\\/]*$"}, r'"a\\b"'),
        ({"type": "string", "not": {"enum": ['a"b']}}, r'"a\"b"'),
        ({"type": "object", "propertyNames": {"pattern": '^[^"]*$'}}, r'{"a\"b": 1}'),
    ],
)
def test_no_name_or_character_passes_in_disguise(llguidance_walker: Any, schema: Any, text: str, order: str) -> None:
    assert not is_valid(schema, text)
    try:
        compiled = llguidance_walker.compile(schema_form(schema), property_order=order)
    except GrammarError as error:
        assert (order, "minProperties" in error.message) == ("schema", True)  # noqa: PT017
    else:
        assert not llguidance_walker.accepts(compiled, text)


def test_no_name_passes_in_disguise_anywhere(walker: Any) -> None:
    compiled = walker.compile(schema_form({"type": "object", "properties": {"a": INTEGER}}))
    assert walker.accepts(compiled, '{"a": 1}')
    assert not walker.accepts(compiled, r'{"\u0061": "x"}')
    try:
        compiled = walker.compile(schema_form({"type": "object", "properties": {'a"b': INTEGER}}))
    except GrammarError as error:
        assert (walker.backend.name, "escapes" in error.message) == ("xgrammar", True)  # noqa: PT017
    else:
        assert not walker.accepts(compiled, r'{"a\"b": "x"}')


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        (TREE, ['{"up": {"up": {}, "n": 1}, "n": 2}', '{"n": 1}', "{}"]),
        ({"const": {"a": 1, "b": [{"c": 1, "d": 2}]}}, ['{"b": [{"d": 2, "c": 1}], "a": 1}']),
        ({"anyOf": [PERSON, {"type": "array", "items": PERSON}]}, ['[{"age": 1, "name": "a"}]', "[]"]),
        (
            {"allOf": [{"properties": {"a": INTEGER}, "required": ["a"]}, {"properties": {"b": INTEGER}}]},
            ['{"b": 1, "a": 2}', '{"x": 0, "a": 2, "y": 0, "b": 1}'],
        ),
        (
            {"patternProperties": {"^x": INTEGER}, "properties": {"a": STRING}, "additionalProperties": STRING},
            ['{"b": "s", "x1": 2, "a": "s", "x": 1}'],
        ),
        (
            {"type": "array", "prefixItems": [PERSON, INTEGER], "items": PERSON, "minItems": 1, "maxItems": 3},
            ['[{"age": 1, "name": "a"}, 1, {"age": 1, "name": "a"}]', '[{"age": 1, "name": "a"}]'],
        ),
        (
            {**PERSON, "additionalProperties": False, "minProperties": 3},
            ['{"note": null, "age": 1, "name": "a"}'],
        ),
        ({"properties": {"a": {"type": "object"}}, "maxProperties": 1}, ['{"x": 1}', '{"a": {}}', "{}"]),
        ({"type": "object", "minProperties": 2, "maxProperties": 3}, ['{"b": 1, "a": 2}', '{"b": 1, "a": 2, "c": 2}']),
        (
            {"type": "object", "properties": {f"p{i}": INTEGER for i in range(63)}, "additionalProperties": False},
            ['{"p62": 1, "p0": 1}'],
        ),
    ],
)
def test_valid_texts_pass(llguidance_walker: Any, schema: Any, texts: list[str]) -> None:
    compiled = llguidance_walker.compile(schema_form(schema))
    for text in texts:
        assert is_valid(schema, text)
        assert llguidance_walker.accepts(compiled, text), text


def test_more_properties_than_bits_keep_their_order(llguidance_walker: Any) -> None:
    properties = {f"p{i}": INTEGER for i in range(64)}
    compiled = llguidance_walker.compile(schema_form({"properties": properties, "additionalProperties": False}))
    assert llguidance_walker.accepts(compiled, '{"p0": 1, "p63": 1}')
    assert not llguidance_walker.accepts(compiled, '{"p63": 1, "p0": 1}')
    assert any("in the order of the schema" in warning for warning in compiled.warnings)


@pytest.mark.parametrize("whitespace", ["flexible", "none"])
def test_whitespace_holds_inside(llguidance_walker: Any, whitespace: str) -> None:
    compiled = llguidance_walker.compile(schema_form({"properties": {"o": PERSON}}), whitespace=whitespace)
    assert llguidance_walker.accepts(compiled, '{"o":{"age":1,"name":"a"}}')
    for spaced in ('{"o": {"age":1,"name":"a"}}', '{"o":{"age": 1,"name":"a"}}', '{"o":{"age":1,\n\n"name":"a"}}'):
        assert llguidance_walker.accepts(compiled, spaced) is (whitespace == "flexible")


def test_tool_calls(llguidance_walker: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {**PERSON, "additionalProperties": False}}}
    form = {"type": "tools", "value": {"tools": [tool], "tool_choice": "auto"}}
    compiled = llguidance_walker.compile(form)
    assert llguidance_walker.accepts(compiled, '{"arguments": {"age": 1, "name": "a"}, "name": "f"}')
    assert llguidance_walker.accepts(compiled, "plain  text, with { braces }")
    assert not llguidance_walker.accepts(compiled, '{"name": "f", "arguments": {"age": 1}}')


NAMES = ["a", "b", "ab", "x1", 'q"']
VALUES: list[Any] = [1, 7, "s", "", None, True, [], [1, 2], {}, {"a": 1}, {"b": "s", "a": 1}]


def schemas(depth: int = 2) -> st.SearchStrategy[Any]:
    scalars = st.sampled_from([INTEGER, STRING, {"type": "null"}, {"const": 7}, {"enum": ["s", 1]}, {}, True])
    if depth == 0:
        return scalars
    inner = schemas(depth - 1)
    objects = st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
            "required": st.lists(st.sampled_from(NAMES), max_size=2, unique=True),
            "additionalProperties": st.one_of(st.booleans(), inner),
            "patternProperties": st.dictionaries(st.sampled_from(["^x", "b$", "^[a-z]+$"]), inner, max_size=1),
            "minProperties": st.integers(0, 3),
            "maxProperties": st.integers(1, 3),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner}, optional={"prefixItems": st.lists(inner, min_size=1, max_size=2)}
    )
    both = st.tuples(objects, objects).map(lambda pair: {"allOf": list(pair)})
    either = st.tuples(objects, inner).map(lambda pair: {"anyOf": list(pair)})
    return st.one_of(objects, objects, objects, arrays, both, either)


@settings(
    max_examples=60, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    schema=schemas(),
    texts=st.lists(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=4), max_size=8),
    seed=st.integers(0, 2**32),
)
def test_against_jsonschema(llguidance_walker: Any, schema: Any, texts: Any, seed: int) -> None:
    try:
        compiled = llguidance_walker.compile(schema_form(schema))
    except GrammarError:
        return
    for pairs in texts:
        text = text_of(pairs)
        accepted, valid = llguidance_walker.accepts(compiled, text), is_valid(schema, text)
        assert valid or not accepted, f"{text} is let in by {json.dumps(schema)}"
        is_twice = len({name for name, _ in pairs}) < len(pairs)
        if valid and not is_twice and not compiled.warnings:
            assert accepted, f"{text} is kept out by {json.dumps(schema)}"
    text = made_at_random(llguidance_walker, compiled, random.Random(seed))
    if text is not None:
        assert is_valid(schema, text), f"{text} is made by {json.dumps(schema)}"


def made_at_random(walker: Any, compiled: Any, rng: random.Random) -> str | None:
    """A text the masks allow, one random token at a time, structure preferred; None where it does not end."""
    matcher = compiled.matcher()
    closing = [i for text in '"}]:,{1s' for i in walker.ids(text)]
    taken: list[int] = []
    while len(taken) < 80:
        if matcher.can_stop() and rng.random() < 0.5:
            return str(walker.tokenizer.decode(taken))
        row = walker.row(matcher)
        assert matcher.error() is None, matcher.error()
        allowed = [i for i in closing if (int(row[i >> 5]) >> (i & 31)) & 1]
        if not allowed or rng.random() < 0.3:
            ids = [i for i in range(4, walker.vocabulary.width) if (int(row[i >> 5]) >> (i & 31)) & 1]
            if not ids:
                return str(walker.tokenizer.decode(taken))
            allowed = ids
        token_id = rng.choice(allowed)
        assert matcher.advance([token_id]) == 1
        taken.append(token_id)
    return None
