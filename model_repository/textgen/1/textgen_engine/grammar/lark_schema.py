r"""`LarkWriter`: a schema's set of values as a Lark grammar of llguidance, whose objects take members in any order.

The library's own form of an object makes the properties in the order of the schema. JSON objects have no order, and a
text in another one is as valid; so objects are written here, as *parametric* rules: a rule carries 64 bits, one bit per
declared property, set when the property has been made. With two required properties and one optional:

    o1: "{" m1::0x0 "}"
    m1::_ : "\"id\"" ":" r2 t1::set_bit(0) %if bit_clear(0)
        | "\"name\"" ":" r3 t1::set_bit(1) %if bit_clear(1)
        | "\"note\"" ":" r3 t1::set_bit(2) %if bit_clear(2)
    t1::_ : "" %if is_ones([0:2])
        | "," m1::_ %if or(not(is_ones([0:2])), bit_count_lt([2:3], 1))

No property twice, none that is required missing, no comma that nothing can follow. Names beside the declared ones are
a terminal that leaves the declared ones out. It compares names as they are written, so they are written in one way
only: without `\u` escapes (the library's own rule for such names takes `"\u0061"` for another name than `"a"`).

Everything without such objects below it is left to the library, as `%json {...}`; so is an object that has no form here
(more properties than bits, `patternProperties` beside other names), with its properties in the schema's order.

Knows the sets of schema_sets.py and Lark's syntax; imports no library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

from textgen_engine.grammar.plain_schema import SchemaWriter
from textgen_engine.grammar.regex import pattern_of_all_but
from textgen_engine.grammar.schema_branches import (
    ArrayBranch,
    Branch,
    Expr,
    Inexpressible,
    ObjectBranch,
    searches,
)
from textgen_engine.grammar.schema_sets import SchemaSets

_NUM_BITS = 63  # of the 64 of a rule's parameter: conditions cannot count to 64
_MAX_PREFIX = 32
_MAX_PARTS = 20_000  # members and items of all rules: a grammar beyond is megabytes
_BRACKETED = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\((?:\\.|\[(?:\\.|[^\]\\])*\]|[^()\[\\])*\)", re.DOTALL)
_NAMING = frozenset(
    [
        *("properties", "patternProperties", "propertyNames", "required", "minProperties"),
        *("dependencies", "dependentRequired", "dependentSchemas"),
    ]
)
# A name in the one way it is written where names are compared.
_NAME = r'/"([^"\\\x00-\x1F\x7F]|\\["\\bfnrt])*"/'
# Names that must differ are told apart by their first character: one kind for each of these, one for all others.
_INITIALS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class LibraryForm:
    """How the library is to read the schemas inside a grammar.

    blanks: what may stand between the tokens of JSON, a regular expression; None for nothing. options: `x-guidance` for
    the schemas, and `strict_options` for those with objects in which a name could be spelled with escapes to pass for
    another.
    """

    blanks: str | None
    options: dict[str, Any]
    strict_options: dict[str, Any]

    def options_of(self, schema: Any) -> dict[str, Any]:
        return self.strict_options if has_open_names(schema) else self.options


@dataclass(frozen=True)
class _Plain:
    """Left to the library: `%json {...}`."""

    schema: str


@dataclass(frozen=True)
class _Items:
    """An array, by rules of its items. rest None: nothing behind the prefix."""

    prefix: tuple[int, ...]
    rest: int | None
    at_least: int
    at_most: int | None


@dataclass(frozen=True)
class _Members:
    """An object. required, optional: (name, rule of the value). others: (schema of the names, rule of the values).

    least, most: how many members there may be beside the required ones. Where `others` are counted there are no
    optional ones (SchemaWriter.counted sees to it). `least` of more than 1 counts each entry of others once.
    """

    required: tuple[tuple[str, int], ...]
    optional: tuple[tuple[str, int], ...]
    others: tuple[tuple[str, int], ...]
    least: int
    most: int | None

    def made_by(self, rules: Set[int]) -> _Members:
        """Without the members whose values cannot be made."""
        optional = tuple(member for member in self.optional if member[1] in rules)
        others = tuple(other for other in self.others if other[1] in rules) if self.most != 0 else ()
        most = self.most if others else min(len(optional), len(optional) if self.most is None else self.most)
        return replace(self, optional=optional, others=others, most=most)

    def is_productive(self, rules: Set[int]) -> bool:
        able = self.made_by(rules)
        kinds = len(able.others) if self.least > 1 else None
        return (
            all(value in rules for _, value in self.required)
            and (able.most is None or self.least <= able.most)
            and (not able.others or kinds is None or self.least <= kinds)
        )


_Form = _Plain | _Items | _Members


class LarkWriter:
    """Writes the values of one expression."""

    def __init__(self, sets: SchemaSets, schemas: SchemaWriter, form: LibraryForm) -> None:
        self._sets = sets
        self._schemas = schemas
        self._form = form
        self._declaring: dict[Expr, bool] = {}
        self._rules: dict[tuple[Branch, ...], int] = {}
        self._forms: list[list[_Form]] = []  # by rule: what it makes is made by one of them
        self._num_parts = 0
        self._lines: list[str] = []
        self._leaves: dict[str, str] = {}

    def write(self, root: Expr) -> str | None:
        """The grammar, start rule `start`; None where it would say nothing that the library's own form does not.

        May be called once. Raises Inexpressible.
        """
        if not self._is_declaring(root):
            return None
        start = self._rule(root)
        productive = self._productive()
        if start not in productive:
            raise Inexpressible("schema", "#", "no value satisfies it")
        for rule in sorted(productive):
            self._write_rule(rule, productive)
        head = ['%llguidance {"ignore_once": true}']
        if self._form.blanks is not None:
            head.append(f"%ignore /{self._form.blanks}/")
        leaves = [f"{name}: {text}" for text, name in self._leaves.items()]
        if any(name.startswith("N") for name in self._leaves.values()):
            leaves.append(f"NAME: {_NAME}")
        return "\n".join([*head, f"start: r{start}", *self._lines, *leaves, ""])

    # What is written here, and what is left to the library

    def _is_declaring(self, expr: Expr) -> bool:
        """An object that says something of names is in or below the expression."""
        if expr not in self._declaring:
            self._explore(expr)
        return self._declaring[expr]

    def _explore(self, root: Expr) -> None:
        parents: dict[Expr, list[Expr]] = {root: []}
        pending, found = [root], []
        while pending:
            expr = pending.pop()
            try:
                branches = self._sets.branches(expr)
            except Inexpressible:
                continue  # the library may take it as it is
            if any(isinstance(branch, ObjectBranch) and _declares(branch) for branch in branches):
                found.append(expr)
            for child in (child for branch in branches for child in _children(branch)):
                if self._declaring.get(child):
                    found.append(expr)
                elif child not in self._declaring:
                    if child not in parents:
                        parents[child] = []
                        pending.append(child)
                    parents[child].append(expr)
        declaring = set()
        while found:
            expr = found.pop()
            if expr not in declaring:
                declaring.add(expr)
                found += parents[expr]
        self._declaring.update((expr, expr in declaring) for expr in parents)

    def _rule(self, expr: Expr) -> int:
        """The number of the rule that makes the expression."""
        if not self._is_declaring(expr):
            # One rule per text: the sets of an expression that only the library can read are not asked for.
            plain = self._plain(self._schemas.schema_of(expr))
            key: Any = plain
            if key not in self._rules:
                self._rules[key] = len(self._forms)
                self._forms.append(list(plain))
            return self._rules[key]
        branches = self._sets.branches(expr)
        if branches in self._rules:
            return self._rules[branches]
        number = self._rules[branches] = len(self._forms)
        forms: list[_Form] = []
        self._forms.append(forms)
        left: list[Branch] = []
        for branch in branches:
            if isinstance(branch, ArrayBranch) and any(map(self._is_declaring, _children(branch))):
                for array in self._sets.solved_array(branch, "#"):
                    if len(array.prefix) > _MAX_PREFIX:
                        left.append(array)
                    else:
                        forms.append(self._items(array))
            elif isinstance(branch, ObjectBranch) and (
                _declares(branch) or any(map(self._is_declaring, _children(branch)))
            ):
                for one in self._schemas.counted(branch, "#", counts_declared=True):
                    members = self._members(one)
                    if isinstance(members, str):
                        self._sets.warnings[
                            f"an object's properties are made in the order of the schema ({members})"
                        ] = None
                        left.append(one)
                    elif members is not None:
                        forms.append(members)
            else:
                left.append(branch)
        if left:
            forms += self._plain(self._schemas.schema_of_branches(left, "#"))
        return number

    def _plain(self, schema: dict[str, Any] | None) -> tuple[_Plain, ...]:
        return () if schema is None else (_Plain(self._json(schema)),)

    def _json(self, schema: dict[str, Any]) -> str:
        return "%json " + json.dumps({**schema, "x-guidance": self._form.options_of(schema)}, ensure_ascii=False)

    def _other_names(self, known: list[str], rules: list[str]) -> str:
        """A terminal of the names that obey some rules, less the known ones; a schema where it is all names."""
        if not known and not rules:
            return self._json({"type": "string"})
        others = ["~(" + " | ".join(_literal(name) for name in known) + ")"] if known else []
        return " & ".join(["NAME", *rules, *others])

    def _count(self, number: int) -> None:
        self._num_parts += number
        if self._num_parts > _MAX_PARTS:
            raise Inexpressible("schema", "#", "its grammar is too large")

    def _items(self, branch: ArrayBranch) -> _Items:
        prefix, most = [], branch.max_items
        for index, expr in enumerate(branch.prefix):
            if (most is not None and index >= most) or self._sets.is_empty(expr):
                most = index
                break
            prefix.append(self._rule(expr))
        self._count(len(prefix) + 1)
        is_open = (most is None or most > len(prefix)) and not self._sets.is_empty(branch.rest)
        return _Items(tuple(prefix), self._rule(branch.rest) if is_open else None, branch.min_items, most)

    def _members(self, branch: ObjectBranch) -> _Members | str | None:
        """None where no object is in the branch; a text that says why, where it has no form here."""
        shape = self._schemas.object_shape(branch, "#")
        is_open = not self._sets.is_empty(shape.additional)
        found = [_finding(pattern) for pattern in shape.patterns]
        if is_open and None in found:
            return "names that no pattern finds"
        if len(shape.patterns) > 1 and len(set(shape.patterns.values())) > 1:
            return "several patterns of names"
        required: list[tuple[str, int]] = []
        optional: list[tuple[str, int]] = []
        for name, expr in shape.properties.items():
            is_required = name in branch.required
            if self._sets.is_empty(expr):
                if is_required:
                    return None
            else:
                (required if is_required else optional).append((name, self._rule(expr)))
        known = list(shape.properties)
        others = [
            (self._json(_names([pattern], known)), self._rule(expr))
            for pattern, expr in shape.patterns.items()
            if not self._sets.is_empty(expr)
        ]
        if is_open:
            beside = [f"~{terminal}" for terminal in found]
            if found:
                self._sets.warnings["beside patternProperties, no names with escapes are made"] = None
            others.append((self._other_names(known, beside), self._rule(shape.additional)))
        least = max(0, branch.min_properties - len(required))
        most = None if branch.max_properties is None else branch.max_properties - len(required)
        if others and optional and (least or most is not None):
            raise Inexpressible("minProperties or maxProperties", "#", "beside optional properties")
        if others and least > 1:
            if shape.patterns:
                raise Inexpressible("minProperties", "#", "names by a pattern that must differ")
            # A name made twice is one property: they are made different.
            self._sets.warnings["minProperties: names that are not declared begin with different letters"] = None
            first = rf"/\"[{_INITIALS[0]}-{_INITIALS[-1]}](?s:.*)/"
            kinds = [*(rf'/"{letter}(?s:.*)/' for letter in _INITIALS), "~" + first.replace("\\", "")]
            others = [(self._other_names(known, [kind]), others[0][1]) for kind in kinds]
        self._count(len(required) + len(optional) + len(others))
        members = _Members(tuple(required), tuple(optional), tuple(others), least, most)
        return members if _num_bits(members) <= _NUM_BITS else f"more than {_NUM_BITS} of them"

    def _productive(self) -> set[int]:
        """Rules that make at least one finite text."""
        found: set[int] = set()
        before = -1
        while len(found) > before:
            before = len(found)
            found.update(
                rule for rule, forms in enumerate(self._forms) if any(_is_productive(form, found) for form in forms)
            )
        return found

    # Text

    def _leaf(self, text: str) -> str:
        """The name of a schema left to the library, or of a terminal."""
        kind = "j" if text.startswith("%json") else "N"
        return self._leaves.setdefault(text, f"{kind}{len(self._leaves)}")

    def _write_rule(self, rule: int, productive: set[int]) -> None:
        bodies = []
        for index, form in enumerate(self._forms[rule]):
            if not _is_productive(form, productive):
                continue
            if isinstance(form, _Plain):
                bodies.append(self._leaf(form.schema))
            elif isinstance(form, _Items):
                bodies.append(_array_text(form, productive))
            else:
                bodies.append(self._object_text(form.made_by(productive), f"{rule}_{index}"))
        self._lines.append(f"r{rule}: " + "\n  | ".join(dict.fromkeys(bodies)))

    def _object_text(self, members: _Members, label: str) -> str:
        """A call of the object's own rules, which are written beside: m (a member and what follows), t (what follows).

        Bits: required, optional, then others: one for each kind met, or their number. (No rule may consist of nothing
        but another one with a changed parameter: the library skips such rules, and the change with them.)
        """
        first_optional = len(members.required)
        first_other = first_optional + len(members.optional)
        least, most = members.least, members.most
        rest = f"[{first_other}:{first_other + _bits_of_others(members)}]"
        missing = f"not(is_ones([0:{first_optional}]))" if first_optional else None
        if not members.others:
            rest = f"[{first_optional}:{first_other}]"
        is_number = bool(members.others) and least <= 1 and most is not None
        if is_number:
            room, enough = f"lt({rest}, {most})", f"ge({rest}, {least})"
        else:
            room, enough = f"bit_count_lt({rest}, {most})", f"bit_count_ge({rest}, {least})"
        ways = []
        for bit, (name, value) in enumerate((*members.required, *members.optional)):
            # Where there is room for all, it needs no asking.
            limit = room if bit >= first_optional and not members.others and most != len(members.optional) else None
            ways.append(f'{_literal(name)} ":" r{value} t{label}::set_bit({bit}){_when(f"bit_clear({bit})", limit)}')
        for index, (names, value) in enumerate(members.others):
            step, fresh = "_", None
            if is_number:
                step = f"incr({rest})"
            elif least == 1:
                step = f"set_bit({first_other})"
            elif least > 1:
                step = f"set_bit({first_other + index})"
                fresh = f"bit_clear({first_other + index})" if most is not None else None
            limit = room if most is not None else None
            ways.append(f'{self._leaf(names)} ":" r{value} t{label}::{step}{_when(limit, fresh)}')
        if not ways:
            return '"{" "}"'
        ends = f'""{_when(missing and f"is_ones([0:{first_optional}])", enough if least else None)}'
        if most is None:
            more = None
        elif most == 0:
            more = missing
        else:
            more = f"or({missing}, {room})" if missing else room
        self._lines.append(f"m{label}::_ : " + "\n  | ".join(ways))
        self._lines.append(f't{label}::_ : {ends}\n  | "," m{label}::_{_when(more)}')
        empty = "" if members.required or members.least else '"{" "}" | '
        return f'{empty}"{{" m{label}::0x0 "}}"'


def has_open_names(schema: Any) -> bool:
    """An object schema that says something of some names, and allows others, is in a schema."""
    if isinstance(schema, list):
        return any(map(has_open_names, schema))
    if not isinstance(schema, dict):
        return False
    if schema.get("additionalProperties") is not False and (
        schema.get("properties") or schema.get("patternProperties")
    ):
        return True
    return any(map(has_open_names, schema.values()))


def counts_open_names(schema: Any) -> bool:
    """An object schema asks for more names than it and its `required` list, which the library would count twice where
    a name is made twice."""
    if isinstance(schema, list):
        return any(map(counts_open_names, schema))
    if not isinstance(schema, dict):
        return False
    required = schema.get("required")
    least = schema.get("minProperties", 0)
    if isinstance(least, int | float) and least > (len(required) if isinstance(required, list) else 0) + 1:
        return schema.get("additionalProperties") is not False or bool(schema.get("patternProperties"))
    return any(map(counts_open_names, schema.values()))


def mentions_names(schema: Any) -> bool:
    """A quick look: some keyword or value in a schema says something of the names in an object."""
    if isinstance(schema, list):
        return any(map(mentions_names, schema))
    if not isinstance(schema, dict):
        return False
    if any(isinstance(inner, dict) for inner in (schema.get("const"), *_as_list(schema.get("enum")))):
        return True
    return bool(_NAMING & set(schema)) or any(map(mentions_names, schema.values()))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _declares(branch: ObjectBranch) -> bool:
    return bool(branch.declared() or branch.names or branch.min_properties > 1 or any(k.patterns for k in branch.keys))


def _children(branch: Branch) -> Iterator[Expr]:
    """What stands below a branch."""
    if isinstance(branch, ArrayBranch):
        yield from (*branch.prefix, branch.rest)
    elif isinstance(branch, ObjectBranch):
        for keys in branch.keys:
            yield from (expr for _, expr in (*keys.properties, *keys.patterns))
            yield keys.additional


def _names(patterns: list[str], known: list[str]) -> dict[str, Any]:
    """A schema of the names that a pattern finds, less the known ones."""
    others = [name for name in known if all(_may_find(pattern, name) for pattern in patterns)]
    rules = patterns + ([f"^{pattern_of_all_but(others)}$"] if others else [])
    if len(rules) > 1:
        return {"type": "string", "allOf": [{"pattern": rule} for rule in rules]}
    return {"type": "string", **({"pattern": rules[0]} if rules else {})}


def _finding(pattern: str) -> str | None:
    """A terminal of at least the names that a pattern finds, among those without escapes; and all names with escapes.

    None where the pattern says something that another dialect might read otherwise.
    """
    body = pattern.removeprefix("^")
    starts, ends = body != pattern, bool(re.search(r"(?<!\\)(?:\\\\)*\$\Z", body))
    body = body[:-1] if ends else body
    bare = _BRACKETED.sub("", body)
    if re.search(r"[$^]", bare) or ("|" in bare and (starts or ends)) or re.search(r"\\[^dw.+*?()|{}\-/]", body):
        return None
    for escape, plain in ((r"\d", "0-9"), (r"\w", "A-Za-z0-9_")):
        # As a part of a class, or as the whole of one.
        body = re.sub(rf"(\[[^\]]*?){re.escape(escape)}", rf"\g<1>{plain}", body)
        body = body.replace(escape, f"[{plain}]")
    body = re.sub(r"(?<!\\)/", r"\/", body)
    return f'(/"{"" if starts else "(?s:.*)"}(?:{body}){"" if ends else "(?s:.*)"}"/ | /"(?s:.*)\\\\(?s:.*)"/)'


def _may_find(pattern: str, name: str) -> bool:
    try:
        return searches(pattern, name)
    except Inexpressible:
        return True


def _bits_of_others(members: _Members) -> int:
    """Bits that keep account of the members with names that are not declared."""
    if not members.others:
        return 0
    if members.least > 1:
        return len(members.others)
    return members.least if members.most is None else max(1, members.most.bit_length())


def _num_bits(members: _Members) -> int:
    return len(members.required) + len(members.optional) + _bits_of_others(members)


def _is_productive(form: _Form, rules: Set[int]) -> bool:
    if isinstance(form, _Plain):
        return True
    if isinstance(form, _Members):
        return form.is_productive(rules)
    return _longest(form, rules) is None or form.at_least <= (_longest(form, rules) or 0)


def _longest(items: _Items, rules: Set[int]) -> int | None:
    """How many items there can be; None for any number."""
    for index, rule in enumerate(items.prefix):
        if rule not in rules:
            return index if items.at_most is None else min(index, items.at_most)
    if items.rest is None or items.rest not in rules:
        return len(items.prefix) if items.at_most is None else min(len(items.prefix), items.at_most)
    return items.at_most


def _array_text(items: _Items, rules: Set[int]) -> str:
    most = _longest(items, rules)
    least = items.at_least

    def behind(count: int) -> str:
        """What may follow `count` items."""
        if most is not None and count >= most:
            return ""
        if count < len(items.prefix):
            inner = f'"," r{items.prefix[count]} {behind(count + 1)}'.rstrip()
            return inner if count < least else f"({inner})?"
        low, high = max(0, least - count), "" if most is None else most - count
        return f'("," r{items.rest}){{{low},{high}}}'

    if most == 0:
        return '"[" "]"'
    body = f"r{items.prefix[0] if items.prefix else items.rest} {behind(1)}".rstrip()
    return f'"[" {body} "]"' if least else f'"[" ({body})? "]"'


def _literal(name: str) -> str:
    """A Lark string that matches the JSON text of a name."""
    return json.dumps(json.dumps(name, ensure_ascii=False), ensure_ascii=False)


def _when(*conditions: str | None) -> str:
    needed = [condition for condition in conditions if condition]
    if not needed:
        return ""
    return f" %if {needed[0] if len(needed) == 1 else 'and(' + ', '.join(needed) + ')'}"
