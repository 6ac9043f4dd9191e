"""`prepare_schema`, `write_grammar`: a client's schema brought into what a backend enforces.

Three ways. A schema that the backend takes as it is goes through a light cleaning: formats it does not know become
warnings, whole numbers lose their `.0`, keywords without meaning in their place go. A schema it does not take is
rebuilt from its set of values (schema_sets.py): `not`, `oneOf`, `if`, dependencies, `contains`, `uniqueItems` over few
values, `propertyNames` and `unevaluated*` become unions of plain schemas (plain_schema.py). And for llguidance a schema
with objects in it becomes a grammar that lets their members come in any order (lark_schema.py). Every result allows the
same values, or, with a warning, fewer; never more.

The latter two are Python, milliseconds to seconds of it: they run in a worker process (`RewriteSession`), where they
neither take the engine's interpreter lock nor outlive the time limit.

What remains is refused by keyword and place. With `lenient`, such keywords are dropped instead, with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from textgen_engine.errors import GrammarError
from textgen_engine.grammar.base import GrammarLimits, GrammarSpec, grammar_error
from textgen_engine.grammar.capabilities import LLGUIDANCE, Capabilities
from textgen_engine.grammar.json_schema import map_children
from textgen_engine.grammar.lark_schema import LarkWriter, LibraryForm
from textgen_engine.grammar.plain_schema import IDENTIFIERS, SchemaWriter
from textgen_engine.grammar.references import SchemaDocument
from textgen_engine.grammar.regex import guard_quotes
from textgen_engine.grammar.schema_branches import Inexpressible, Leaf, canonical
from textgen_engine.grammar.schema_sets import SchemaSets
from textgen_engine.grammar.tools import tool_call_schema


@dataclass(frozen=True)
class PreparedSchema:
    """schema: for the backend. rebuilt: not the client's own any more.

    or_plain_text: the text may also be any that does not begin with a brace (tool_choice auto).
    """

    schema: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    or_plain_text: bool = False
    rebuilt: bool = False


def prepare_schema(
    spec: GrammarSpec, capabilities: Capabilities, limits: GrammarLimits, *, rebuild: bool
) -> PreparedSchema:
    """The schema of a json_schema, json_object or tools spec, for one backend.

    rebuild: False gives the cleaned schema (a native backend's first try), True the rebuilt one.
    Raises GrammarError, naming keyword and place, for what cannot be enforced.
    """
    cleaned = _cleaned(spec, capabilities)
    if not rebuild:
        return cleaned
    if not limits.max_rewritten_nodes:
        raise GrammarError(f"JSON schema: {capabilities.name} does not take it as it is, and rewriting is off")
    try:
        sets, writer = _writer(cleaned, capabilities, limits, is_lenient=spec.lenient)
        schema = writer.schema_of(Leaf(sets.document.root))
        if schema is None:
            raise Inexpressible("schema", "#", "no value satisfies it")
    except Inexpressible as error:
        raise _refused(error, capabilities) from None
    except RecursionError:
        raise GrammarError(f"JSON schema: nested too deeply for {capabilities.name}") from None
    return replace(cleaned, schema=schema, warnings=[*cleaned.warnings, *sets.warnings], rebuilt=True)


@dataclass(frozen=True)
class WrittenGrammar:
    """lark: start rule `start`. Otherwise as PreparedSchema."""

    lark: str
    warnings: list[str]
    or_plain_text: bool


def write_grammar(spec: GrammarSpec, limits: GrammarLimits, form: LibraryForm) -> WrittenGrammar | None:
    """The schema of a spec as a grammar of llguidance; None where its own form of the schema does as well.

    Raises GrammarError for what has no form as a grammar; it may have one as a schema.
    """
    cleaned = _cleaned(spec, LLGUIDANCE)
    try:
        sets, writer = _writer(cleaned, LLGUIDANCE, limits, is_lenient=spec.lenient)
        lark = LarkWriter(sets, writer, form).write(Leaf(sets.document.root))
    except Inexpressible as error:
        raise _refused(error, LLGUIDANCE) from None
    except RecursionError:
        raise GrammarError("JSON schema: nested too deeply for llguidance") from None
    if lark is None:
        return None
    return WrittenGrammar(lark, [*cleaned.warnings, *sets.warnings], cleaned.or_plain_text)


def _cleaned(spec: GrammarSpec, capabilities: Capabilities) -> PreparedSchema:
    """The client's own schema. Raises GrammarError."""
    content = json.loads(spec.value)
    or_plain_text = False
    if spec.kind == "tools":
        or_plain_text = content["mode"] == "auto"
        content = tool_call_schema(content["tools"], parallel=content.get("parallel", False))
    if content is False:
        raise grammar_error("JSON schema: the schema `false` allows no value")
    schema, warnings = _clean({} if content is True else content, capabilities)
    return PreparedSchema(schema, warnings, or_plain_text)


def _writer(
    cleaned: PreparedSchema, capabilities: Capabilities, limits: GrammarLimits, *, is_lenient: bool
) -> tuple[SchemaSets, SchemaWriter]:
    """The sets of a cleaned schema, and what writes them. Raises GrammarError."""
    sets = SchemaSets(SchemaDocument(cleaned.schema), max_branches=limits.max_rewritten_nodes)
    return sets, SchemaWriter(sets, capabilities, limits.max_rewritten_nodes, is_lenient=is_lenient)


def _refused(error: Inexpressible, capabilities: Capabilities) -> GrammarError:
    reason = f" ({error.reason})" if error.reason else ""
    return GrammarError(
        f"JSON schema: {error.keyword!r} at {error.place[:200]} cannot be enforced by {capabilities.name}{reason}"
    )


def prepare_leniently(spec: GrammarSpec, capabilities: Capabilities, limits: GrammarLimits) -> PreparedSchema:
    """The rebuilt schema; with `lenient`, where that fails, the client's own, of which the backend ignores a part.

    Raises GrammarError.
    """
    try:
        return prepare_schema(spec, capabilities, limits, rebuild=True)
    except GrammarError as reason:
        if not spec.lenient:
            raise
        own = prepare_schema(spec, capabilities, limits, rebuild=False)
        warning = f"grammar_lenient: not everything is enforced: {reason.message}"
        return replace(own, warnings=[*own.warnings, warning])


class RewriteSession:
    """prepare_schema and write_grammar in a worker process of sandbox.py."""

    def __init__(self, limits: GrammarLimits) -> None:
        self._limits = limits

    def prepare(self, spec: GrammarSpec, capabilities: Capabilities, rebuild: bool) -> PreparedSchema:
        return prepare_schema(spec, capabilities, self._limits, rebuild=rebuild)

    def write(self, spec: GrammarSpec, form: LibraryForm) -> WrittenGrammar | None:
        return write_grammar(spec, self._limits, form)


def prepare_sessions(limits: GrammarLimits) -> Callable[[], RewriteSession]:
    """The factory sandbox.py calls."""
    return lambda: RewriteSession(limits)


def _clean(content: dict[str, Any], capabilities: Capabilities) -> tuple[dict[str, Any], list[str]]:
    """A copy without unknown formats, `.0` on whole numbers, and keywords that mean nothing where they stand."""
    warnings: dict[str, None] = {}

    def clean(schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        changed = map_children(schema, clean)
        if "format" in changed and changed["format"] not in capabilities.formats:
            warnings[f"format {changed['format']!r:.100} is not enforced"] = None
            del changed["format"]
        if capabilities.native:
            if "pattern" in changed:
                changed["pattern"] = guard_quotes(changed["pattern"])
            if "patternProperties" in changed:
                changed["patternProperties"] = {
                    guard_quotes(pattern): inner for pattern, inner in changed["patternProperties"].items()
                }
        # The library would take its own options from inside a schema.
        changed.pop("x-guidance", None)
        for key in ("then", "else"):
            if "if" not in changed:
                changed.pop(key, None)
        if "then" not in changed and "else" not in changed and not has_annotations:
            changed.pop("if", None)
        if is_old and "$ref" in changed:  # up to draft 7 nothing beside a reference counts
            changed = {key: value for key, value in changed.items() if key in IDENTIFIERS or key == "$ref"}
        if changed.get("uniqueItems") is False:
            del changed["uniqueItems"]
        if "contains" not in changed:
            changed.pop("minContains", None)
            changed.pop("maxContains", None)
        for key in ("dependencies", "dependentRequired", "dependentSchemas"):
            if changed.get(key) == {}:
                del changed[key]
        for key, value in changed.items():
            if isinstance(value, float) and value.is_integer():
                changed[key] = int(value)
            elif key in ("const", "enum"):
                changed[key] = json.loads(canonical(value))
        return changed

    is_old = SchemaDocument({"$schema": content.get("$schema", "")}).is_old_draft
    has_annotations = "unevaluated" in json.dumps(content)
    return clean(content), list(warnings)
