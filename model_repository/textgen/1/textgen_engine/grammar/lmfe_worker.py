"""The lm-format-enforcer side of a worker process: one grammar, one text.

The only file that imports `lmformatenforcer` (never its `integrations`, which do not import beside transformers 5).
The library is pure Python and works out each mask by walking the vocabulary as a tree, for milliseconds to seconds; so
each text has a process of its own, beside the engine's, and everything goes when the text is done.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from textgen_engine.errors import Unsupported
from textgen_engine.grammar.base import GrammarLimits, GrammarSpec, grammar_error
from textgen_engine.grammar.capabilities import LMFE
from textgen_engine.grammar.json_lexer import TextTables, TextTracker
from textgen_engine.grammar.regex import to_rust_regex
from textgen_engine.grammar.rewrite import prepare_leniently
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


_MAX_WHITESPACE = {"none": 0, "bounded": 33, "flexible": 1_000_000}


def prepare(payload: tuple[Vocabulary, GrammarLimits]) -> Callable[[], LmfeSession]:
    """Build the library's vocabulary tree once (seconds, tens of MB); each session shares it."""
    import torch
    from lmformatenforcer import TokenEnforcerTokenizerData

    vocabulary, limits = payload
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

    alphabet = {text[0] for _, text, _ in tokens}

    def decode(token_ids: list[int]) -> str:
        # Only whole characters. One that no token begins with is unknown to the library's parsers; where they allow
        # pieces of characters (U+FFFD) they allow any such character.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(b"".join(pieces[i] or b"" for i in token_ids))
        return "".join(char if char in alphabet else "\ufffd" for char in text)

    library_data = TokenEnforcerTokenizerData(
        tokens, decode, vocabulary.eos_token_ids[0], True, vocabulary.num_words * 32
    )
    tables = _Tables(vocabulary, limits, library_data)
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

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits, library_data: Any) -> None:
        self.vocabulary = vocabulary
        self.limits = limits
        self.library_data = library_data
        self.text = TextTables(vocabulary, is_strict=True)
        blank = np.zeros(vocabulary.num_words * 32, dtype=np.uint8)
        for token_id, piece in enumerate(vocabulary.token_bytes):
            if piece and token_id not in vocabulary.special_token_ids:
                blank[token_id] = all(byte in _WHITESPACE for byte in piece)
        self.blank_row = pack_bits(blank)


class LmfeSession:
    """One text. `open` first; then `advance` and `rollback`, each answering with the new state.

    The library's own entry point keeps a table of every prefix it has seen, O(n) work and memory per token. The states
    behind it need the last one only, so they are kept here, as a stack.
    """

    def __init__(self, tables: _Tables) -> None:
        self._tables = tables
        self._enforcer: Any = None
        self._is_json = False
        self._tracker = TextTracker(tables.text, is_json=False)
        self._states: list[Any] = []  # before each token and after the last

    def prepare(self, spec: GrammarSpec) -> tuple[LmfeJob, Sequence[str]]:
        """What is to be enforced, and warnings. Raises GrammarError or Unsupported."""
        if spec.kind == "choice":
            return LmfeJob("choice", spec.value, 0), ()
        if spec.kind == "regex":
            to_rust_regex(spec.value)
            if re.search(r"\\[pP]\{|\[\[:|\(\?[a-z]", spec.value):
                raise Unsupported("grammar_backend lmfe has no Unicode classes, POSIX classes or flags in a regex")
            return LmfeJob("regex", _without_anchors(spec.value), 0), ()
        prepared = prepare_leniently(spec, LMFE, self._tables.limits)
        if prepared.or_plain_text:
            raise Unsupported("grammar_backend lmfe has no tool_choice auto; llguidance has")
        text = json.dumps(prepared.schema, ensure_ascii=False)
        return LmfeJob("json", text, _MAX_WHITESPACE[spec.whitespace]), prepared.warnings

    def open(self, job: LmfeJob) -> LmfeState:
        """Compile. Raises GrammarError."""
        from lmformatenforcer import RegexParser, StringParser, TokenEnforcer, UnionParser
        from lmformatenforcer.characterlevelparser import CharacterLevelParserConfig
        from lmformatenforcer.jsonschemaparser import JsonSchemaParser

        alphabet = self._tables.library_data.tokenizer_alphabet
        unknown = next((char for char in job.value if not char.isascii() and char not in alphabet), None)
        if unknown is not None:
            raise grammar_error(f"lmfe cannot enforce the character {unknown!r}: the tokenizer has no token for it")
        config = CharacterLevelParserConfig(alphabet=alphabet, max_consecutive_whitespaces=job.max_whitespace)
        self._is_json = job.kind == "json"
        self._tracker = TextTracker(self._tables.text, is_json=self._is_json)
        try:
            if self._is_json:
                parser = JsonSchemaParser(json.loads(job.value) or None, config)
            elif job.kind == "regex":
                parser = RegexParser(job.value, config)
            else:
                parser = UnionParser([StringParser(text) for text in json.loads(job.value)])
            self._enforcer = TokenEnforcer(self._tables.library_data, parser)
            parser.config = config  # the enforcer has put its own in
            self._push(TokenEnforcer.OutputTensorState(parser=parser))
            return self._state()
        except Exception as error:
            raise grammar_error(f"lmfe cannot enforce this: {type(error).__name__}: {error}") from None

    def advance(self, token_ids: Sequence[int]) -> tuple[int, LmfeState]:
        """Take tokens while the masks allow them: how many, and the state behind the last."""
        state = self._state()
        for num_taken, token_id in enumerate(token_ids):
            word = np.frombuffer(state.row, dtype=np.int32)[token_id >> 5]
            if not (int(word) >> (token_id & 31)) & 1:
                return num_taken, state
            self._tracker.advance(token_id)
            self._push(self._enforcer._apply_new_characters(self._states[-1], [token_id]))
            state = self._state()
        return len(token_ids), state

    def rollback(self, num_tokens: int) -> LmfeState:
        del self._states[len(self._states) - num_tokens :]
        self._tracker.rollback(num_tokens)
        return self._state()

    def _push(self, state: Any) -> None:
        if type(state.parser).__name__ == "ForceStopParser":
            raise RuntimeError("lm-format-enforcer refused a token that its mask allowed")
        self._enforcer._compute_allowed_tokens((), state)
        self._states.append(state)

    def _state(self) -> LmfeState:
        tables = self._tables
        row = self._states[-1].allowed_tokens.allowed_tokens.numpy().copy()
        may_end = bool((row & tables.vocabulary.eos_row).any()) and self._tracker.is_whole()
        row &= tables.vocabulary.text_row
        row &= self._tracker.row()
        # Behind the value the library allows blanks on and on; a JSON text is complete without them.
        must_end = may_end and (not row.any() or (self._is_json and not (row & ~tables.blank_row).any()))
        if must_end:
            row[:] = 0
        if len(self._states) == 1 and self._is_json:
            row &= ~tables.blank_row  # no blanks before the value
        return LmfeState(row.tobytes(), may_end, must_end)


def _without_anchors(pattern: str) -> str:
    """The library matches whole texts and does not know the anchors at the two ends."""
    if pattern.startswith("^"):
        pattern = pattern[1:]
    if pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2:
        pattern = pattern[:-1]
    return pattern
