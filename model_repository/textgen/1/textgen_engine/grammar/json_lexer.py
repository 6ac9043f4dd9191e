r"""`TextTracker`: which bytes may follow, as far as UTF-8 and JSON's own lexical rules say, whatever a backend allows.

Some libraries let raw control characters into JSON strings, halves of characters where whole ones belong, commas before
closing brackets, `\u` escapes by which one name passes for another, and exponents into numbers where they do not belong
(`1.e5`, or `1e-5` for an integer). A tracker follows the bytes of the tokens taken and gives the rows of tokens that
keep the text well formed. It only ever takes tokens away.
"""

from __future__ import annotations

import codecs
from enum import Enum

import numpy as np

from textgen_engine.grammar.base import MaskRow
from textgen_engine.grammar.vocabulary import Vocabulary, pack_bits


class _Lexical(Enum):
    """Where in JSON text a position is. PLAIN: no JSON, nothing to follow."""

    PLAIN = 0
    OUTSIDE = 1
    STRING = 2
    ESCAPE = 3
    NUMBER = 4  # outside, behind a digit or decimal point
    COMMA = 5  # outside, behind a comma and perhaps blanks


_Position = tuple[_Lexical, bytes]  # and the bytes of an unfinished character


class TextTables:
    """Rows per position, made when first asked for. Shared by the trackers of one vocabulary (one thread at a time,
    or many: a row made twice is the same row)."""

    def __init__(self, vocabulary: Vocabulary, *, is_strict: bool = False) -> None:
        """is_strict: also forbid commas before closing brackets, and exponents everywhere."""
        self.vocabulary = vocabulary
        self.is_strict = is_strict
        self._rows: dict[_Position, MaskRow] = {}
        self._suspect = []
        self._broken = []
        self._continuing = []
        for token_id, piece in enumerate(vocabulary.token_bytes):
            if not piece:
                continue
            if (
                min(piece) < 0x20
                or b"\\u" in piece
                or piece.startswith(b"u")
                or (is_strict and any(byte in b"eE]}" for byte in piece))
            ):
                self._suspect.append(token_id)
            if 0x80 <= piece[0] < 0xC0:
                self._continuing.append(token_id)
            elif _rest_of_character(piece) is None:
                self._broken.append(token_id)

    def row(self, position: _Position) -> MaskRow:
        """int32 [num_words]: the tokens that may stand at a position."""
        row = self._rows.get(position)
        if row is None:
            row = self._rows[position] = self._make_row(position)
        return row

    def _make_row(self, position: _Position) -> MaskRow:
        lexical, unfinished = position
        pieces = self.vocabulary.token_bytes
        bits = np.ones(self.vocabulary.num_words * 32, dtype=np.uint8)
        if unfinished:
            bits[:] = 0
            for token_id in self._continuing:
                bits[token_id] = _rest_of_character(unfinished + (pieces[token_id] or b"")) is not None
        else:
            bits[self._continuing + self._broken] = 0
        if lexical is not _Lexical.PLAIN:
            for token_id in self._suspect:
                if bits[token_id]:
                    bits[token_id] = (
                        advance_json(lexical, pieces[token_id] or b"", is_strict=self.is_strict) is not None
                    )
        return pack_bits(bits)


class TextTracker:
    """The position in one text."""

    def __init__(self, tables: TextTables, *, is_json: bool) -> None:
        self._tables = tables
        self._positions: list[_Position] = [(_Lexical.OUTSIDE if is_json else _Lexical.PLAIN, b"")]

    def row(self) -> MaskRow:
        """The tokens that keep the text well formed."""
        return self._tables.row(self._positions[-1])

    def is_whole(self) -> bool:
        """No character is unfinished."""
        return not self._positions[-1][1]

    def advance(self, token_id: int) -> None:
        """Follow a token that `row` allows."""
        lexical, unfinished = self._positions[-1]
        piece = self._tables.vocabulary.token_bytes[token_id] or b""
        if lexical is not _Lexical.PLAIN:
            lexical = advance_json(lexical, piece, is_strict=self._tables.is_strict) or lexical
        self._positions.append((lexical, _rest_of_character(unfinished + piece) or b""))

    def rollback(self, num_tokens: int) -> None:
        del self._positions[len(self._positions) - num_tokens :]


def advance_json(lexical: _Lexical, piece: bytes, *, is_strict: bool) -> _Lexical | None:
    """The state behind `piece`; None where it has what JSON (or the stricter JSON) does not allow there."""
    for byte in piece:
        if lexical in (_Lexical.OUTSIDE, _Lexical.NUMBER, _Lexical.COMMA):
            if byte in b" \t\n\r":
                lexical = _Lexical.COMMA if lexical is _Lexical.COMMA else _Lexical.OUTSIDE
                continue
            if byte < 0x20:
                return None
            if is_strict and (lexical, byte) in _FORBIDDEN:
                return None
            lexical = _BEHIND.get(byte, _Lexical.OUTSIDE)
        elif byte < 0x20:
            return None
        elif lexical is _Lexical.ESCAPE:
            if byte == 0x75:
                return None  # \u0061 would be another name than "a" to the libraries, and the same to a reader
            lexical = _Lexical.STRING
        elif byte == 0x5C:
            lexical = _Lexical.ESCAPE
        elif byte == 0x22:
            lexical = _Lexical.OUTSIDE
    return lexical


_BEHIND = {0x22: _Lexical.STRING, 0x2C: _Lexical.COMMA, **dict.fromkeys(b"0123456789.", _Lexical.NUMBER)}
_FORBIDDEN = frozenset(
    [(_Lexical.NUMBER, 0x65), (_Lexical.NUMBER, 0x45), (_Lexical.COMMA, 0x5D), (_Lexical.COMMA, 0x7D)]  # e E ] }
)


def _rest_of_character(text: bytes) -> bytes | None:
    """The bytes of an unfinished character at the end (empty: none); None where `text` is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(text)
    except UnicodeDecodeError:
        return None
    return decoder.getstate()[0]
