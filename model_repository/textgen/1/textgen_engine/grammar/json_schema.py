"""JSON Schema as data: where subschemas stand, and whether a schema is well formed.

Knows keywords and their shapes (drafts 4 to 2020-12), not what any backend can enforce. A malformed keyword is refused
here by name and place, because grammar libraries differ in what they ignore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from textgen_engine.errors import GrammarError

TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")

ONE_SUBSCHEMA = frozenset(
    [
        *("additionalProperties", "propertyNames", "unevaluatedProperties"),
        *("items", "additionalItems", "unevaluatedItems", "contains"),
        *("not", "if", "then", "else", "contentSchema"),
    ]
)
LIST_OF_SUBSCHEMAS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems", "items"])
MAP_OF_SUBSCHEMAS = frozenset(
    ["properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"]
)

_COUNTS = frozenset(
    [
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        *("minContains", "maxContains"),
    ]
)
_NUMBERS = frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"])
_STRINGS = frozenset(
    ["$ref", "$dynamicRef", "$recursiveRef", "$schema", "$anchor", "$dynamicAnchor", "pattern", "format"]
)

Path = tuple[str, ...]


def children(schema: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Each direct subschema of an object schema with its path below it. Data (const, enum, ...) is never entered."""
    for key, value in schema.items():
        if key in MAP_OF_SUBSCHEMAS and isinstance(value, dict):
            for name, inner in value.items():
                if key != "dependencies" or isinstance(inner, dict | bool):
                    yield (key, name), inner
        elif key in LIST_OF_SUBSCHEMAS and isinstance(value, list):
            for index, inner in enumerate(value):
                yield (key, str(index)), inner
        elif key in ONE_SUBSCHEMA and isinstance(value, dict | bool):
            yield (key,), value


def map_children(schema: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of `schema` with `change` applied to each direct subschema; key order kept."""
    changed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in MAP_OF_SUBSCHEMAS and isinstance(value, dict):
            changed[key] = {
                name: change(inner) if key != "dependencies" or isinstance(inner, dict | bool) else inner
                for name, inner in value.items()
            }
        elif key in LIST_OF_SUBSCHEMAS and isinstance(value, list):
            changed[key] = [change(inner) for inner in value]
        elif key in ONE_SUBSCHEMA and isinstance(value, dict | bool):
            changed[key] = change(value)
        else:
            changed[key] = value
    return changed


def pointer(path: Path) -> str:
    """JSON pointer of a path, `#` for the root."""
    return "#" + "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in path)


def check_schema(schema: Any, *, max_nodes: int, where: str = "JSON schema") -> None:
    """Raise GrammarError, naming keyword and place, unless every keyword has a shape its specification allows."""
    pending: list[tuple[Path, Any]] = [((), schema)]
    num_nodes = 0
    while pending:
        path, current = pending.pop()
        num_nodes += 1
        if num_nodes > max_nodes:
            raise GrammarError(f"{where}: more than {max_nodes} subschemas")
        if isinstance(current, bool):
            continue
        if not isinstance(current, dict):
            raise GrammarError(f"{where}: a schema must be an object or a boolean at {pointer(path)[:200]}")
        for key, value in current.items():
            wrong = _malformed(key, value)
            if wrong:
                raise GrammarError(f"{where}: {key!r} {wrong} at {pointer(path)[:200]}; given: {_short(value)}")
        pending.extend((path + inner_path, inner) for inner_path, inner in children(current))
    if schema is False:
        raise GrammarError(f"{where}: the schema `false` allows no value")


def _malformed(key: str, value: Any) -> str | None:
    """What is wrong with one keyword's value, in words; None when it is well formed or no keyword of ours."""
    if key == "type":
        names = [value] if isinstance(value, str) else value
        if (
            not isinstance(names, list)
            or not names
            or not all(name in TYPES for name in names if isinstance(name, str))
        ):
            return "must name types out of " + ", ".join(TYPES)
        if not all(isinstance(name, str) for name in names):
            return "must be a string or a list of strings"
    elif key in _COUNTS:
        if not _is_number(value) or value < 0 or value != int(value):
            return "must be a whole number of at least 0"
    elif key in _NUMBERS:
        if key.startswith("exclusive") and isinstance(value, bool):
            return None  # draft 4
        if not _is_number(value):
            return "must be a number"
        if key == "multipleOf" and value <= 0:
            return "must be greater than 0"
    elif key in _STRINGS:
        if not isinstance(value, str):
            return "must be a string"
        if key == "pattern":
            return _bad_pattern(value)
    elif key == "uniqueItems":
        if not isinstance(value, bool):
            return "must be true or false"
    elif key == "enum":
        if not isinstance(value, list) or not value:
            return "must be a non-empty list"
    elif key == "required":
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            return "must be a list of strings"
    elif key == "dependentRequired":
        if not isinstance(value, dict) or not all(_is_string_list(names) for names in value.values()):
            return "must map names to lists of strings"
    elif key == "dependencies":
        if not isinstance(value, dict) or not all(
            isinstance(inner, dict | bool) or _is_string_list(inner) for inner in value.values()
        ):
            return "must map names to schemas or lists of strings"
    elif key in MAP_OF_SUBSCHEMAS:
        if not isinstance(value, dict):
            return "must be an object"
        if key == "patternProperties":
            return next((wrong for wrong in map(_bad_pattern, value) if wrong), None)
    elif key == "items":
        if not isinstance(value, dict | bool | list):
            return "must be a schema or a list of schemas"
    elif key in LIST_OF_SUBSCHEMAS:
        if not isinstance(value, list) or (not value and key != "prefixItems"):
            return "must be a non-empty list"
    elif key in ONE_SUBSCHEMA and not isinstance(value, dict | bool):
        return "must be a schema"
    return None


def _bad_pattern(pattern: str) -> str | None:
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        return "ends in a dangling backslash"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_string_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
