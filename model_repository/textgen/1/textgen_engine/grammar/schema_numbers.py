"""Sets of numbers: from keywords, what two of them share, their values where they are few. Exact, in fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from textgen_engine.grammar.schema_branches import NumberBranch


def number_branch(node: dict[str, Any], *, integer: bool) -> NumberBranch:
    """The numbers that the keywords of one schema allow."""
    low = fraction(node["minimum"]) if "minimum" in node else None
    high = fraction(node["maximum"]) if "maximum" in node else None
    low_open = high_open = False
    # In draft 4 the exclusive keywords are booleans beside the bounds.
    bound = node.get("exclusiveMinimum")
    if bound is True:
        low_open = True
    elif bound is not None and bound is not False and (low is None or fraction(bound) >= low):
        low, low_open = fraction(bound), True
    bound = node.get("exclusiveMaximum")
    if bound is True:
        high_open = True
    elif bound is not None and bound is not False and (high is None or fraction(bound) <= high):
        high, high_open = fraction(bound), True
    multiple = fraction(node["multipleOf"]) if "multipleOf" in node else None
    if integer:
        multiple = Fraction(1) if multiple is None else _least_common_multiple(Fraction(1), multiple)
    return NumberBranch(low, low_open, high, high_open, multiple)


def meet_numbers(left: NumberBranch, right: NumberBranch) -> NumberBranch:
    """The numbers in both."""
    low, low_open = max(
        (left.low, left.low_open),
        (right.low, right.low_open),
        key=lambda b: (-math.inf if b[0] is None else b[0], b[1]),
    )
    high, high_open = min(
        (left.high, left.high_open),
        (right.high, right.high_open),
        key=lambda b: (math.inf if b[0] is None else b[0], not b[1]),
    )
    multiple = left.multiple if right.multiple is None else right.multiple
    if left.multiple is not None and right.multiple is not None:
        multiple = _least_common_multiple(left.multiple, right.multiple)
    values = (
        left.values if right.values is None else right.values if left.values is None else left.values & right.values
    )
    both = NumberBranch(
        low,
        low_open,
        high,
        high_open,
        multiple,
        values,
        left.excluded | right.excluded,
        left.not_multiples | right.not_multiples,
    )
    if values is None:
        return both
    return NumberBranch(values=frozenset(value for value in values if both.holds(value)))


def is_empty_number(branch: NumberBranch) -> bool:
    """True only where provably no number is in it."""
    if branch.values is not None:
        return not branch.values
    if branch.multiple is not None and any(
        (branch.multiple / other).denominator == 1 for other in branch.not_multiples
    ):
        return True
    if branch.low is None or branch.high is None:
        return False
    if branch.low == branch.high:
        return not branch.holds(branch.low)
    if branch.low > branch.high:
        return True
    numbers = finite_numbers(branch, 16)
    return numbers is not None and not numbers


def finite_numbers(branch: NumberBranch, most: int) -> list[Fraction] | None:
    """The branch's values in order where they are at most about `most`; else None."""
    if branch.values is not None:
        return sorted(branch.values)
    if branch.low is None or branch.high is None:
        return None
    if branch.multiple is None:
        return [branch.low] if branch.low == branch.high and branch.holds(branch.low) else None
    first, last = math.ceil(branch.low / branch.multiple), math.floor(branch.high / branch.multiple)
    if last - first > most + len(branch.excluded):
        return None
    return [value for k in range(first, last + 1) if branch.holds(value := k * branch.multiple)]


def _least_common_multiple(left: Fraction, right: Fraction) -> Fraction:
    denominator = math.lcm(left.denominator, right.denominator)
    return Fraction(math.lcm(int(left * denominator), int(right * denominator)), denominator)


def fraction(value: int | float) -> Fraction:
    """The number a JSON text wrote (0.1 is one tenth, not the nearest binary fraction)."""
    return Fraction(value) if isinstance(value, int) else Fraction(repr(value))


def plain_number(value: Fraction) -> int | float:
    """As Python's json writes it."""
    return int(value) if value.denominator == 1 else float(value)
