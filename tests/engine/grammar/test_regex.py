"""The regex dialect: what Python's `re` means is what the backend makes, or it is refused with a position."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen_engine.errors import GrammarError
from textgen_engine.grammar.regex import check_nesting, escape_regex, to_rust_regex

REFUSED = {
    "abc\\": 3,
    "(a": 0,
    "a)": 1,
    "[a-z": 0,
    "[z-a]": 1,
    "a{5,2}": 2,
    "*a": 0,
    "a**": 2,
    "a++": 1,
    "(?=a)b": 0,
    "(?!a)b": 0,
    "a(?<=a)": 1,
    "(?<!a)b": 0,
    r"(a)\1": 3,
    "(?P<x>a)(?P=x)": 8,
    r"a\b": 1,
    "(?>a)": 0,
    "(?x) a": 0,
    r"\q": 0,
    r"\N{DIGIT ONE}": 0,
    "[a--b]": 2,
    "(?(1)a|b)": 0,
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_refused_with_position(pattern: str) -> None:
    with pytest.raises(GrammarError, match=f"position {REFUSED[pattern]}"):
        to_rust_regex(pattern)


@pytest.mark.parametrize(
    ("pattern", "accepted", "refused"),
    [
        (r"\w+", ["aé_9", "²"], ["e\u0301", "\u200d", "-"]),  # Rust's \w has combining marks and joiners
        (r"[\w.]+", ["a.b"], ["e\u0301"]),
        (r"\W", ["\u0301", "-"], ["a"]),
        (r"\s", ["\x1c", " ", "\u2003"], ["a"]),
        (r"a{,2}", ["", "a", "aa"], ["aaa"]),
        (r"a{x}", ["a{x}"], ["a"]),
        (r"[[a]", ["[", "a"], ["b"]),
        (r"[a&&b]", ["a", "b", "&"], ["c"]),
        (r"[a~~b]", ["~"], ["c"]),
        (r"[]a]", ["]", "a"], ["b"]),
        (r"[^]a]", ["b"], ["]", "a"]),
        (r"[\w-]", ["-", "a"], ["+"]),
        (r"[a-]", ["-"], ["b"]),
        (r"\Aab\Z", ["ab"], ["a"]),
        (r"^(a|b)$", ["a"], ["ab"]),
        (r"(?i:ab)c", ["ABc"], ["ABC"]),
        (r"(?i)ab", ["AB"], []),
        (r"(?s:.)", ["\n"], []),
        (r".", ["a"], ["\n"]),
        (r"(?P<year>\d{4})", ["2024"], ["20"]),
        (r"(?#note)a", ["a"], [""]),
        (r"\x41\u00e9\U0001f600", ["Aé😀"], []),
        (r"\101\0", ["A\0"], []),
        (r"a+?b*?", ["a", "aab"], ["b"]),
        (r"[\b]", ["\b"], ["b"]),
        (r"a/b\/c", ["a/b/c"], []),
        (r"<\<\>", ["<<>"], []),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Python's own, of sets it may read differently one day
def test_same_language_as_python(llguidance_walker, pattern: str, accepted: list[str], refused: list[str]) -> None:
    assert all(re.fullmatch(pattern, text) for text in accepted)
    assert not any(re.fullmatch(pattern, text) for text in refused)
    compiled = llguidance_walker.compile({"type": "regex", "value": pattern})
    assert [text for text in accepted if not llguidance_walker.accepts(compiled, text)] == []
    assert [text for text in refused if llguidance_walker.accepts(compiled, text)] == []


def test_wider_dialect(llguidance_walker) -> None:
    for pattern, accepted, refused in [
        (r"\p{Lu}\p{Ll}+", "Éa", "éa"),
        (r"\pLx", "éx", "1x"),
        (r"(?<y>\d)", "1", "a"),
        ("[[:alpha:]]", "a", "1"),
        (r"[^\p{L}]", "1", "é"),
    ]:
        compiled = llguidance_walker.compile({"type": "regex", "value": pattern})
        assert llguidance_walker.accepts(compiled, accepted), pattern
        assert not llguidance_walker.accepts(compiled, refused), pattern


atoms = st.sampled_from(["a", "b", r"\d", r"\w", r"[^a]", r"[a-c\-]", r"\.", ".", r"\n", "é", "[&]", r"[\s]"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(["*", "?", "+", "{2}", "{,2}", "{1,3}"])).map(lambda p: f"({p[0]}){p[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(pattern=patterns, texts=st.lists(st.text("abc1 .\n-&é_", max_size=6), max_size=8))
def test_random_patterns_agree_with_python(llguidance_walker, pattern: str, texts: list[str]) -> None:
    compiled = llguidance_walker.compile({"type": "regex", "value": pattern})
    for text in texts:
        expected = re.fullmatch(pattern, text) is not None
        assert llguidance_walker.accepts(compiled, text) == expected, (pattern, text)


@given(text=st.text(max_size=20))
def test_escape_is_valid_in_both_dialects(text: str) -> None:
    assert re.fullmatch(escape_regex(text), text)
    to_rust_regex(escape_regex(text))


def test_nesting_is_bounded() -> None:
    check_nesting("(" * 64 + ")" * 64, 64)
    check_nesting(r"\(" * 1000, 64)
    with pytest.raises(GrammarError, match="nested deeper than 64 at position 64"):
        check_nesting("(" * 65, 64)
