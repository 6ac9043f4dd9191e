"""`Capabilities`: what each backend enforces of plain schemas, as rewrite.py and plain_schema.py need to know it."""

from __future__ import annotations

from dataclasses import dataclass

# Formats every backend that asserts formats knows by these names; others are annotations, as the standard has it.
KNOWN_FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])


@dataclass(frozen=True)
class Capabilities:
    """What one backend enforces of plain schemas (those without the keywords that are rewritten for all).

    native: takes schemas as clients write them; the others get rebuilt schemas only.
    """

    name: str
    native: bool = False
    formats: frozenset[str] = frozenset()
    number_bounds: bool = True
    multiple_of: bool = False
    several_patterns: bool = False
    pattern_and_length: bool = False
    prefix_items: bool = True
    pattern_properties: bool = False
    forbidden_properties: bool = False
    open_objects: bool = True
    count_properties: bool = False
    mixed_enums: bool = True
    untyped: bool = True
    escaped_names: bool = True


LLGUIDANCE = Capabilities(
    "llguidance",
    native=True,
    formats=KNOWN_FORMATS,
    multiple_of=True,
    several_patterns=True,
    pattern_and_length=True,
    pattern_properties=True,
    forbidden_properties=True,
    count_properties=True,
)
XGRAMMAR = Capabilities("xgrammar", escaped_names=False)
LMFE = Capabilities(
    "lmfe", number_bounds=False, prefix_items=False, open_objects=False, mixed_enums=False, untyped=False
)
