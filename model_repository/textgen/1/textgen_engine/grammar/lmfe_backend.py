"""lm-format-enforcer: JSON Schema, regexes and choices, each text in a worker process of its own.

The library is Python that would hold the engine's interpreter lock for milliseconds to seconds per mask; see
lmfe_worker.py for its other side. Here: admission (a bounded number of workers), time limits per mask, and the part of
JSON Schema that it really enforces (everything else is refused, because it ignores what it does not know).
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence

import numpy as np

from textgen_engine.errors import GrammarError, Overloaded, Unsupported
from textgen_engine.grammar.base import GrammarLimits, GrammarSpec, MaskRow
from textgen_engine.grammar.lmfe_worker import LmfeJob, LmfeState
from textgen_engine.grammar.matcher import TextMatcher
from textgen_engine.grammar.sandbox import Sandbox, Worker, WorkerDied, WorkerLate, deadline_in
from textgen_engine.grammar.vocabulary import Vocabulary


class LmfeBackend:
    """Implements base.GrammarBackend."""

    name = "lmfe"
    uninterruptible = False

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        """Raises Unsupported where the package is missing. The worker's template starts with the first grammar."""
        if importlib.util.find_spec("lmformatenforcer") is None:
            raise Unsupported("grammar_backend lmfe: the package `lm-format-enforcer` is not installed")
        self._vocabulary = vocabulary
        self._limits = limits
        self._sandbox = Sandbox(
            "textgen_engine.grammar.lmfe_worker:prepare",
            (vocabulary, limits),
            memory_bytes=limits.worker_memory_bytes,
        )
        self._slots = threading.BoundedSemaphore(limits.max_worker_matchers)

    def compile(self, spec: GrammarSpec) -> LmfeGrammar:
        """Try the grammar in a worker that is killed at the time limit."""
        if spec.kind in ("lark", "ebnf"):
            raise Unsupported(f"grammar_backend lmfe has no {spec.kind} grammars; llguidance has")
        if spec.property_order == "schema" and spec.kind in ("json_schema", "json_object", "tools"):
            raise Unsupported("grammar_backend lmfe makes properties in any order; llguidance and xgrammar keep one")
        worker = self._sandbox.open()
        left_s = deadline_in(self._limits.compile_timeout_s)
        try:
            job, warnings = worker.call("prepare", spec, timeout_s=left_s())
            worker.call("open", job, timeout_s=left_s())
        except WorkerLate:
            limit = self._limits.compile_timeout_s
            raise GrammarError(f"lmfe: the grammar took longer than {limit:g} s to compile") from None
        except (WorkerDied, RuntimeError):
            raise GrammarError("lmfe: the grammar used up the memory of its worker") from None
        finally:
            worker.close()
        return LmfeGrammar(self, job, warnings)

    def close(self) -> None:
        self._sandbox.close()

    def new_matcher(self, job: LmfeJob) -> LmfeMatcher:
        if not self._slots.acquire(blocking=False):
            limit = self._limits.max_worker_matchers
            raise Overloaded(f"{limit} texts are being constrained by lmfe; the limit is max_worker_matchers = {limit}")
        try:
            worker = self._sandbox.open()
            worker.send("open", job)
        except BaseException:
            self._slots.release()
            raise
        return LmfeMatcher(self._vocabulary, self._limits, worker, self._slots)


class LmfeGrammar:
    """Implements base.CompiledGrammar: text that has been tried; the work is done again in each matcher's worker."""

    def __init__(self, backend: LmfeBackend, job: LmfeJob, warnings: Sequence[str]) -> None:
        self._backend = backend
        self._job = job
        self.warnings = warnings
        self.size_bytes = 1024 + len(job.value)

    def matcher(self) -> LmfeMatcher:
        return self._backend.new_matcher(self._job)


class LmfeMatcher(TextMatcher):
    """Implements base.GrammarMatcher over a worker.

    `advance` of one token checks it against the mask at hand and only sends it; the worker makes the next mask while
    the engine does other things. `ready` says whether that mask has come; whoever asks for it earlier waits, at most
    step_timeout_s.
    """

    def __init__(
        self, vocabulary: Vocabulary, limits: GrammarLimits, worker: Worker, slots: threading.BoundedSemaphore
    ) -> None:
        super().__init__(vocabulary)
        self._worker = worker
        self._slots: threading.BoundedSemaphore | None = slots
        self._limits = limits
        # The worker begins with compiling the grammar again, which took at most the compile limit the first time.
        self._answer_timeout_s = limits.compile_timeout_s
        self._state: LmfeState | None = None  # None while the answer to the last call is outstanding
        self._num_taken = 0  # by the last `advance` of several tokens
        self._row = np.zeros(vocabulary.num_words, dtype=np.int32)

    def ready(self) -> bool:
        return self._error is not None or self._state is not None or self._worker.has_answer()

    def close(self) -> None:
        self._worker.close()
        if self._slots is not None:
            self._slots.release()
            self._slots = None

    def _fill_text(self, row: MaskRow) -> None:
        if self._current() is not None:
            row[:] = self._row

    def _advance_text(self, token_ids: Sequence[int]) -> int:
        if self._current() is None:
            return 0
        if len(token_ids) == 1:
            token_id = token_ids[0]
            if token_id >= self._row.size * 32 or not (int(self._row[token_id >> 5]) >> (token_id & 31)) & 1:
                return 0
            self._send("advance", [token_id])
            return 1
        known = [token_id for token_id in token_ids if token_id < self._row.size * 32]
        self._send("advance", list(known))
        self._current()
        return self._num_taken

    def _rollback_text(self, num_tokens: int) -> None:
        if self._current() is not None:
            self._send("rollback", num_tokens)

    def _may_end(self) -> bool:
        state = self._current()
        return state is not None and state.may_end

    def _must_end(self) -> bool:
        state = self._current()
        return state is not None and state.must_end

    def _send(self, method: str, argument: object) -> None:
        self._state = None
        try:
            self._worker.send(method, argument)
        except WorkerDied:
            self.fail("the lmfe worker died")

    def _current(self) -> LmfeState | None:
        """The state behind the last call, waited for; None once the matcher has failed."""
        if self._state is None and self._error is None:
            try:
                answer = self._worker.receive(self._answer_timeout_s)
            except WorkerLate:
                self.fail(f"lmfe took longer than {self._answer_timeout_s:g} s for one mask")
                return None
            except WorkerDied:
                self.fail("the lmfe worker died (out of memory, or a fault in the library)")
                return None
            except (GrammarError, RuntimeError) as error:
                self.fail(f"lmfe failed: {error}"[:500])
                return None
            self._answer_timeout_s = self._limits.step_timeout_s
            self._num_taken, self._state = answer if isinstance(answer, tuple) else (0, answer)
            self._row = np.frombuffer(self._state.row, dtype=np.int32)
        return self._state
