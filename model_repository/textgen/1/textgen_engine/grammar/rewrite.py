"""Schema rewriting (first form): tools to a schema, unknown formats away."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from textgen_engine.grammar.base import GrammarLimits, GrammarSpec, grammar_error
from textgen_engine.grammar.json_schema import map_children
from textgen_engine.grammar.tools import tool_call_schema

KNOWN_FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])


@dataclass(frozen=True)
class Capabilities:
    """What one backend enforces by itself."""

    name: str
    formats: frozenset[str] = KNOWN_FORMATS


@dataclass(frozen=True)
class PreparedSchema:
    """or_plain_text: the schema's value, or a text that does not begin with a brace."""

    schema: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    or_plain_text: bool = False


def prepare_schema(spec: GrammarSpec, capabilities: Capabilities, limits: GrammarLimits) -> PreparedSchema:
    """The schema a backend is given for a JSON or tools spec. Raises GrammarError."""
    content = json.loads(spec.value)
    or_plain_text = False
    if spec.kind == "tools":
        or_plain_text = content["mode"] == "auto"
        content = tool_call_schema(content["tools"])
    if content is False:
        raise grammar_error("JSON schema: the schema `false` allows no value")
    if content is True:
        content = {}
    warnings: list[str] = []

    def strip(schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        schema = map_children(schema, strip)
        if "format" in schema and schema["format"] not in capabilities.formats:
            warnings.append(f"format {schema['format']!r} is not known and not enforced")
            del schema["format"]
        schema.pop("x-guidance", None)
        return schema

    return PreparedSchema(strip(content), warnings, or_plain_text)
