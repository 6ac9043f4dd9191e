"""The values of a JSON type that a branch leaves out: one branch for each of its rules, broken.

Exact, but for "an item that breaks the rule", which is looked for among the first few; that is said to who asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

from textgen_engine.grammar.schema_branches import (
    FALSE,
    TRUE,
    ArrayBranch,
    BooleanBranch,
    Branch,
    Contains,
    Inexpressible,
    Keys,
    NumberBranch,
    ObjectBranch,
    StringBranch,
    complement,
)

# Places where an item asked for by `contains`, or one that breaks a rule, is looked for, counted from the first.
CONTAINS_WINDOW = 8


def complement_in_type(branch: Branch, place: str, warn_stricter: Callable[[str], None]) -> Iterator[Branch]:
    """Values of the branch's own type that are not in it. place: for messages. Raises Inexpressible."""
    if isinstance(branch, BooleanBranch):
        yield BooleanBranch(frozenset([True, False]) - branch.values)
    elif isinstance(branch, NumberBranch):
        yield from _complement_number(branch)
    elif isinstance(branch, StringBranch):
        if branch.values is not None:
            yield StringBranch(excluded=branch.values)
            return
        if branch.patterns or branch.formats:
            raise Inexpressible("not", place, "of a pattern or format")
        if branch.min_length:
            yield StringBranch(max_length=branch.min_length - 1)
        if branch.max_length is not None:
            yield StringBranch(min_length=branch.max_length + 1)
        if branch.excluded:
            yield StringBranch(values=branch.excluded)
    elif isinstance(branch, ArrayBranch):
        yield from _complement_array(branch, place, warn_stricter)
    elif isinstance(branch, ObjectBranch):
        yield from _complement_object(branch, place)


def _complement_number(branch: NumberBranch) -> Iterator[Branch]:
    if branch.values is not None:
        yield NumberBranch(excluded=branch.values)
        return
    if branch.low is not None:
        yield NumberBranch(high=branch.low, high_open=not branch.low_open)
    if branch.high is not None:
        yield NumberBranch(low=branch.high, low_open=not branch.high_open)
    if branch.excluded:
        yield NumberBranch(values=branch.excluded)
    if branch.multiple is not None:
        yield NumberBranch(not_multiples=frozenset([branch.multiple]))
    for other in branch.not_multiples:
        yield NumberBranch(multiple=other)


def _complement_array(branch: ArrayBranch, place: str, warn_stricter: Callable[[str], None]) -> Iterator[Branch]:
    if branch.unique:
        raise Inexpressible("not", place, "of uniqueItems")
    if branch.min_items:
        yield ArrayBranch(max_items=branch.min_items - 1)
    if branch.max_items is not None:
        yield ArrayBranch(min_items=branch.max_items + 1)
    for index, expr in enumerate(branch.prefix):
        if expr != TRUE:
            yield ArrayBranch((*[TRUE] * index, complement(expr)), TRUE, index + 1)
    if branch.rest == FALSE:
        yield ArrayBranch(min_items=len(branch.prefix) + 1)
    elif branch.rest != TRUE:
        warn_stricter(f"`not` at {place}: an item that breaks the rule is among the first {CONTAINS_WINDOW}")
        for index in range(len(branch.prefix), len(branch.prefix) + CONTAINS_WINDOW):
            yield ArrayBranch((*[TRUE] * index, complement(branch.rest)), TRUE, index + 1)
    for wanted in branch.contains:
        if wanted.at_least > 0:
            yield ArrayBranch(contains=(Contains(wanted.expr, 0, wanted.at_least - 1),))
        if wanted.at_most is not None:
            yield ArrayBranch(contains=(Contains(wanted.expr, wanted.at_most + 1, None),))


def _complement_object(branch: ObjectBranch, place: str) -> Iterator[Branch]:
    for name in branch.required:
        yield ObjectBranch((Keys(((name, FALSE),)),))
    if branch.min_properties:
        yield ObjectBranch(max_properties=branch.min_properties - 1)
    if branch.max_properties is not None:
        yield ObjectBranch(min_properties=branch.max_properties + 1)
    for keys in branch.keys:
        for name, expr in keys.properties:
            if expr != TRUE:
                yield ObjectBranch((Keys(((name, complement(keys.value_of(name))),)),), (name,))
        if any(expr != TRUE for _, expr in keys.patterns):
            raise Inexpressible("not", place, "of patternProperties")
        if keys.additional != TRUE:
            # Some name that is not declared, with a value that breaks the rule: name by name it has no form, but
            # "more names than the declared ones that are there" has, when any undeclared name is too many.
            declared = [name for name, _ in keys.properties]
            if keys.additional != FALSE or keys.patterns or len(declared) > 4:
                raise Inexpressible("not", place, "of additionalProperties")
            for size in range(len(declared) + 1):
                for there in combinations(declared, size):
                    absent = tuple((name, FALSE) for name in declared if name not in there)
                    yield ObjectBranch((Keys(absent),), there, size + 1)
    if branch.names:
        raise Inexpressible("not", place, "of propertyNames")
