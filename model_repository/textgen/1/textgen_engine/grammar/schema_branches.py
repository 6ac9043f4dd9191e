"""What sets of JSON values are made of: unexpanded expressions over subschemas, and branches of one JSON type each.

Data and the questions one of them can answer alone; what is done with several is in schema_sets.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from textgen_engine.grammar.references import Place


class Inexpressible(Exception):
    """A keyword that has no form as a union of branches, with its place."""

    def __init__(self, keyword: str, place: str, reason: str = "") -> None:
        super().__init__(f"{keyword} at {place}")
        self.keyword, self.place, self.reason = keyword, place, reason


# Expressions: what a subschema allows, unexpanded. Compared by identity of the document's nodes.


@dataclass(frozen=True)
class Leaf:
    """A subschema of the document."""

    place: Place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leaf) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, str]:
        return (id(self.place.node) if isinstance(self.place.node, dict) else self.place.node, self.place.base)


@dataclass(frozen=True)
class Values:
    """Exactly these JSON values, as canonical texts."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Not:
    inner: Expr


@dataclass(frozen=True)
class And:
    """Parts are never And, and occur once."""

    parts: tuple[Expr, ...]


@dataclass(frozen=True)
class Or:
    parts: tuple[Expr, ...]


Expr = Leaf | Values | Not | And | Or
TRUE: Expr = And(())
FALSE: Expr = Or(())


def conjunction(parts: Iterable[Expr]) -> Expr:
    flat: dict[Expr, None] = {}
    for part in parts:
        for inner in part.parts if isinstance(part, And) else (part,):
            if inner == FALSE or (isinstance(inner, Leaf) and inner.place.node is False):
                return FALSE
            if not (isinstance(inner, Leaf) and (inner.place.node is True or inner.place.node == {})):
                flat[inner] = None
    return next(iter(flat)) if len(flat) == 1 else And(tuple(flat))


def complement(expr: Expr) -> Expr:
    if expr == TRUE or (isinstance(expr, Leaf) and (expr.place.node is True or expr.place.node == {})):
        return FALSE
    if expr == FALSE or (isinstance(expr, Leaf) and expr.place.node is False):
        return TRUE
    return expr.inner if isinstance(expr, Not) else Not(expr)


# Branches: sets of values of one JSON type.


@dataclass(frozen=True)
class NullBranch:
    type = "null"


@dataclass(frozen=True)
class BooleanBranch:
    type = "boolean"
    values: frozenset[bool] = frozenset([True, False])


@dataclass(frozen=True)
class NumberBranch:
    """low, high None: unbounded. multiple: every value is a whole multiple of it (1: integers).

    not_multiples: no value is a whole multiple of any of these.
    """

    type = "number"
    low: Fraction | None = None
    low_open: bool = False
    high: Fraction | None = None
    high_open: bool = False
    multiple: Fraction | None = None
    values: frozenset[Fraction] | None = None
    excluded: frozenset[Fraction] = frozenset()
    not_multiples: frozenset[Fraction] = frozenset()

    def holds(self, value: Fraction) -> bool:
        return (
            (self.low is None or value > self.low or (value == self.low and not self.low_open))
            and (self.high is None or value < self.high or (value == self.high and not self.high_open))
            and (self.multiple is None or (value / self.multiple).denominator == 1)
            and (self.values is None or value in self.values)
            and value not in self.excluded
            and not any((value / other).denominator == 1 for other in self.not_multiples)
        )


@dataclass(frozen=True)
class StringBranch:
    """Lengths in characters. patterns are searched for (ECMA 262), formats asserted by name."""

    type = "string"
    min_length: int = 0
    max_length: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    values: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Contains:
    """At least `at_least` and at most `at_most` items match."""

    expr: Expr
    at_least: int
    at_most: int | None


@dataclass(frozen=True)
class ArrayBranch:
    """evaluated: how many leading items annotations cover; None for all of them."""

    type = "array"
    prefix: tuple[Expr, ...] = ()
    rest: Expr = TRUE
    min_items: int = 0
    max_items: int | None = None
    contains: tuple[Contains, ...] = ()
    unique: bool = False
    evaluated: int | None = 0

    def item(self, index: int) -> Expr:
        return self.prefix[index] if index < len(self.prefix) else self.rest


@dataclass(frozen=True)
class Keys:
    """One schema's say about property names and values: declared names, then patterns, then all others."""

    properties: tuple[tuple[str, Expr], ...] = ()
    patterns: tuple[tuple[str, Expr], ...] = ()
    additional: Expr = TRUE

    def value_of(self, name: str) -> Expr:
        """What the value of `name` must satisfy. Raises Inexpressible for a pattern Python cannot search."""
        found = [expr for declared, expr in self.properties if declared == name]
        found += [expr for pattern, expr in self.patterns if searches(pattern, name)]
        return conjunction(found) if found else self.additional


@dataclass(frozen=True)
class ObjectBranch:
    """All of `keys` hold. evaluated: names and patterns that annotations cover; None for all names."""

    type = "object"
    keys: tuple[Keys, ...] = ()
    required: tuple[str, ...] = ()
    min_properties: int = 0
    max_properties: int | None = None
    names: tuple[Expr, ...] = ()
    evaluated: tuple[frozenset[str], frozenset[str]] | None = (frozenset(), frozenset())

    def declared(self) -> list[str]:
        """Names that some schema mentions, in order of mention."""
        names = dict.fromkeys(name for keys in self.keys for name, _ in keys.properties)
        return list(names | dict.fromkeys(self.required))

    def value_of(self, name: str) -> Expr:
        return conjunction(keys.value_of(name) for keys in self.keys)


Branch = NullBranch | BooleanBranch | NumberBranch | StringBranch | ArrayBranch | ObjectBranch
FULL: tuple[Branch, ...] = (
    NullBranch(),
    BooleanBranch(),
    NumberBranch(),
    StringBranch(),
    ArrayBranch(),
    ObjectBranch(),
)


def searches(pattern: str, text: str) -> bool:
    """Whether an ECMA 262 pattern is found in a text; raises Inexpressible unless Python surely reads both alike."""
    shown = repr(pattern)[:100]
    if re.search(r"\\[pPukcCzZA]|\(\?[<P]|\[\]|\[\^\]", pattern):
        raise Inexpressible("pattern", shown, "its dialect")
    if text.endswith("\n") or re.search("[\r\u2028\u2029]", text) or (not text.isascii() and "\\" in pattern):
        raise Inexpressible("pattern", shown, f"beside the text {text!r:.100}")  # `$`, `.`, classes differ there
    try:
        return re.search(pattern, text, re.ASCII) is not None
    except (re.error, RecursionError, OverflowError):
        raise Inexpressible("pattern", shown, "its dialect") from None


def canonical(value: Any) -> str:
    """One text per JSON value: keys in order, whole numbers without a fraction."""

    def normal(inner: Any) -> Any:
        if isinstance(inner, float) and inner.is_integer():
            return int(inner)
        if isinstance(inner, list):
            return [normal(item) for item in inner]
        if isinstance(inner, dict):
            return {key: normal(item) for key, item in inner.items()}
        return inner

    return json.dumps(normal(value), ensure_ascii=False)
