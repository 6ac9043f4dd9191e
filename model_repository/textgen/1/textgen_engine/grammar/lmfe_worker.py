"""The lm-format-enforcer side of a worker process: one grammar, one text.

The only file that imports `lmformatenforcer` (never its `integrations`, which do not import beside transformers 5).
The library is pure Python, works out each mask by walking the vocabulary as a tree, and keeps every prefix it has seen;
so each text has a process of its own, and everything goes when the text is done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from textgen_engine.errors import GrammarError
from textgen_engine.grammar.base import grammar_error
from textgen_engine.grammar.vocabulary import Vocabulary, pack_bits

_WHITESPACE = b" \t\n\r"


@dataclass(frozen=True)
class LmfeJob:
    """What a worker is to enforce. kind: json (a schema as text), regex (a pattern), choice (JSON list).

    max_whitespace: run of blanks allowed between the tokens of JSON.
    """

    kind: str
    value: str
    max_whitespace: int


@dataclass(frozen=True)
class LmfeState:
    """row: the packed mask, int32 bytes. may_end, must_end: see base.GrammarMatcher."""

    row: bytes
    may_end: bool
    must_end: bool


def prepare(vocabulary: Vocabulary) -> Callable[[], LmfeSession]:
    """Build the library's vocabulary tree once (seconds, tens of MB); each session shares it."""
    import torch
    from lmformatenforcer import TokenEnforcerTokenizerData

    # The library turns its own faults into "the text may end here" and a log record: see _FaultRecorder.
    logging.getLogger().handlers[:] = [_FaultRecorder()]
    torch.set_num_threads(1)
    pieces = vocabulary.token_bytes
    skipped = vocabulary.special_token_ids
    tokens: list[tuple[int, str, bool]] = []
    for token_id, piece in enumerate(pieces[: vocabulary.width]):
        if piece and token_id not in skipped:
            # Pieces of a character read as U+FFFD. A whole token is its own text wherever it stands ("new word"), so
            # the library need not decode it together with what went before.
            text = piece.decode(errors="replace")
            tokens.append((token_id, text, "\ufffd" not in text))

    def decode(token_ids: list[int]) -> str:
        text = b"".join(pieces[i] or b"" for i in token_ids).decode(errors="replace")
        return text.rstrip("\ufffd")

    library_data = TokenEnforcerTokenizerData(tokens, decode, vocabulary.eos_token_ids[0], True, vocabulary.num_words * 32)
    tables = _Tables(vocabulary, library_data)
    return lambda: LmfeSession(tables)


class _FaultRecorder(logging.Handler):
    """Turns the library's "Unknown LMFormatEnforcer Problem" record into an exception, where it is written."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        raise RuntimeError(f"fault in lm-format-enforcer: {type(cause).__name__}: {cause}")


class _Tables:
    """What all sessions share."""

    def __init__(self, vocabulary: Vocabulary, library_data: Any) -> None:
        self.vocabulary = vocabulary
        self.library_data = library_data
        num_bits = vocabulary.num_words * 32
        blank = np.zeros(num_bits, dtype=np.uint8)
        continuations: dict[int, list[int]] = {1: [], 2: [], 3: []}
        for token_id, piece in enumerate(vocabulary.token_bytes):
            if not piece or token_id in vocabulary.special_token_ids or token_id >= num_bits:
                continue
            blank[token_id] = all(byte in _WHITESPACE for byte in piece)
            if len(piece) <= 3 and all(0x80 <= byte < 0xC0 for byte in piece):
                for missing in range(len(piece), 4):
                    continuations[missing].append(token_id)
        self.blank_row = pack_bits(blank)
        self.continuation_rows = {}
        for missing, token_ids in continuations.items():
            bits = np.zeros(num_bits, dtype=np.uint8)
            bits[token_ids] = 1
            self.continuation_rows[missing] = pack_bits(bits)


class LmfeSession:
    """One text. `open` first; then `advance` and `rollback`, each answering with the new state."""

    def __init__(self, tables: _Tables) -> None:
        self._tables = tables
        self._enforcer: Any = None
        self._is_json = False
        # The library takes the first sequence it sees for a prompt; a special token never is part of the text.
        self._token_ids = [tables.vocabulary.eos_token_ids[0]]

    def open(self, job: LmfeJob) -> LmfeState:
        """Compile. Raises GrammarError."""
        from lmformatenforcer import RegexParser, StringParser, TokenEnforcer, UnionParser
        from lmformatenforcer.characterlevelparser import CharacterLevelParserConfig
        from lmformatenforcer.jsonschemaparser import JsonSchemaParser

        config = CharacterLevelParserConfig(
            alphabet=self._tables.library_data.tokenizer_alphabet, max_consecutive_whitespaces=job.max_whitespace
        )
        try:
            if job.kind == "json":
                schema = json.loads(job.value)
                parser = JsonSchemaParser(schema if schema else None, config)
            elif job.kind == "regex":
                parser = RegexParser(job.value, config)
            else:
                parser = UnionParser([StringParser(text) for text in json.loads(job.value)])
            self._is_json = job.kind == "json"
            self._enforcer = TokenEnforcer(self._tables.library_data, parser)
            if self._is_json:
                # The enforcer puts its own configuration over the parser's.
                parser.config = config
            return self._state()
        except GrammarError:
            raise
        except Exception as error:
            raise grammar_error(f"lmfe cannot enforce this: {type(error).__name__}: {error}") from None

    def advance(self, token_ids: Sequence[int]) -> tuple[int, LmfeState]:
        """Take tokens while the masks allow them: how many, and the state behind the last."""
        state = self._state()
        for num_taken, token_id in enumerate(token_ids):
            word = np.frombuffer(state.row, dtype=np.int32)[token_id >> 5]
            if not (int(word) >> (token_id & 31)) & 1:
                return num_taken, state
            self._token_ids.append(token_id)
            state = self._state()
        return len(token_ids), state

    def rollback(self, num_tokens: int) -> LmfeState:
        del self._token_ids[len(self._token_ids) - num_tokens :]
        return self._state()

    def _state(self) -> LmfeState:
        tables = self._tables
        row = self._enforcer.get_allowed_tokens(self._token_ids).allowed_tokens.numpy().copy()
        may_end = bool((row & tables.vocabulary.eos_row).any())
        row &= tables.vocabulary.text_row
        missing = self._missing_bytes()
        if missing:
            # The library sees half a character as any character would do; only its other half does.
            row &= tables.continuation_rows[missing]
            may_end = False
        # Behind the value the library allows blanks on and on; a JSON text is complete without them.
        must_end = may_end and (not row.any() or (self._is_json and not (row & ~tables.blank_row).any()))
        if must_end:
            row[:] = 0
        if len(self._token_ids) == 1 and self._is_json:
            row &= ~tables.blank_row  # no blanks before the value
        return LmfeState(row.tobytes(), may_end, must_end)

    def _missing_bytes(self) -> int:
        """Continuation bytes the last character of the text still needs."""
        tail = b""
        for token_id in reversed(self._token_ids[1:]):
            tail = (self._tables.vocabulary.token_bytes[token_id] or b"") + tail
            if len(tail) >= 4:
                break
        for back in range(1, min(4, len(tail)) + 1):
            byte = tail[-back]
            if byte < 0x80:
                return 0
            if byte >= 0xC0:
                length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
                return max(0, length - back)
        return 0
