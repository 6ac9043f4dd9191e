"""The tracker only takes tokens away, and exactly those that break UTF-8 or JSON's lexical rules."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from textgen_engine.grammar.json_lexer import TextTables, TextTracker
from textgen_engine.grammar.vocabulary import Vocabulary

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-50, 50), st.sampled_from([0.5, -1.25]), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


def accepts(tables: TextTables, pieces: list[bytes], *, is_json: bool = True) -> bool:
    """Walk bytes, one token each (the test tokenizer has every byte)."""
    by_bytes = {piece: i for i, piece in enumerate(tables.vocabulary.token_bytes) if i > 3}
    tracker = TextTracker(tables, is_json=is_json)
    for piece in pieces:
        token_id = by_bytes[piece]
        if not (int(tracker.row()[token_id >> 5]) >> (token_id & 31)) & 1:
            return False
        tracker.advance(token_id)
    return tracker.is_whole()


def split(text: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in text]


@given(value=json_values, indent=st.sampled_from([None, 1]))
def test_json_passes(vocabulary: Vocabulary, value: object, indent: int | None) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False).encode()
    if b"\\u" in text:  # a control character, which has no other form
        return
    assert accepts(TextTables(vocabulary), split(text))
    assert accepts(TextTables(vocabulary, is_strict=True), split(text))


def test_what_is_taken_away(vocabulary: Vocabulary) -> None:
    plain, strict = TextTables(vocabulary), TextTables(vocabulary, is_strict=True)
    for text in (
        b'"a\nb"',
        b'"\\\n"',
        b"\x0b1",
        b"\xe6\x97",
        b"\xad",
        b"\xe6a",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        rb'"\u0061"',
    ):
        assert not accepts(plain, split(text)), text
    for text in (b"[1,]", b'{"a":1 , \n}', b"1e5", b"1.e5", b"[2E-3]"):
        assert accepts(plain, split(text))
        assert not accepts(strict, split(text)), text
    for text in (b'["e5",true,false]', b'"1e5"', b'[",]"]'):
        assert accepts(strict, split(text)), text
    assert accepts(plain, split(b"a\x0bb"), is_json=False)


def test_rollback(vocabulary: Vocabulary) -> None:
    tracker = TextTracker(TextTables(vocabulary), is_json=True)
    before = tracker.row().copy()
    quote = vocabulary.token_bytes.index(b'"')
    tracker.advance(quote)
    assert (tracker.row() != before).any()
    tracker.rollback(1)
    assert (tracker.row() == before).all()
