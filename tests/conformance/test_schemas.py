"""Sampled output of the real model against schemas and regexes of many kinds: whatever is finished is valid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jsonschema

from .asking import together

if TYPE_CHECKING:
    from textgen_client import Client, Generation

SHORT = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, Any] = {
    "closed object": {
        "type": "object",
        "properties": {"title": SHORT, "pages": {"type": "integer", "minimum": 1, "maximum": 2000}},
        "required": ["title", "pages"],
        "additionalProperties": False,
    },
    "bounded number": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 20},
    "constants": {"enum": ["red", 7, None, True, {"a": [1, "b"]}]},
    "tuple": {"type": "array", "prefixItems": [SHORT, {"type": "boolean"}], "items": False, "minItems": 2},
    "list of integers": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 99},
        "minItems": 2,
        "maxItems": 6,
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3,5}$"},
    "formats": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "at": {"type": "string", "format": "time"}},
        "required": ["day", "at"],
        "additionalProperties": False,
    },
    "recursive": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "either": {
        "anyOf": [
            {"type": "integer", "minimum": 0, "maximum": 500},
            {"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"], "additionalProperties": False},
        ]
    },
    "typed map": {
        "type": "object",
        "additionalProperties": {"type": "boolean"},
        "propertyNames": {"pattern": "^[a-c]{1,3}$"},
        "maxProperties": 3,
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"a": {"minimum": 10, "maximum": 20}}, "additionalProperties": False},
        ]
    },
    "multiple types": {"type": ["boolean", "null", "string"], "maxLength": 6},
}
REGEXES = [
    r"[A-Z][a-z]{2,10}( [A-Z][a-z]{2,10})?",
    r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    r"#[0-9a-f]{6}",
    r"(yes|no|perhaps)(, (yes|no|perhaps)){0,3}\.",
    r"\+?\d{2,3}[ -]\d{3}[ -]\d{4}",
    r"[^\W\d_]{1,8}@[a-z]{2,8}\.(com|org|net)",
    r"[αβγ日本語]{1,6}",
    r"\s?\{\"k\": (0|[1-9]\d{0,2})\}",
]
# Texts may be as long as their grammar allows, which may be longer than this; a finished one must be right.
MAX_NEW_TOKENS = 64


def test_sampled_texts_obey_their_grammar(client: Client) -> None:
    """12 schemas and 8 regexes at temperature 1, all at once: valid by jsonschema and re.fullmatch."""

    def ask(index: int, grammar: dict[str, Any]) -> Callable[[], Generation]:
        asked = {"temperature": 1.0, "seed": index, "max_new_tokens": MAX_NEW_TOKENS, "details": True}
        return lambda: client.generate(f"Example {index}: ", grammar=grammar, **asked)

    grammars: list[dict[str, Any]] = [{"type": "json", "value": schema} for schema in SCHEMAS.values()]
    grammars += [{"type": "regex", "value": pattern} for pattern in REGEXES]
    answers = together(*(ask(index, grammar) for index, grammar in enumerate(grammars)))
    finished = 0
    for grammar, answer in zip(grammars, answers, strict=True):
        warnings = (answer.details or {}).get("warnings", [])
        if answer.finish_reason == "length" and any("before its grammar was complete" in text for text in warnings):
            continue  # any other text is complete, if only by chance (a number may go on or not)
        finished += 1
        assert answer.finish_reason in ("eos_token", "length")
        if grammar["type"] == "regex":
            assert re.fullmatch(grammar["value"], answer.text), (grammar, answer.text)
        else:
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.validate(
                json.loads(answer.text), grammar["value"], jsonschema.Draft202012Validator, format_checker=checker
            )
    assert finished >= len(grammars) - 2
