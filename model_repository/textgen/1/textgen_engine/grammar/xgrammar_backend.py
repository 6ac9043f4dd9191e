"""xgrammar: JSON Schema, regexes, GBNF and choices; compiled in a worker process, walked in this one.

The library is fast per mask and ignores what it does not know in a schema, so a schema is first brought into the part
that it enforces (rewrite.py) and refused where that is not possible. Special tokens are kept out by `TextMatcher`.
Only this file and xgrammar_worker.py import `xgrammar`, inside functions.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from textgen_engine.errors import GrammarError, Unsupported
from textgen_engine.grammar.base import GrammarLimits, GrammarSpec, MaskRow
from textgen_engine.grammar.json_lexer import TextTables, TextTracker
from textgen_engine.grammar.matcher import TextMatcher
from textgen_engine.grammar.sandbox import Sandbox, WorkerDied, WorkerLate
from textgen_engine.grammar.vocabulary import Vocabulary
from textgen_engine.grammar.xgrammar_worker import tokenizer_info


class XgrammarBackend:
    """Implements base.GrammarBackend."""

    name = "xgrammar"
    uninterruptible = False

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        """Raises Unsupported where the package is missing."""
        if importlib.util.find_spec("xgrammar") is None:
            raise Unsupported("grammar_backend xgrammar: the package `xgrammar` is not installed")
        self._vocabulary = vocabulary
        self._limits = limits
        self._info: Any = None
        self._tables: TextTables | None = None
        self._info_lock = threading.Lock()
        self._sandbox = Sandbox(
            "textgen_engine.grammar.xgrammar_worker:prepare",
            (vocabulary, limits),
            memory_bytes=limits.worker_memory_bytes,
            niceness=5,  # a long compilation yields to the engine
        )

    def compile(self, spec: GrammarSpec) -> XgrammarGrammar:
        import xgrammar

        if spec.kind == "lark":
            raise Unsupported("grammar_backend xgrammar takes ebnf grammars, not lark; llguidance takes both")
        worker = self._sandbox.open()
        try:
            made = worker.call("compile", spec, timeout_s=self._limits.compile_timeout_s)
        except WorkerLate:
            limit = self._limits.compile_timeout_s
            raise GrammarError(f"xgrammar: the grammar took longer than {limit:g} s to compile") from None
        except (WorkerDied, RuntimeError):
            raise GrammarError("xgrammar: the grammar crashed its compiler or used up its memory") from None
        finally:
            worker.close()
        with self._info_lock:
            if self._info is None or self._tables is None:
                self._info = tokenizer_info(self._vocabulary)
                self._tables = TextTables(self._vocabulary)
            info, tables = self._info, self._tables
        compiled = xgrammar.CompiledGrammar.deserialize_json(made.serialised, info)
        return XgrammarGrammar(tables, compiled, made.is_json, made.warnings, made.size_bytes)

    def close(self) -> None:
        self._sandbox.close()


class XgrammarGrammar:
    """Implements base.CompiledGrammar."""

    def __init__(
        self, tables: TextTables, compiled: Any, is_json: bool, warnings: Sequence[str], size_bytes: int
    ) -> None:
        self._tables = tables
        self._compiled = compiled
        self._is_json = is_json
        self.warnings = warnings
        self.size_bytes = size_bytes

    def matcher(self) -> XgrammarMatcher:
        import xgrammar

        # The library's own end handling stays unused: after a stop token its matcher raises for good.
        return XgrammarMatcher(
            xgrammar.GrammarMatcher(self._compiled),
            TextTracker(self._tables, is_json=self._is_json),
            self._tables.vocabulary,
        )


class XgrammarMatcher(TextMatcher):
    """Implements base.GrammarMatcher."""

    def __init__(self, native: Any, tracker: TextTracker, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._native = native
        self._tracker = tracker
        self._mask = np.zeros((1, vocabulary.num_words), dtype=np.int32)
        self._mask_is_current = False

    def _fill_text(self, row: MaskRow) -> None:
        self._make_mask()
        row[:] = self._mask[0]

    def _make_mask(self) -> None:
        if not self._mask_is_current:
            self._mask.fill(-1)  # the library leaves a row alone that forbids nothing
            try:
                self._native.fill_next_token_bitmask(self._mask, 0)
            except RuntimeError as error:
                self.fail(f"xgrammar failed: {error}"[:500])
            self._mask &= self._tracker.row()
            self._mask_is_current = True

    def _advance_text(self, token_ids: Sequence[int]) -> int:
        for num_taken, token_id in enumerate(token_ids):
            self._make_mask()
            # By the mask, not by the matcher: a refused token is reported on stderr by the library, and never happens.
            if token_id >= self._vocabulary.width or not (int(self._mask[0, token_id >> 5]) >> (token_id & 31)) & 1:
                return num_taken
            if not self._native.accept_token(token_id):
                self.fail("xgrammar refused a token that its mask allowed")
                return num_taken
            self._tracker.advance(token_id)
            self._mask_is_current = False
        return len(token_ids)

    def _rollback_text(self, num_tokens: int) -> None:
        self._native.rollback(num_tokens)
        self._tracker.rollback(num_tokens)
        self._mask_is_current = False

    def _may_end(self) -> bool:
        return bool(self._native.is_completed())

    def _must_end(self) -> bool:
        self._make_mask()
        return not (self._mask[0] & self._vocabulary.text_row).any()
