r"""Regular expressions: one dialect for every backend, checked before any of them sees it.

The dialect is Python's `re`, the whole text matching, less look-around, back-references and possessive or atomic
groups, plus `\p{...}`, `(?<name>...)` and POSIX classes. Grammar libraries follow the Rust `regex` crate, whose syntax
is close but not equal: some of Python's patterns mean another thing there, silently. `to_rust_regex` rewrites those
places and refuses what has no equivalent, so that `re.fullmatch` accepts every text a grammar lets through.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from textgen_engine.errors import GrammarError

_POSIX_CLASS = re.compile(
    r"\[:\^?(?:alpha|digit|alnum|upper|lower|space|punct|xdigit|word|blank|cntrl|graph|print|ascii):\]"
)
_OPEN_REPEAT = re.compile(r"\{,(\d+)\}")
_REPEAT = re.compile(r"\{\d+(?:,\d*)?\}|\{,\d+\}")
_UNICODE_CLASS = re.compile(r"[pP](?:\{\^?[A-Za-z_0-9=: &-]+\}|[A-Z])")
# Python: str.isalnum() or "_". Rust's \w also has combining marks and the joiners.
_WORD = r"\p{L}\p{N}_"
# Python: str.isspace(). Rust's \s lacks the four separators.
_SPACE = r"\s\x1c-\x1f"


def check_nesting(text: str, max_nesting: int) -> None:
    """Bound the bracket depth of a pattern or grammar (escaped brackets are skipped). Raises GrammarError."""
    depth, position = 0, 0
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1
        elif char in "([{":
            depth += 1
            if depth > max_nesting:
                raise GrammarError(f"nested deeper than {max_nesting} at position {position}")
        elif char in ")]}" and depth:
            depth -= 1
        position += 1


def to_rust_regex(pattern: str) -> str:
    """The same language in the Rust dialect. Raises GrammarError naming what is wrong and its position."""
    translated = _Translator(pattern).run()
    _check_with_python(pattern)
    return translated


def _check_with_python(pattern: str) -> None:
    """Python's own parser finds unbalanced groups, bad ranges and dangling escapes, with a position."""
    # Syntax that only the wider dialect has becomes something harmless of equal length.
    plain = re.sub(
        r"(?<!\\)((?:\\\\)*)\\[pP](?:\{[^}]*\}|[A-Z])", lambda m: m[1] + "w" * (len(m[0]) - len(m[1])), pattern
    )
    plain = re.sub(r"\(\?<(?=[A-Za-z_])", "(?P<", plain)
    plain = _POSIX_CLASS.sub(lambda m: "w" * len(m[0]), plain)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(plain)
    except re.error as error:
        place = "" if error.pos is None else f" at position {min(error.pos, len(pattern))}"
        raise GrammarError(f"regex: {error.msg}{place}") from None
    except (RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise GrammarError(f"regex: too complex: {str(error)[:200]}") from None


def unsupported_in_pattern(pattern: str) -> str | None:
    """What no backend can enforce in a JSON Schema `pattern` (ECMA 262), in words; None where all is well."""
    position, in_class = 0, False
    while position < len(pattern):
        char = pattern[position]
        if char == "\\":
            escaped = pattern[position + 1 : position + 2]
            if not in_class and escaped in ("b", "B"):
                return f"word boundary \\{escaped} at position {position}"
            if not in_class and escaped and escaped in "123456789k":
                return f"back-reference at position {position}"
            position += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif re.match(r"\(\?(?:[=!>]|<[=!])", pattern[position:]):
            return f"look-around at position {position}"
        position += 1
    return None


_CLASS = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]", re.DOTALL)


def guard_quotes(pattern: str) -> str:
    r"""A JSON Schema `pattern` in which llguidance sees that a class leaves out the quote or the backslash.

    Where a class has every control character (or all but the newline), the library allows any escape in its place,
    `\"` and `\\` with the others, although `[^"]` has neither. Without NUL the class is no longer of that kind, and
    texts with a NUL in its place are not made. Raises GrammarError for such a class that is not negated.
    """

    def guard(found: re.Match[str]) -> str:
        text = found[0]
        if text.startswith("\\") or text in ("[]", "[^]"):
            return text
        try:
            matches = re.compile(text, re.ASCII).fullmatch
        except re.error:
            return "[^\\x00" + text[2:] if text.startswith("[^") else text
        if (matches('"') and matches("\\")) or not all(matches(chr(code)) for code in range(32) if code != 10):
            return text
        if not text.startswith("[^"):
            raise GrammarError(f"JSON schema: 'pattern' has a class with the control characters: {text[:100]!r}")
        return "[^\\x00" + text[2:]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _CLASS.sub(guard, pattern)


class _Translator:
    """One pass over a pattern, left to right, outside and inside character classes."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._position = 0
        self._out: list[str] = []

    def run(self) -> str:
        pattern = self._pattern
        while self._position < len(pattern):
            char = pattern[self._position]
            if char == "\\":
                self._escape(in_class=False)
            elif char == "[":
                self._character_class()
            elif char == "(" and pattern.startswith("(?", self._position):
                self._group()
            elif char in "*+?" or (char == "{" and _REPEAT.match(pattern, self._position)):
                self._repetition()
            elif char in "{}":
                self._emit("\\" + char, 1)  # Python takes a brace that is no repetition for itself
            else:
                self._emit(char, 1)
        return "".join(self._out)

    def _emit(self, text: str, consumed: int) -> None:
        self._out.append(text)
        self._position += consumed

    def _fail(self, what: str) -> GrammarError:
        return GrammarError(f"regex: {what} at position {self._position}")

    def _escape(self, *, in_class: bool) -> None:
        pattern, position = self._pattern, self._position
        if position + 1 >= len(pattern):
            raise self._fail("bad escape (end of pattern)")
        char = pattern[position + 1]
        unicode_class = _UNICODE_CLASS.match(pattern, position + 1)
        if unicode_class:
            self._emit("\\" + unicode_class[0], 1 + len(unicode_class[0]))
        elif char == "w":
            self._emit(_WORD if in_class else f"[{_WORD}]", 2)
        elif char == "W":
            self._emit(f"[^{_WORD}]", 2)
        elif char == "s":
            self._emit(_SPACE if in_class else f"[{_SPACE}]", 2)
        elif char == "S":
            self._emit(f"[^{_SPACE}]", 2)
        elif char == "A" and not in_class:
            self._emit("^", 2)
        elif char == "Z" and not in_class:
            self._emit("$", 2)
        elif char in "bB" and not in_class:
            raise self._fail(f"word boundary \\{char} is not supported")
        elif char == "b":
            self._emit("\\x08", 2)
        elif char in "123456789" or (char == "0" and position + 2 < len(pattern) and pattern[position + 2].isdigit()):
            if (
                in_class
                or char == "0"
                or (len(pattern[position + 1 : position + 4]) == 3 and pattern[position + 1 : position + 4].isdigit())
            ):
                octal = re.match(r"[0-7]{1,3}", pattern[position + 1 :])
                if octal is None or int(octal[0], 8) > 0o377:
                    raise self._fail("bad octal escape")
                self._emit(f"\\x{int(octal[0], 8):02x}", 1 + len(octal[0]))
            else:
                raise self._fail("back-references are not supported")
        elif char == "0":
            self._emit("\\x00", 2)
        elif char in "dDnrtfv":
            self._emit("\\" + char, 2)
        elif char == "a":
            self._emit("\\x07", 2)
        elif char in "xuU":
            width = {"x": 2, "u": 4, "U": 8}[char]
            digits = pattern[position + 2 : position + 2 + width]
            if len(digits) != width or not all(c in "0123456789abcdefABCDEF" for c in digits):
                raise self._fail(f"incomplete escape \\{char}")
            self._emit(f"\\x{{{int(digits, 16):x}}}", 2 + width)
        elif char.isascii() and char.isalnum():
            raise self._fail(f"bad escape \\{char}")
        else:
            self._emit(escape_regex(char), 2)

    def _character_class(self) -> None:
        pattern, start = self._pattern, self._position
        self._emit("[", 1)
        if pattern.startswith("^", self._position):
            self._emit("^", 1)
        first = True
        while True:
            if self._position >= len(pattern):
                self._position = start
                raise self._fail("unterminated character set")
            char = pattern[self._position]
            posix = _POSIX_CLASS.match(pattern, self._position) if char == "[" else None
            if char == "]" and not first:
                self._emit("]", 1)
                return
            if char == "\\":
                self._escape(in_class=True)
            elif posix:
                self._emit(posix[0], len(posix[0]))
            elif char == "-":
                if pattern.startswith("--", self._position):
                    raise self._fail("ambiguous -- in a character set; escape it")
                at_edge = first or pattern.startswith("]", self._position + 1)
                after_class = self._out[-1].endswith(("f", "_", "]")) and self._is_class(self._out[-1])
                self._emit("\\-" if at_edge or after_class else "-", 1)
            elif char in "[]&~^":
                self._emit("\\" + char, 1)  # Rust reads nested sets and set operations here, Python does not
            else:
                self._emit(char, 1)
            first = False

    @staticmethod
    def _is_class(piece: str) -> bool:
        return piece in (_WORD, _SPACE) or piece.startswith(("[^", "[:", "\\p", "\\P"))

    def _group(self) -> None:
        pattern, position = self._pattern, self._position
        for opening, what in (
            ("(?=", "look-ahead"),
            ("(?!", "look-ahead"),
            ("(?<=", "look-behind"),
            ("(?<!", "look-behind"),
            ("(?P=", "back-reference"),
            ("(?(", "conditional group"),
            ("(?>", "atomic group"),
        ):
            if pattern.startswith(opening, position):
                raise self._fail(f"{what} {opening}...) is not supported")
        if pattern.startswith("(?#", position):
            end = pattern.find(")", position)
            if end < 0:
                raise self._fail("missing ), unterminated comment")
            self._emit("", end + 1 - position)
            return
        flags = re.match(r"\(\?([a-zA-Z]*)(-[a-zA-Z]*)?([:)])", pattern[position:])
        if flags:
            self._flags(flags)
            return
        self._emit("(", 1)
        name = re.match(r"\?P?<([^>]*)>", pattern[self._position :])
        if name is None:
            raise self._fail("unknown group syntax")
        self._emit("?:", len(name[0]))

    def _flags(self, flags: re.Match[str]) -> None:
        on, off = flags[1], flags[2] or ""
        for flag in on + off[1:]:
            if flag not in "imsu":
                # x changes how blanks read, a and L what classes mean: nobody needs them enough to translate.
                raise self._fail(f"flag ({'?' + flag}) is not supported")
        if flags[3] == ")" and self._position:
            raise self._fail("global flags not at the start of the expression")
        # `u` is the default on both sides, and `-u` would switch to bytes in Rust.
        if "u" in off:
            raise self._fail("flag (?-u) is not supported")
        text = "(?" + on.replace("u", "") + off + flags[3]
        self._emit("" if text == "(?)" else text, len(flags[0]))

    def _repetition(self) -> None:
        pattern, position = self._pattern, self._position
        if pattern[position] == "{":
            end = pattern.index("}", position) + 1
            open_repeat = _OPEN_REPEAT.match(pattern, position)
            text = f"{{0,{open_repeat[1]}}}" if open_repeat else pattern[position:end]
        else:
            end, text = position + 1, pattern[position]
        if pattern.startswith("+", end):
            raise self._fail("possessive repetition is not supported")
        # The whole text must match, so a lazy repetition accepts the same texts as a greedy one.
        if pattern.startswith("?", end):
            end += 1
        if re.match(r"[*+]|\{\d+(?:,\d*)?\}|\{,\d+\}", pattern[end:]):
            self._position = end
            raise self._fail("multiple repeat")
        self._emit(text, end - position)


def escape_regex(text: str) -> str:
    """`text` as a pattern that matches it alone, in Python's and in Rust's dialect."""
    return "".join("\\" + char if char in _META else char for char in text)


def pattern_of_all_but(texts: Iterable[str]) -> str:
    """A regular expression (to be matched whole) for every text but the given ones, linear in their length."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}  # a forbidden text ends here

    def others(node: dict[str, Any]) -> str:
        heads = sorted(char for char in node if char)
        cases = [] if "" in node else [""]
        if heads:
            # NUL for the sake of guard_quotes, which says why.
            nul = r"\x00" if {'"', "\\"} & set(heads) else ""
            cases.append("[^" + nul + "".join(_in_class(char) for char in heads) + r"][\s\S]*")
            cases += [escape_regex(char) + others(node[char]) for char in heads]
        else:
            cases.append(r"[\s\S]+")
        return "(?:" + "|".join(cases) + ")"

    return others(tree)


def _in_class(char: str) -> str:
    return "\\" + char if char in "\\]^[-&~/" else char


_META = frozenset("\\.+*?()|[]{}^$#&-~/")
