"""JSON Schemas as sets of values: union, intersection and complement, per JSON type.

A schema is brought into disjunctive form, a list of `Branch`es of one JSON type each, whose union is the set of values
it allows. Subschemas below a branch (of properties, of items) stay unexpanded `Expr`essions until somebody needs them,
so recursive schemas stay finite. In this form `not`, `oneOf`, `if`, dependencies and `unevaluated*` become plain
unions and intersections; what has no such form raises `Inexpressible`, and is then refused by name and place.

Exact unless said otherwise: where a step is stricter than the schema (never looser), `SchemaSets.warnings` says so.
What the sets are made of is in schema_branches.py, sets of numbers in schema_numbers.py, what a branch leaves out in
schema_complement.py. After Habib, Shinnar, Hirzel, Pradel: "Type Safety with JSON Subschema" (2019), section 3,
extended by complements.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from textgen_engine.grammar.references import Place, SchemaDocument
from textgen_engine.grammar.schema_branches import (
    FALSE,
    FULL,
    TRUE,
    And,
    ArrayBranch,
    BooleanBranch,
    Branch,
    Contains,
    Expr,
    Inexpressible,
    Keys,
    Leaf,
    Not,
    NullBranch,
    NumberBranch,
    ObjectBranch,
    Or,
    StringBranch,
    Values,
    canonical,
    complement,
    conjunction,
    searches,
)
from textgen_engine.grammar.schema_complement import CONTAINS_WINDOW, complement_in_type
from textgen_engine.grammar.schema_numbers import (
    finite_numbers,
    fraction,
    is_empty_number,
    meet_numbers,
    number_branch,
    plain_number,
)

_MAX_UNIQUE_SEQUENCES = 512


@dataclass
class SchemaSets:
    """Set operations over one document, remembered. Raises Inexpressible also when the work exceeds `max_branches`.

    Some complements are stricter than they should be ("an item that breaks the rule" is looked for among the first few
    only, with a warning). A set that is too small may be intersected and united, but its complement would be too large,
    and it may seem empty where it is not; `_num_stricter` grows whenever such a set is used, so that those who must not
    rely on one can tell.
    """

    document: SchemaDocument
    max_branches: int
    warnings: dict[str, None] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)  # strings of const and enum, in the document's order
    _num_stricter: int = 0
    _stricter: set[tuple[Expr, bool]] = field(default_factory=set)
    _num_branches: int = 0
    _expanded: dict[tuple[Expr, bool], tuple[Branch, ...]] = field(default_factory=dict)
    _open: set[tuple[Expr, bool]] = field(default_factory=set)
    _empty: dict[Expr, bool] = field(default_factory=dict)

    def in_order(self, values: Iterable[str]) -> list[str]:
        """Strings of const and enum as the document has them."""
        return sorted(values, key=lambda value: (self.ranks.get(value, len(self.ranks)), value))

    # Expansion

    def branches(self, expr: Expr, annotated: bool = False) -> tuple[Branch, ...]:
        """The branches whose union is `expr`; none of them is provably empty.

        annotated: also follow which properties and items are evaluated (for unevaluated*); every combination of the
        members of an anyOf is then a branch of its own, since each adds its annotations.
        """
        key = (expr, annotated)
        if key in self._expanded:
            self._num_stricter += key in self._stricter
            return self._expanded[key]
        if key in self._open:
            place = expr.place.pointer if isinstance(expr, Leaf) else "#"
            raise Inexpressible("$ref", place, "a reference that comes back to itself")
        self._open.add(key)
        before = self._num_stricter
        try:
            found = self._expand(expr, annotated)
        finally:
            self._open.discard(key)
        if self._num_stricter > before:
            self._stricter.add(key)
        self._expanded[key] = found
        return found

    def _expand(self, expr: Expr, annotated: bool) -> tuple[Branch, ...]:
        if isinstance(expr, Leaf):
            return self._expand_leaf(expr.place, annotated)
        if isinstance(expr, Values):
            return self._values(expr.texts)
        if isinstance(expr, Or):
            return self._union(self.branches(part, annotated) for part in expr.parts)
        if isinstance(expr, And):
            product: tuple[Branch, ...] = FULL
            for part in expr.parts:
                product = self.intersect(product, self.branches(part, annotated))
            return product
        before = self._num_stricter
        inner = self.branches(expr.inner)
        if self._num_stricter > before:
            raise Inexpressible("not", self._pointer(expr), "of a rule that is itself only approximated")
        return self._complement(inner, self._pointer(expr))

    @staticmethod
    def _pointer(expr: Expr) -> str:
        while isinstance(expr, Not):
            expr = expr.inner
        return expr.place.pointer if isinstance(expr, Leaf) else "#"

    def _union(self, parts: Iterable[Sequence[Branch]]) -> tuple[Branch, ...]:
        return tuple(dict.fromkeys(branch for part in parts for branch in part))

    def _expand_leaf(self, place: Place, annotated: bool) -> tuple[Branch, ...]:
        node = place.node
        if node is True or node == {}:
            return FULL
        if node is False:
            return ()
        annotated = annotated or "unevaluatedProperties" in node or "unevaluatedItems" in node
        if "$ref" in node and self.document.is_old_draft:
            node = {"$ref": node["$ref"]}
        before = self._num_stricter
        found = self._own_keywords(place, node)
        for reference, resolve in (("$ref", self.document.resolve), ("$dynamicRef", self.document.resolve_dynamic)):
            if reference in node:
                found = self.intersect(found, self.branches(Leaf(resolve(place, node[reference])), annotated))
        for index, inner in enumerate(node.get("allOf", ())):
            found = self.intersect(found, self.branches(self._leaf(place, ("allOf", str(index)), inner), annotated))
        if "not" in node:
            found = self.intersect(found, self._opposite(self._leaf(place, ("not",), node["not"])))
        if "if" in node and ("then" in node or "else" in node or annotated):
            found = self.intersect(found, self._conditional(place, node, annotated))
        found = self._dependencies(place, node, found, annotated)
        if "anyOf" in node:
            parts = [self._leaf(place, ("anyOf", str(i)), inner) for i, inner in enumerate(node["anyOf"])]
            found = self.intersect(found, self._any_of(place, parts, annotated))
        if "oneOf" in node:
            parts = [self._leaf(place, ("oneOf", str(i)), inner) for i, inner in enumerate(node["oneOf"])]
            found = self._one_of(place, found, parts, annotated, exact=self._num_stricter == before)
        if "unevaluatedItems" in node:
            rest = self._leaf(place, ("unevaluatedItems",), node["unevaluatedItems"])
            found = self._keep(self._unevaluated_items(branch, rest, place) for branch in found)
        if "unevaluatedProperties" in node:
            rest = self._leaf(place, ("unevaluatedProperties",), node["unevaluatedProperties"])
            found = self._keep(_unevaluated_properties(branch, rest) for branch in found)
        return found

    def _leaf(self, parent: Place, path: tuple[str, ...], node: Any) -> Expr:
        return Leaf(self.document.child(parent, path, node))

    def _any_of(self, place: Place, parts: Sequence[Expr], annotated: bool) -> tuple[Branch, ...]:
        if not annotated:
            return self._union(self.branches(part) for part in parts)
        if len(parts) > 4:
            raise Inexpressible("unevaluated*", place.pointer, "beside an anyOf of more than 4")
        chosen: list[Sequence[Branch]] = []
        for size in range(1, len(parts) + 1):
            chosen += [self.branches(conjunction(some), annotated=True) for some in combinations(parts, size)]
        return self._union(chosen)

    def _opposite(self, expr: Expr) -> tuple[Branch, ...]:
        """The complement; what it says nothing of, it does not evaluate either."""
        return tuple(
            replace(branch, evaluated=0)
            if isinstance(branch, ArrayBranch)
            else replace(branch, evaluated=(frozenset(), frozenset()))
            if isinstance(branch, ObjectBranch)
            else branch
            for branch in self.branches(complement(expr))
        )

    def _one_of(
        self, place: Place, found: tuple[Branch, ...], parts: Sequence[Expr], annotated: bool, exact: bool
    ) -> tuple[Branch, ...]:
        """Each member less the others; where members cannot meet (the usual case), simply their union."""
        before = self._num_stricter
        members = [self.intersect(found, self.branches(part, annotated)) for part in parts]
        if self._num_stricter > before or not exact:
            raise Inexpressible("oneOf", place.pointer, "beside a rule that is itself only approximated")
        result: list[Sequence[Branch]] = []
        for index, member in enumerate(members):
            for other, part in enumerate(parts):
                if other != index and member and self.intersect(member, members[other]):
                    member = self.intersect(member, self._opposite(part))
            result.append(member)
        return self._union(result)

    def _conditional(self, place: Place, node: dict[str, Any], annotated: bool) -> tuple[Branch, ...]:
        condition = self._leaf(place, ("if",), node["if"])
        yes = self.branches(condition, annotated)
        no = self._opposite(condition)
        if "then" in node:
            yes = self.intersect(yes, self.branches(self._leaf(place, ("then",), node["then"]), annotated))
        if "else" in node:
            no = self.intersect(no, self.branches(self._leaf(place, ("else",), node["else"]), annotated))
        return self._union((yes, no))

    def _dependencies(
        self, place: Place, node: dict[str, Any], found: tuple[Branch, ...], annotated: bool
    ) -> tuple[Branch, ...]:
        """A name that asks for other names, or for a schema: either it is absent, or both hold."""
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, needed in node.get(keyword, {}).items():
                absent = [ObjectBranch(keys=(Keys(properties=((name, FALSE),)),))]
                others = [branch for branch in FULL if not isinstance(branch, ObjectBranch)]
                present: tuple[Branch, ...] = (ObjectBranch(required=(name,)),)
                if isinstance(needed, list):
                    present = (ObjectBranch(required=tuple(dict.fromkeys([name, *needed]))),)
                else:
                    inner = self._leaf(place, (keyword, name), needed)
                    present = self.intersect(present, self.branches(inner, annotated))
                found = self.intersect(found, self._union((others, absent, present)))
        return found

    def _values(self, texts: Sequence[str]) -> tuple[Branch, ...]:
        """Branches that hold exactly the given JSON values."""
        strings, numbers, booleans = set(), set(), set()
        others: list[Branch] = []
        for text in texts:
            value = json.loads(text)
            if value is None:
                others.append(NullBranch())
            elif isinstance(value, bool):
                booleans.add(value)
            elif isinstance(value, int | float):
                numbers.add(fraction(value))
            elif isinstance(value, str):
                strings.add(value)
                self.ranks.setdefault(value, len(self.ranks))
            elif isinstance(value, list):
                items = tuple(Values((canonical(item),)) for item in value)
                others.append(ArrayBranch(items, FALSE, len(items), len(items)))
            else:
                exact = tuple((name, Values((canonical(inner),))) for name, inner in value.items())
                others.append(ObjectBranch((Keys(exact, (), FALSE),), tuple(value)))
        if booleans:
            others.append(BooleanBranch(frozenset(booleans)))
        if numbers:
            others.append(NumberBranch(values=frozenset(numbers)))
        if strings:
            others.append(StringBranch(values=frozenset(strings)))
        return tuple(dict.fromkeys(others))

    def _own_keywords(self, place: Place, node: dict[str, Any]) -> tuple[Branch, ...]:
        """The keywords that speak of one type each, as one branch per allowed type."""
        types = node.get("type", ["null", "boolean", "number", "string", "array", "object"])
        allowed = {types} if isinstance(types, str) else set(types)
        found: list[Branch] = []
        if "null" in allowed:
            found.append(NullBranch())
        if "boolean" in allowed:
            found.append(BooleanBranch())
        if "number" in allowed or "integer" in allowed:
            found.append(number_branch(node, integer="number" not in allowed))
        if "string" in allowed:
            patterns = (node["pattern"],) if "pattern" in node else ()
            formats = (node["format"],) if "format" in node else ()
            longest = int(node["maxLength"]) if "maxLength" in node else None
            found.append(StringBranch(int(node.get("minLength", 0)), longest, patterns, formats))
        if "array" in allowed:
            found.append(self._array(place, node))
        if "object" in allowed:
            found.append(self._object(place, node))
        branches = self._keep(found)
        for keyword, values in (("const", [node.get("const")]), ("enum", node.get("enum"))):
            if keyword in node and isinstance(values, list):
                branches = self.intersect(branches, self._values([canonical(value) for value in values]))
        return branches

    def _array(self, place: Place, node: dict[str, Any]) -> ArrayBranch:
        prefix_key = "prefixItems" if "prefixItems" in node else "items"
        prefix_nodes = node.get(prefix_key, [])
        rest_key = "items"
        if isinstance(node.get("items"), list):
            prefix_key, prefix_nodes, rest_key = "items", node["items"], "additionalItems"
        elif "prefixItems" not in node:
            prefix_nodes = []
        prefix = tuple(self._leaf(place, (prefix_key, str(i)), inner) for i, inner in enumerate(prefix_nodes))
        rest = self._leaf(place, (rest_key,), node[rest_key]) if rest_key in node else TRUE
        contains: tuple[Contains, ...] = ()
        if "contains" in node:
            at_most = int(node["maxContains"]) if "maxContains" in node else None
            inner = self._leaf(place, ("contains",), node["contains"])
            contains = (Contains(inner, int(node.get("minContains", 1)), at_most),)
        return ArrayBranch(
            prefix,
            conjunction([rest]),
            int(node.get("minItems", 0)),
            int(node["maxItems"]) if "maxItems" in node else None,
            contains,
            bool(node.get("uniqueItems", False)),
            None if rest_key in node else len(prefix),
        )

    def _object(self, place: Place, node: dict[str, Any]) -> ObjectBranch:
        properties = tuple(
            (name, self._leaf(place, ("properties", name), inner)) for name, inner in node.get("properties", {}).items()
        )
        patterns = tuple(
            (pattern, self._leaf(place, ("patternProperties", pattern), inner))
            for pattern, inner in node.get("patternProperties", {}).items()
        )
        additional = TRUE
        if "additionalProperties" in node:
            additional = self._leaf(place, ("additionalProperties",), node["additionalProperties"])
        keys = Keys(properties, patterns, conjunction([additional]))
        names: tuple[Expr, ...] = ()
        if "propertyNames" in node:
            names = (self._leaf(place, ("propertyNames",), node["propertyNames"]),)
        return ObjectBranch(
            (keys,) if keys != Keys() else (),
            tuple(dict.fromkeys(node.get("required", ()) if isinstance(node.get("required"), list) else ())),
            int(node.get("minProperties", 0)),
            int(node["maxProperties"]) if "maxProperties" in node else None,
            names,
            None
            if "additionalProperties" in node
            else (frozenset(name for name, _ in properties), frozenset(pattern for pattern, _ in patterns)),
        )

    # Intersection and emptiness

    def intersect(self, left: Sequence[Branch], right: Sequence[Branch]) -> tuple[Branch, ...]:
        if left == FULL:
            return tuple(right)
        if right == FULL:
            return tuple(left)
        return self._keep(_meet(a, b) for a in left for b in right if type(a) is type(b))

    def _keep(self, branches: Iterable[Branch | None]) -> tuple[Branch, ...]:
        """The branches that are not provably empty, each once."""
        kept: dict[Branch, None] = {}
        for branch in branches:
            if branch is not None and branch not in kept and not self._is_empty_branch(branch):
                kept[branch] = None
                self._num_branches += 1
                if self._num_branches > self.max_branches:
                    raise Inexpressible("schema", "#", "its alternatives are too many")
        return tuple(kept)

    def is_empty(self, expr: Expr) -> bool:
        """True only where provably no value satisfies `expr`."""
        if expr not in self._empty:
            self._empty[expr] = False  # while asking, and for what refers to itself
            before = self._num_stricter
            try:
                self._empty[expr] = not self.branches(expr) and self._num_stricter == before
            except Inexpressible:
                self._empty[expr] = False
            self._num_stricter = before  # asking is not using
        return self._empty[expr]

    def _is_empty_branch(self, branch: Branch) -> bool:
        if isinstance(branch, BooleanBranch):
            return not branch.values
        if isinstance(branch, NumberBranch):
            return is_empty_number(branch)
        if isinstance(branch, StringBranch):
            if branch.values is not None:
                return not branch.values
            return branch.max_length is not None and branch.max_length < branch.min_length
        if isinstance(branch, ArrayBranch):
            if branch.max_items is not None and branch.max_items < branch.min_items:
                return True
            needed = min(branch.min_items, len(branch.prefix) + 1)
            return any(self.is_empty(branch.item(index)) for index in range(needed))
        if isinstance(branch, ObjectBranch):
            if branch.max_properties is not None and branch.max_properties < len(branch.required):
                return True
            try:
                return any(self.is_empty(branch.value_of(name)) for name in branch.required) or any(
                    self.is_empty(conjunction([expr, Values((canonical(name),))]))
                    for expr in branch.names
                    for name in branch.required
                )
            except Inexpressible:
                return False
        return False

    # Complement

    def _complement(self, branches: Sequence[Branch], place: str) -> tuple[Branch, ...]:
        result: tuple[Branch, ...] = FULL
        for branch in branches:
            others: list[Branch] = [full for full in FULL if type(full) is not type(branch)]
            left_out = complement_in_type(branch, place, self._warn_stricter)
            result = self.intersect(result, self._keep([*others, *left_out]))
        return result

    def _warn_stricter(self, text: str) -> None:
        self.warnings[text] = None
        self._num_stricter += 1

    # Rules that need a bounded number of cases

    def solved_array(self, branch: ArrayBranch, place: str) -> list[ArrayBranch]:
        """The same arrays (or, with a warning, fewer) without `contains` and `unique`. Raises Inexpressible."""
        pending = [replace(branch, contains=())]
        for wanted in branch.contains:
            pending = [solved for one in pending for solved in self._solve_contains(one, wanted, place)]
        if branch.unique:
            pending = [solved for one in pending for solved in self._solve_unique(one, place)]
        return pending

    def _solve_contains(self, branch: ArrayBranch, wanted: Contains, place: str) -> list[ArrayBranch]:
        positions = [*branch.prefix, branch.rest]
        if wanted.at_least <= 0 and wanted.at_most is None:
            return [branch]
        if all(self.is_empty(conjunction([expr, complement(wanted.expr)])) for expr in positions):
            # Every item matches, so counting matches is counting items.
            most = branch.max_items
            if wanted.at_most is not None:
                most = wanted.at_most if most is None else min(most, wanted.at_most)
            return [replace(branch, min_items=max(branch.min_items, wanted.at_least), max_items=most)]
        window = CONTAINS_WINDOW if wanted.at_least <= 1 and wanted.at_most is None else 5
        if branch.max_items is not None and branch.max_items <= window:
            window = branch.max_items
        elif wanted.at_least > 0 or wanted.at_most:
            self.warnings[f"`contains` at {place}: the items it asks for stand among the first {window}"] = None
        solved: list[ArrayBranch] = []
        bounded = wanted.at_most is not None
        top = window if wanted.at_most is None else min(wanted.at_most, window)
        sizes = range(wanted.at_least, (wanted.at_least if not bounded else top) + 1)
        for size in sizes:
            for chosen in combinations(range(window), size):
                last = chosen[-1] + 1 if chosen else 0
                prefix = [
                    conjunction([branch.item(i), wanted.expr if i in chosen else complement(wanted.expr)])
                    if i in chosen or bounded
                    else branch.item(i)
                    for i in range(max(last, len(branch.prefix)))
                ]
                rest = conjunction([branch.rest, complement(wanted.expr)]) if bounded else branch.rest
                solved.append(replace(branch, prefix=tuple(prefix), rest=rest, min_items=max(branch.min_items, last)))
        if len(solved) > 64:
            raise Inexpressible("contains", place, "too many cases")
        return [one for one in solved if not self._is_empty_branch(one)]

    def _solve_unique(self, branch: ArrayBranch, place: str) -> list[ArrayBranch]:
        """Short arrays need no rule; of a few possible values all sequences without repetition are written out."""
        if branch.max_items is not None and branch.max_items <= 1:
            return [replace(branch, unique=False)]
        domains = [self.finite_values(expr, _MAX_UNIQUE_SEQUENCES) for expr in (*branch.prefix, branch.rest)]
        if any(domain is None for domain in domains):
            if self.is_empty(branch.rest) and self._positions_differ(branch.prefix):
                return [replace(branch, unique=False)]
            raise Inexpressible("uniqueItems", place, "items of more than a few values")
        longest = len({text for domain in domains for text in domain or ()})
        if branch.max_items is not None:
            longest = min(longest, branch.max_items)
        sequences: list[tuple[str, ...]] = [()]
        complete: list[tuple[str, ...]] = [()] if branch.min_items == 0 else []
        for index in range(longest):
            domain = domains[min(index, len(domains) - 1)] or ()
            sequences = [(*before, text) for before in sequences for text in domain if text not in before]
            if index + 1 >= branch.min_items:
                complete += sequences
            if len(sequences) > _MAX_UNIQUE_SEQUENCES or len(complete) > _MAX_UNIQUE_SEQUENCES:
                raise Inexpressible("uniqueItems", place, "items of more than a few values")
        return [ArrayBranch(tuple(Values((text,)) for text in one), FALSE, len(one), len(one)) for one in complete]

    def _positions_differ(self, prefix: Sequence[Expr]) -> bool:
        return all(self.is_empty(conjunction(pair)) for pair in combinations(prefix, 2))

    def finite_values(self, expr: Expr, most: int) -> list[str] | None:
        """The values of `expr` as canonical texts, where they are scalars and at most `most`; else None."""
        texts: list[str] = []
        try:
            for branch in self.branches(expr):
                if isinstance(branch, NullBranch):
                    texts.append("null")
                elif isinstance(branch, BooleanBranch):
                    texts += [canonical(value) for value in sorted(branch.values)]
                elif isinstance(branch, StringBranch) and branch.values is not None:
                    texts += [canonical(value) for value in self.in_order(branch.values)]
                elif isinstance(branch, NumberBranch) and (numbers := finite_numbers(branch, most)) is not None:
                    texts += [canonical(plain_number(value)) for value in numbers]
                else:
                    return None
        except Inexpressible:
            return None
        texts = list(dict.fromkeys(texts))
        return texts if len(texts) <= most else None

    def _unevaluated_items(self, branch: Branch, rest: Expr, place: Place) -> Branch | None:
        if not isinstance(branch, ArrayBranch) or branch.evaluated is None:
            return branch
        if branch.contains:
            raise Inexpressible("unevaluatedItems", place.pointer, "beside contains")
        covered = branch.evaluated
        prefix = tuple(branch.item(i) for i in range(covered))
        tail = tuple(conjunction([expr, rest]) for expr in branch.prefix[covered:])
        return replace(branch, prefix=prefix + tail, rest=conjunction([branch.rest, rest]), evaluated=None)


def _unevaluated_properties(branch: Branch, rest: Expr) -> Branch | None:
    if not isinstance(branch, ObjectBranch) or branch.evaluated is None:
        return branch
    names, patterns = branch.evaluated
    keys = Keys(tuple((n, TRUE) for n in sorted(names)), tuple((p, TRUE) for p in sorted(patterns)), rest)
    return replace(branch, keys=(*branch.keys, keys), evaluated=None)


def _meet(left: Branch, right: Branch) -> Branch | None:
    """The values in both; None where that is plainly nothing."""
    if isinstance(left, NullBranch):
        return left
    if isinstance(left, BooleanBranch) and isinstance(right, BooleanBranch):
        return BooleanBranch(left.values & right.values)
    if isinstance(left, NumberBranch) and isinstance(right, NumberBranch):
        return meet_numbers(left, right)
    if isinstance(left, StringBranch) and isinstance(right, StringBranch):
        return _meet_strings(left, right)
    if isinstance(left, ArrayBranch) and isinstance(right, ArrayBranch):
        length = max(len(left.prefix), len(right.prefix))
        return ArrayBranch(
            tuple(conjunction([left.item(i), right.item(i)]) for i in range(length)),
            conjunction([left.rest, right.rest]),
            max(left.min_items, right.min_items),
            _lower(left.max_items, right.max_items),
            tuple(dict.fromkeys(left.contains + right.contains)),
            left.unique or right.unique,
            None if left.evaluated is None or right.evaluated is None else max(left.evaluated, right.evaluated),
        )
    assert isinstance(left, ObjectBranch)
    assert isinstance(right, ObjectBranch)
    evaluated = None
    if left.evaluated is not None and right.evaluated is not None:
        evaluated = (left.evaluated[0] | right.evaluated[0], left.evaluated[1] | right.evaluated[1])
    return ObjectBranch(
        tuple(dict.fromkeys(left.keys + right.keys)),
        tuple(dict.fromkeys(left.required + right.required)),
        max(left.min_properties, right.min_properties),
        _lower(left.max_properties, right.max_properties),
        tuple(dict.fromkeys(left.names + right.names)),
        evaluated,
    )


def _meet_strings(left: StringBranch, right: StringBranch) -> StringBranch:
    both = StringBranch(
        max(left.min_length, right.min_length),
        _lower(left.max_length, right.max_length),
        tuple(dict.fromkeys(left.patterns + right.patterns)),
        tuple(dict.fromkeys(left.formats + right.formats)),
        left.values if right.values is None else right.values if left.values is None else left.values & right.values,
        left.excluded | right.excluded,
    )
    if both.values is None:
        return both
    # Values are checked one by one; a format beside them is an annotation.
    return StringBranch(
        values=frozenset(
            text
            for text in both.values
            if text not in both.excluded
            and len(text) >= both.min_length
            and (both.max_length is None or len(text) <= both.max_length)
            and all(searches(pattern, text) for pattern in both.patterns)
        )
    )


def _lower(left: int | None, right: int | None) -> int | None:
    return right if left is None else left if right is None else min(left, right)
