"""The engine's constrained sequences: who waits for a grammar, who walks one, and the masks of a step.

Sits between the engine's loop, which knows tokens and sequences, and the grammar room, which knows neither. A request
waits here until its grammar is compiled; then each of its choices owns a matcher until it ends. A request that only
asks what a grammar takes waits here for that walk too, which has a thread of its own.

Forced tokens: where the grammar leaves one continuation, the tokenizer's own split of it is what comes next. With
jump-forward these tokens are appended at once and computed together, as a short prompt; without, each is sampled from a
mask that allows it alone. Both ways give the same tokens, so that the option changes speed only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import torch

from textgen_engine.errors import EngineError, EngineFailure, GrammarError
from textgen_engine.grammar import CompiledGrammar, GrammarCompiler, GrammarHandle, GrammarMask, GrammarMatcher
from textgen_engine.grammar.check import GrammarVerdict, TextSplitter, check_text
from textgen_engine.request import GenerationRequest
from textgen_engine.sampling.sampler import GrammarRows
from textgen_engine.sequence import Sequence
from textgen_engine.transfer import to_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the grammar says of a token: the text is complete; `forced` tokens come next; or an error ends it."""

    is_complete: bool = False
    forced: tuple[int, ...] = ()
    error: EngineError | None = None


@dataclass(eq=False, slots=True)
class _Walk:
    matcher: GrammarMatcher
    jumps: bool  # forced tokens are appended at once
    is_settled: bool = True  # False: whether the last token completed the text is not known yet
    forced: list[int] = field(default_factory=list)  # what must come next, as far as known


class Constraints:
    """Called from the engine's loop thread alone."""

    def __init__(
        self, compiler: GrammarCompiler, *, jump_forward: bool, on_checked: Callable[[], None] = lambda: None
    ) -> None:
        """on_checked: called from any thread when `take_checked` has something new."""
        self._compiler = compiler
        self._jump_forward = jump_forward
        self._waiting: dict[str, GrammarHandle] = {}
        self._walks: dict[Sequence, _Walk] = {}
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")
        self._checks: dict[str, Future[GrammarVerdict]] = {}
        self._check_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-checks")
        self._on_checked = on_checked
        self._splitter: TextSplitter | None = None  # made by the first check, in its thread
        self.num_forced_tokens = 0

    # ---- waiting for a grammar ---------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> None:
        """Ask for the request's grammar."""
        assert request.grammar is not None
        self._waiting[request.request_id] = self._compiler.submit(request.grammar)

    def take_ready(self) -> Iterable[tuple[str, CompiledGrammar | EngineError, float | None]]:
        """Requests that wait no longer: the grammar or the error, and the seconds it took (None: from the cache)."""
        for request_id in [i for i, handle in self._waiting.items() if handle.done()]:
            handle = self._waiting.pop(request_id)
            try:
                yield request_id, handle.result(), handle.compile_s
            except Exception as error:
                yield request_id, as_engine_error(error), handle.compile_s

    def withdraw(self, request_id: str) -> None:
        """The request ended while it waited; unknown: nothing."""
        handle = self._waiting.pop(request_id, None)
        if handle is not None:
            handle.cancel()
        check = self._checks.pop(request_id, None)
        if check is not None:
            check.cancel()

    # ---- checking a text ---------------------------------------------------------------------------------------

    def check(self, request: GenerationRequest, compiled: CompiledGrammar) -> None:
        """Begin to find out what the request's `grammar_check` asks about its compiled grammar."""
        check = self._check_thread.submit(self._verdict, request, compiled)
        self._checks[request.request_id] = check
        check.add_done_callback(lambda _: self._on_checked())

    def take_checked(self) -> Iterable[tuple[str, GrammarVerdict | EngineError]]:
        """Requests whose check is done, with its result."""
        for request_id in [i for i, check in self._checks.items() if check.done()]:
            try:
                yield request_id, self._checks.pop(request_id).result()
            except Exception as error:
                yield request_id, as_engine_error(error)

    def _verdict(self, request: GenerationRequest, compiled: CompiledGrammar) -> GrammarVerdict:
        assert request.grammar is not None and request.grammar_check is not None
        text = None
        if request.grammar_check.text is not None:
            if self._splitter is None:
                self._splitter = TextSplitter(self._compiler.vocabulary)
            limit_s = self._compiler.limits.compile_timeout_s
            text = check_text(compiled, self._splitter, request.grammar_check.text, timeout_s=limit_s)
        return GrammarVerdict(True, request.grammar.backend, tuple(compiled.warnings), text=text)

    # ---- walking a grammar -------------------------------------------------------------------------------------

    def attach(self, sequence: Sequence, compiled: CompiledGrammar) -> None:
        """Constrain a sequence from its first output token on.

        Tokens whose log-probabilities are wanted are all sampled, so such a sequence never jumps forward.
        Raises Overloaded when the backend's matchers are all in use.
        """
        request = sequence.request
        is_scored = request.output.logprobs or request.output.top_n_tokens > 0 or request.best_of > request.n
        walk = _Walk(compiled.matcher(), jumps=self._jump_forward and not is_scored)
        walk.forced = list(walk.matcher.forced())
        self._walks[sequence] = walk

    def release(self, sequence: Sequence) -> None:
        """The sequence ended; unconstrained ones: nothing."""
        walk = self._walks.pop(sequence, None)
        if walk is not None:
            walk.matcher.close()

    def hold(self) -> tuple[bool, list[Sequence]]:
        """Mark the sequences whose next mask is still being made elsewhere. Returns whether there is one, and the
        sequences of which it is known only now that their last token completed the text."""
        any_held, completed = False, []
        for sequence, walk in self._walks.items():
            sequence.is_held = not walk.matcher.ready()
            any_held = any_held or sequence.is_held
            if not sequence.is_held and not walk.is_settled:
                walk.is_settled = True
                if walk.matcher.is_complete():
                    completed.append(sequence)
        return any_held, completed

    def has_mask(self, sequence: Sequence) -> bool:
        """Whether the mask of its next token can be had without waiting for another process; unconstrained: True."""
        walk = self._walks.get(sequence)
        return walk is None or walk.matcher.ready()

    def accept(self, sequence: Sequence, token_id: int) -> Accepted:
        """Tell the grammar which token was chosen. Unconstrained sequences: nothing to say."""
        walk = self._walks.get(sequence)
        if walk is None:
            return Accepted()
        if walk.matcher.advance([token_id]) != 1:
            reason = walk.matcher.error() or f"token {token_id} was refused"
            return Accepted(error=EngineFailure(f"the grammar and its mask disagree: {reason}"))
        if walk.forced:
            walk.forced.pop(0)
        if not walk.matcher.ready():  # asking would make every sequence of the engine wait for the answer
            walk.is_settled = False
            return Accepted()
        if walk.matcher.is_complete():
            return Accepted(is_complete=True)
        if not walk.forced:
            walk.forced = list(walk.matcher.forced())
        if not walk.jumps:
            return Accepted()
        forced, walk.forced = tuple(walk.forced), []
        return Accepted(forced=forced)

    def is_satisfied(self, sequence: Sequence) -> bool | None:
        """Whether the text so far is one the grammar accepts; None where that is not known without waiting, True for
        unconstrained sequences."""
        walk = self._walks.get(sequence)
        if walk is None:
            return True
        return walk.matcher.can_stop() if walk.matcher.ready() else None

    def accept_forced(self, sequence: Sequence, token_id: int) -> Accepted:
        """Tell the grammar that a forced token was appended without sampling."""
        walk = self._walks[sequence]
        self.num_forced_tokens += 1
        if walk.matcher.advance([token_id]) != 1:
            return Accepted(error=EngineFailure(f"the grammar refused its own forced token {token_id}"))
        return Accepted(is_complete=walk.matcher.is_complete())

    def binds(self, sequence: Sequence) -> bool:
        """Whether the sequence walks a grammar: its next mask is made from its tokens so far."""
        return sequence in self._walks

    # ---- masks -------------------------------------------------------------------------------------------------

    def start_masks(self, sequences: list[Sequence]) -> PendingMasks | None:
        """Begin to fill the masks of the constrained ones among the sequences to be sampled; None without any."""
        constrained = [sequence for sequence in sequences if sequence in self._walks]
        if not constrained:
            return None
        work = [(row, self._walks[sequence].matcher) for row, sequence in enumerate(constrained)]
        return PendingMasks(constrained, self._mask_thread.submit(self._compiler.masks.fill, work), self._walks)

    def close(self) -> None:
        """End the compiler's threads and worker processes."""
        self._mask_thread.shutdown(wait=False)
        self._check_thread.shutdown(wait=False, cancel_futures=True)
        self._compiler.close()


def as_engine_error(error: Exception) -> EngineError:
    """The error itself if it is one of ours; a fault of a library, logged, as an EngineFailure."""
    if isinstance(error, EngineError):
        return error
    logger.error("a request failed: %s", error, exc_info=error)
    return EngineFailure(f"the request could not be served ({type(error).__name__})")


@dataclass(eq=False, slots=True)
class PendingMasks:
    """Masks being filled while the forward pass runs."""

    sequences: list[Sequence]
    future: Future[GrammarMask]
    walks: dict[Sequence, _Walk]

    def rows(self, origins: list[Sequence], device: torch.device) -> GrammarRows | None:
        """The bits as the sampler takes them. origins[row]: the sequence whose mask row `row` of the logits obeys (a
        choice that starts in this step obeys its parent's: both stand at the grammar's beginning)."""
        bits = self.future.result().bits
        for index, sequence in enumerate(self.sequences):
            forced = self.walks[sequence].forced
            if forced:
                bits[index] = 0
                bits[index, forced[0] >> 5] = np.int32(np.uint32(1 << (forced[0] & 31)).view(np.int32))
        place = {sequence: index for index, sequence in enumerate(self.sequences)}
        rows = [row for row, origin in enumerate(origins) if origin in place]
        chosen = bits[[place[origins[row]] for row in rows]]
        return GrammarRows(to_device(rows, device, torch.int64), to_device(torch.from_numpy(chosen), device))

    def settle(self) -> None:
        """Wait until no matcher is in use any more; for a step that failed."""
        wait([self.future])

    def errors(self) -> dict[Sequence, GrammarError]:
        """Sequences whose grammar cannot go on."""
        return {self.sequences[index]: GrammarError(text) for index, text in self.future.result().errors}
