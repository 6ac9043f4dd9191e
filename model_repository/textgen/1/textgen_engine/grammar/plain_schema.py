"""`SchemaWriter`: sets of values written as plain JSON Schema, within what one backend enforces.

`not`, `oneOf`, `if`, dependencies, `contains`, `uniqueItems`, `propertyNames`, `unevaluated*` do not occur in what it
writes: schema_sets.py has turned them into unions of branches. What the backend takes as it is, is copied.

Knows the sets, JSON Schema's keywords and `Capabilities`; nothing of requests, limits of time, or libraries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations, permutations
from typing import Any

from textgen_engine.grammar.capabilities import Capabilities
from textgen_engine.grammar.json_schema import map_children
from textgen_engine.grammar.references import Place, SchemaDocument
from textgen_engine.grammar.regex import pattern_of_all_but, unsupported_in_pattern
from textgen_engine.grammar.schema_branches import (
    FALSE,
    FULL,
    TRUE,
    And,
    ArrayBranch,
    BooleanBranch,
    Branch,
    Expr,
    Inexpressible,
    Keys,
    Leaf,
    NullBranch,
    NumberBranch,
    ObjectBranch,
    StringBranch,
    Values,
    canonical,
    conjunction,
)
from textgen_engine.grammar.schema_numbers import finite_numbers, plain_number
from textgen_engine.grammar.schema_sets import SchemaSets

_REWRITTEN = frozenset(
    [
        *("not", "oneOf", "if", "dependentRequired", "dependentSchemas", "dependencies"),
        *("contains", "propertyNames", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
    ]
)
IDENTIFIERS = frozenset(["$id", "id", "$anchor", "$dynamicAnchor", "$schema", "$defs", "definitions", "x-guidance"])
_ANNOTATIONS = frozenset(
    ["title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "$vocabulary"]
)
_MAX_CASES = 64


@dataclass(frozen=True)
class ObjectShape:
    """What an object may hold: declared names (FALSE: never), then names by pattern, then all others."""

    properties: dict[str, Expr]
    patterns: dict[str, Expr]
    additional: Expr


class SchemaWriter:
    """Writes sets of one document, one definition per subschema that something refers to. Raises Inexpressible."""

    def __init__(self, sets: SchemaSets, capabilities: Capabilities, max_nodes: int, *, is_lenient: bool) -> None:
        self._document: SchemaDocument = sets.document
        self._is_lenient = is_lenient
        self._can = capabilities
        self._sets = sets
        self._max_nodes = max_nodes
        self._num_nodes = 0
        self._names: dict[Expr, str] = {}
        self._definitions: dict[str, Any] = {}

    def schema_of(self, expr: Expr) -> dict[str, Any] | None:
        """A schema with all its definitions; None where provably nothing satisfies the expression."""
        return None if self._sets.is_empty(expr) else self._whole(self._schema(expr))

    def schema_of_branches(self, branches: Sequence[Branch], place: str) -> dict[str, Any] | None:
        """The same for the union of branches."""
        return self._whole(self._of_branches(branches, place))

    def _whole(self, schema: Any) -> dict[str, Any] | None:
        if schema is False:
            return None
        needed: dict[str, Any] = {}
        pending = [schema]
        while pending:
            for name in _referred(pending.pop()):
                if name in self._definitions and name not in needed:
                    needed[name] = self._definitions[name]
                    pending.append(self._definitions[name])
        return {**schema, "$defs": needed} if needed else dict(schema)

    # Expressions

    def _schema(self, expr: Expr) -> Any:
        """A schema for an expression; False where nothing satisfies it."""
        self._num_nodes += 1
        if self._num_nodes > self._max_nodes:
            raise Inexpressible("schema", "#", "its rewritten form is too large")
        if expr == TRUE:
            return self._anything()
        if isinstance(expr, Leaf):
            node = expr.place.node
            if isinstance(node, bool) or node == {}:
                return self._anything() if node is not False else False
            if "$ref" in node and (
                self._document.is_old_draft or not set(node) - IDENTIFIERS - _ANNOTATIONS - {"$ref"}
            ):
                return self._reference(Leaf(self._document.resolve(expr.place, node["$ref"])))
            if self._can.native and self._is_plain(expr.place):
                return self._copy(expr.place)
            return self._of_branches(self._sets.branches(expr), expr.place.pointer)
        if isinstance(expr, Values):
            return self._of_branches(self._sets.branches(expr), "#")
        return self._reference(expr)

    def _anything(self) -> dict[str, Any]:
        """The schema of all values; lmfe knows none without a type."""
        return {} if self._can.untyped else {"anyOf": [{"type": branch.type} for branch in FULL]}

    def _reference(self, expr: Expr) -> Any:
        """A reference to the expression's definition, written now if it is the first."""
        if expr not in self._names:
            if self._sets.is_empty(expr):
                return False
            name = f"d{len(self._names)}"
            self._names[expr] = name
            self._definitions[name] = {}  # holds the place, for order
            if isinstance(expr, Leaf):
                self._definitions[name] = self._schema(expr)
            else:
                self._definitions[name] = self._of_branches(self._sets.branches(expr), _pointer(expr))
        return {"$ref": f"#/$defs/{self._names[expr]}"}

    def _is_plain(self, place: Place) -> bool:
        """The backend takes this node as it is (its subschemas aside)."""
        node = place.node
        if _REWRITTEN & set(node) or node.get("uniqueItems") or (self._document.is_old_draft and "$ref" in node):
            return False
        if isinstance(node.get("exclusiveMinimum"), bool) or isinstance(node.get("exclusiveMaximum"), bool):
            return False
        if isinstance(node.get("required"), bool):
            return False
        if "minProperties" in node or "maxProperties" in node:
            optional = set(node.get("properties", ())) - set(node.get("required", ()))
            return not optional and not {"allOf", "anyOf", "$ref"} & set(node)
        return True

    def _copy(self, place: Place) -> dict[str, Any]:
        node = {key: value for key, value in place.node.items() if key not in IDENTIFIERS | _ANNOTATIONS}
        if isinstance(node.get("items"), list):  # the older spelling of prefixItems
            node["prefixItems"] = node.pop("items")
            if "additionalItems" in node:
                node["items"] = node.pop("additionalItems")
        else:
            node.pop("additionalItems", None)
        copied = map_children(node, lambda inner: self._schema(Leaf(self._document.child(place, (), inner))))
        if "$ref" in node:
            copied["$ref"] = self._reference(Leaf(self._document.resolve(place, node["$ref"])))
            if copied["$ref"] is False:
                return {"not": {}}
            copied["$ref"] = copied["$ref"]["$ref"]
        return copied

    # Branches

    def _of_branches(self, branches: Sequence[Branch], place: str) -> Any:
        plain = [branch for branch in branches if branch in FULL]
        if len(plain) == len(FULL):
            return self._anything()
        schemas: list[Any] = []
        if plain:
            names = [branch.type for branch in FULL if branch in plain]
            if self._can.open_objects:
                schemas.append({"type": names[0] if len(names) == 1 else names})
            else:
                schemas += [{"type": name} for name in names]
        for branch in branches:
            if branch not in plain:
                schemas += self._of_branch(branch, place)
        unique = list({canonical(schema): schema for schema in schemas}.values())  # key order counts
        if len(unique) > self._max_nodes:
            raise Inexpressible("schema", place, "too many cases")
        if not unique:
            if any(isinstance(branch, NumberBranch) and branch.not_multiples for branch in branches):
                raise Inexpressible("not", place, "of integers or multiples")
            return False
        return unique[0] if len(unique) == 1 else {"anyOf": unique}

    def _of_branch(self, branch: Branch, place: str) -> list[Any]:
        """Schemas whose union is the branch."""
        if isinstance(branch, NullBranch):
            return [{"type": "null"}]
        if isinstance(branch, BooleanBranch):
            return [{"type": "boolean"}] if len(branch.values) == 2 else [self._enum(sorted(branch.values), place)]
        if isinstance(branch, NumberBranch):
            return self._of_number(branch, place)
        if isinstance(branch, StringBranch):
            return self._of_string(branch, place)
        if isinstance(branch, ArrayBranch):
            solved = self._solved_array(branch, place)
            return [schema for one in solved if (schema := self._of_array(one, place)) is not None]
        objects = [schema for one in self.counted(branch, place) if (schema := self._of_object(one, place)) is not None]
        return [variant for schema in objects for variant in self._orders(schema, branch)]

    def _solved_array(self, branch: ArrayBranch, place: str) -> Sequence[ArrayBranch]:
        try:
            return self._sets.solved_array(branch, place)
        except Inexpressible as error:
            if not (self._is_lenient and error.keyword == "uniqueItems"):
                raise
            self._sets.warnings[f"grammar_lenient: 'uniqueItems' at {place} is not enforced"] = None
            return self._sets.solved_array(replace(branch, unique=False), place)

    def _orders(self, schema: dict[str, Any], branch: ObjectBranch) -> Iterator[dict[str, Any]]:
        """Properties are made in the order they are listed in. Names that no schema declares, only asks for, have no
        order of their own: every order of them, where they are few."""
        listed = schema.get("properties", {})
        declared = {name for keys in branch.keys for name, expr in keys.properties if expr != FALSE}
        free = [name for name in listed if name not in declared and name in schema.get("required", ())]
        if not self._can.native or not 2 <= len(free) <= 3:
            yield schema
            return
        others = {name: inner for name, inner in listed.items() if name not in free}
        for order in permutations(free):
            yield {**schema, "properties": {**others, **{name: listed[name] for name in order}}}

    def _enum(self, values: Sequence[Any], place: str) -> dict[str, Any]:
        if not self._can.mixed_enums and any(isinstance(value, bool) for value in values):
            raise Inexpressible("enum", place, "of true or false alone")
        return {"enum": list(values)}

    def _of_number(self, branch: NumberBranch, place: str) -> list[Any]:
        numbers = finite_numbers(branch, 256) if not self._can.number_bounds or not self._can.multiple_of else None
        if branch.values is not None:
            numbers = sorted(branch.values)
        if numbers is not None:
            return [self._enum([plain_number(value) for value in numbers], place)] if numbers else []
        if branch.not_multiples:
            # Fewer numbers, never others: no backend can be told "no multiple of".
            shown = ", ".join(str(plain_number(value)) for value in sorted(branch.not_multiples))
            self._sets.warnings[f"numbers that are no multiple of {shown} are not made at {place}"] = None
            return []
        whole = branch.multiple is not None and branch.multiple.denominator == 1
        schemas = []
        for low, low_open, high, high_open in _intervals(branch):
            schema: dict[str, Any] = {"type": "integer" if whole else "number"}
            if branch.multiple not in (None, Fraction(1)):
                if not self._can.multiple_of:
                    raise Inexpressible("multipleOf", place)
                assert branch.multiple is not None
                schema["multipleOf"] = plain_number(branch.multiple)
            if low is not None:
                if whole:
                    schema["minimum"] = math.floor(low) + 1 if low_open else math.ceil(low)
                else:
                    schema["exclusiveMinimum" if low_open else "minimum"] = plain_number(low)
            if high is not None:
                if whole:
                    schema["maximum"] = math.ceil(high) - 1 if high_open else math.floor(high)
                else:
                    schema["exclusiveMaximum" if high_open else "maximum"] = plain_number(high)
            if whole and "minimum" in schema and "maximum" in schema and schema["minimum"] > schema["maximum"]:
                continue
            if len(schema) > 1 and not self._can.number_bounds:
                raise Inexpressible("minimum or maximum", place)
            schemas.append(schema)
        return schemas

    def _of_string(self, branch: StringBranch, place: str) -> list[Any]:
        if branch.values is not None:
            return [self._enum(self._sets.in_order(branch.values), place)]
        patterns = [*branch.patterns]
        if branch.excluded:
            patterns.append(f"^{pattern_of_all_but(branch.excluded)}$")
        for pattern in patterns:
            reason = unsupported_in_pattern(pattern)
            if reason is not None:
                raise Inexpressible("pattern", place, reason)
        if len(patterns) > 1 and not self._can.several_patterns:
            raise Inexpressible("pattern", place, "several at once")
        has_length = bool(branch.min_length) or branch.max_length is not None
        if has_length and patterns and not self._can.pattern_and_length:
            raise Inexpressible("pattern", place, "beside minLength or maxLength")
        schema: dict[str, Any] = {"type": "string"}
        if branch.min_length:
            schema["minLength"] = branch.min_length
        if branch.max_length is not None:
            schema["maxLength"] = branch.max_length
        if patterns:
            schema["pattern"] = patterns[0]
        extra = [{"pattern": pattern} for pattern in patterns[1:]]
        formats = [{"format": name} for name in branch.formats]
        if formats and not extra:
            schema.update(formats.pop())
        if extra or formats:
            schema["allOf"] = extra + formats
        return [schema]

    def _of_array(self, branch: ArrayBranch, place: str) -> dict[str, Any] | None:
        schema: dict[str, Any] = {"type": "array"}
        most = branch.max_items
        prefix = []
        for index, expr in enumerate(branch.prefix):
            if most is not None and index >= most:
                break
            inner = self._schema(expr)
            if inner is False:  # the array ends before this item
                most = index
                break
            prefix.append(inner)
        if most is not None and most < branch.min_items:
            return None
        rest = self._schema(branch.rest) if most is None or most > len(prefix) else False
        if rest is False:
            most = min(len(prefix), len(prefix) if most is None else most)
        if most is not None and most < branch.min_items:
            return None
        if prefix and not self._can.prefix_items:
            if any(inner != rest for inner in prefix) and not (
                rest is False and all(inner == prefix[0] for inner in prefix)
            ):
                raise Inexpressible("prefixItems", place)
            rest, prefix = prefix[0], []
        if prefix:
            schema["prefixItems"] = prefix
        if rest is False:
            schema["items"] = False if self._can.native or prefix else {}
        elif rest != {} or not self._can.native:
            schema["items"] = rest
        if branch.min_items:
            schema["minItems"] = branch.min_items
        if most is not None:
            schema["maxItems"] = most
        return schema

    # Objects

    def counted(self, branch: ObjectBranch, place: str, *, counts_declared: bool = False) -> Iterator[ObjectBranch]:
        """The same objects without bounds on the number of properties, save where these can be written.

        counts_declared: they can where no other names are allowed.
        """
        low, high = branch.min_properties - len(branch.required), branch.max_properties
        high = None if high is None else high - len(branch.required)
        if low <= 0 and high is None:
            yield replace(branch, min_properties=0)
            return
        optional = [
            name
            for name in branch.declared()
            if name not in branch.required and not self._sets.is_empty(self._value_of(branch, name))
        ]
        is_open = not self._sets.is_empty(conjunction(keys.additional for keys in branch.keys)) or any(
            keys.patterns for keys in branch.keys
        )
        if not is_open and counts_declared:
            yield branch
            return
        if not is_open:
            if low <= 0 and (high is None or high >= len(optional)):
                yield replace(branch, min_properties=0, max_properties=None)
                return
            for absent, present in _choices(optional, max(low, 0), high, place):
                yield _with_presence(branch, absent, present)
            return
        if not self._can.count_properties:
            raise Inexpressible("minProperties or maxProperties", place)
        if not optional:
            yield branch
            return
        # With other names allowed, the count of declared names that are there is fixed case by case; the backend
        # counts the others.
        if 2 ** len(optional) > _MAX_CASES:
            raise Inexpressible("minProperties or maxProperties", place, "beside many optional properties")
        for size in range(len(optional) + 1):
            for there in combinations(optional, size):
                if high is not None and size > high:
                    continue
                absent = [name for name in optional if name not in there]
                yield replace(
                    _with_presence(branch, absent, there),
                    min_properties=branch.min_properties,
                    max_properties=branch.max_properties,
                )

    def _value_of(self, branch: ObjectBranch, name: str) -> Expr:
        """What a property's value must satisfy; FALSE for a name that `propertyNames` forbids."""
        for expr in branch.names:
            if self._sets.is_empty(conjunction([expr, Values((canonical(name),))])):
                return FALSE
        return branch.value_of(name)

    def object_shape(self, branch: ObjectBranch, place: str) -> ObjectShape:
        """All that the branch's schemas say of names and values, as one."""
        names = branch.declared()
        key_filter = self._key_filter(branch, place) if branch.names else None
        if isinstance(key_filter, frozenset):
            names += self._sets.in_order(key_filter - set(names))
        patterned = [
            keys
            for keys in branch.keys
            if any(expr != TRUE for _, expr in keys.patterns) or (keys.patterns and keys.additional != TRUE)
        ]
        if len(patterned) > 1 and any(keys.additional != TRUE for keys in patterned):
            raise Inexpressible("patternProperties", place, "of several schemas, not all open")
        base = conjunction(keys.additional for keys in branch.keys if keys not in patterned)
        properties = {name: self._value_of(branch, name) for name in names}
        patterns: dict[str, Expr] = {}
        for keys in patterned:
            for pattern, expr in keys.patterns:
                patterns[pattern] = conjunction([patterns.get(pattern, TRUE), expr, base])
        additional = conjunction(keys.additional for keys in branch.keys)
        if key_filter is not None:
            if patterns:
                raise Inexpressible("propertyNames", place, "beside patternProperties")
            if isinstance(key_filter, str) and additional != FALSE:
                # A declared name that fits the pattern is held to `additional` too: stricter, and only where both say
                # something of it.
                patterns = {key_filter: additional}
            additional = FALSE
        return ObjectShape(properties, patterns, additional)

    def _of_object(self, branch: ObjectBranch, place: str) -> dict[str, Any] | None:
        shape = self.object_shape(branch, place)
        properties: dict[str, Any] = {}
        for name, expr in shape.properties.items():
            inner = self._schema(expr)
            if inner is False and name in branch.required:
                return None
            properties[name] = inner
        patterns = {pattern: self._schema(expr) for pattern, expr in shape.patterns.items()}
        additional = self._schema(shape.additional)
        return self._write_object(branch, properties, patterns, additional, place)

    def _write_object(
        self, branch: ObjectBranch, properties: dict[str, Any], patterns: dict[str, Any], additional: Any, place: str
    ) -> dict[str, Any]:
        can = self._can
        if not can.escaped_names:
            for name in properties:
                if canonical(name) != f'"{name}"':
                    raise Inexpressible("properties", place, f"the name {name!r:.60}, which JSON writes with escapes")
        if patterns and not can.pattern_properties:
            raise Inexpressible("patternProperties", place)
        forbidden = [name for name, inner in properties.items() if inner is False]
        if forbidden and not can.forbidden_properties:
            if additional is not False and not (not can.open_objects and len(forbidden) < len(properties)):
                raise Inexpressible("a forbidden property", place, repr(forbidden[0]))
            properties = {name: inner for name, inner in properties.items() if inner is not False}
        if not can.open_objects and additional is not False and properties:
            self._sets.warnings[f"{can.name} makes no properties but the declared ones at {place}"] = None
            additional = False
        schema: dict[str, Any] = {"type": "object"}
        if properties or additional is False:
            schema["properties"] = properties
        if patterns:
            schema["patternProperties"] = patterns
        if branch.required:
            schema["required"] = list(branch.required)
        if additional != {} or not can.native:
            schema["additionalProperties"] = additional
        if branch.min_properties > len(branch.required):
            schema["minProperties"] = branch.min_properties
        if branch.max_properties is not None:
            schema["maxProperties"] = branch.max_properties
        return schema

    def _key_filter(self, branch: ObjectBranch, place: str) -> frozenset[str] | str:
        """What names are allowed: a set of them, or one pattern. Raises Inexpressible."""
        strings = [one for one in self._sets.branches(conjunction(branch.names)) if isinstance(one, StringBranch)]
        if all(one.values is not None for one in strings):
            return frozenset(value for one in strings for value in one.values or ())
        if len(strings) != 1:
            raise Inexpressible("propertyNames", place, "several kinds of names")
        (names,) = strings
        rules = [*names.patterns]
        if names.min_length or names.max_length is not None:
            longest = "" if names.max_length is None else names.max_length
            rules.append(rf"^[\s\S]{{{names.min_length},{longest}}}$")
        if names.excluded:
            rules.append(f"^{pattern_of_all_but(names.excluded)}$")
        if len(rules) > 1 or names.formats:
            raise Inexpressible("propertyNames", place, "several rules at once")
        return rules[0] if rules else r"^[\s\S]*$"


def _referred(schema: Any) -> Iterator[str]:
    """Names of the definitions that a written schema refers to (and, rarely, other texts)."""
    if isinstance(schema, list):
        for inner in schema:
            yield from _referred(inner)
    elif isinstance(schema, dict):
        for key, inner in schema.items():
            if key == "$ref" and isinstance(inner, str):
                yield inner.removeprefix("#/$defs/")
            else:
                yield from _referred(inner)


def _pointer(expr: Expr) -> str:
    if isinstance(expr, Leaf):
        return expr.place.pointer
    parts = expr.parts if isinstance(expr, And) else ()
    return next((pointer for part in parts if (pointer := _pointer(part)) != "#"), "#")


def _intervals(branch: NumberBranch) -> Iterator[tuple[Fraction | None, bool, Fraction | None, bool]]:
    """(low, open, high, open) of the pieces that the excluded numbers leave of the branch's interval."""
    low, low_open = branch.low, branch.low_open
    for hole in sorted(branch.excluded):
        if (low is None or hole >= low) and (branch.high is None or hole <= branch.high):
            if low is None or hole > low:
                yield low, low_open, hole, True
            low, low_open = hole, True
    if low is None or branch.high is None or low < branch.high or (low == branch.high and not low_open):
        yield low, low_open, branch.high, branch.high_open


def _choices(
    optional: Sequence[str], low: int, high: int | None, place: str
) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """(absent, present) names, cases whose union is "between low and high of them are there"."""
    if high is None or high >= len(optional):
        # The first `low` names that are there: all before and between them are absent, all behind are free.
        if math.comb(len(optional), low) > _MAX_CASES:
            raise Inexpressible("minProperties", place, "beside many optional properties")
        for present in combinations(optional, low):
            last = optional.index(present[-1])
            yield [name for name in optional[:last] if name not in present], present
        return
    sizes = range(low, high + 1)
    if sum(math.comb(len(optional), size) for size in sizes) > _MAX_CASES:
        raise Inexpressible("maxProperties", place, "beside many optional properties")
    for size in sizes:
        for present in combinations(optional, size):
            yield [name for name in optional if name not in present], present


def _with_presence(branch: ObjectBranch, absent: Iterable[str], present: Iterable[str]) -> ObjectBranch:
    forbidden = tuple((name, FALSE) for name in absent)
    return replace(
        branch,
        keys=(*branch.keys, Keys(forbidden)) if forbidden else branch.keys,
        required=tuple(dict.fromkeys([*branch.required, *present])),
        min_properties=0,
        max_properties=None,
    )
