"""`GrammarCompiler`: grammars compiled beside the engine loop, once each, within a time limit.

    submit(spec) -> GrammarHandle        the engine polls `done`; `on_ready` wakes it when it sleeps
      cache hit                          done at once
      same spec being compiled           shares that compilation (single flight)
      else                               queued for the spec's backend; each backend has its own threads, so a slow one
                                         does not hold up another

The cache keeps compiled grammars (least recently used, bounded in entries and bytes) and, for a short while, refusals.
A compilation past the limit is answered with a refusal at the limit, by a timer. A backend that compiles in a worker
process kills it then; one that compiles in this process (llguidance, which bounds its own work) is abandoned: its
thread is replaced and counted in `num_abandoned`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from textgen_engine.errors import EngineError, EngineFailure, GrammarError, Overloaded, Unsupported
from textgen_engine.grammar.base import CompiledGrammar, GrammarBackend, GrammarLimits, GrammarSpec
from textgen_engine.grammar.masks import MaskFiller
from textgen_engine.grammar.vocabulary import Vocabulary

Clock = Callable[[], float]
Loader = Callable[[str, Vocabulary, GrammarLimits], GrammarBackend]


class GrammarHandle:
    """One request's wait for its grammar. Made by GrammarCompiler.submit; `done` and `result` never block."""

    def __init__(self, job: _Job, *, was_cached: bool = False) -> None:
        self._job = job
        self._was_cached = was_cached
        self._cancelled = False

    def done(self) -> bool:
        return self._job.finished

    def result(self) -> CompiledGrammar:
        """The grammar. Raises GrammarError, Unsupported, Overloaded or EngineFailure. Only after `done`."""
        job = self._job
        assert job.finished, "result() before done()"
        if job.error is not None:
            # One error may be raised to several requests: each gets its own traceback.
            raise type(job.error)(job.error.message)
        assert job.compiled is not None
        return job.compiled

    @property
    def compile_s(self) -> float | None:
        """Seconds the compilation took; None where the grammar came from the cache."""
        return None if self._was_cached else self._job.compile_s

    def cancel(self) -> None:
        """This request does not wait any more. A compilation nobody waits for and that has not begun is dropped."""
        if not self._cancelled:
            self._cancelled = True
            self._job.num_waiting -= 1


@dataclass(eq=False)
class _Job:
    """One compilation, shared by the handles that wait for it. Changed under the compiler's lock."""

    key: bytes
    spec: GrammarSpec
    num_waiting: int = 0
    finished: bool = False
    compiled: CompiledGrammar | None = None
    error: EngineError | None = None
    compile_s: float | None = None
    expires_s: float | None = None  # of a refusal: when it is forgotten
    size_bytes: int = 0


class GrammarCompiler:
    """Owned by the engine and used from its loop thread; compiles on threads of its own."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        limits: GrammarLimits | None = None,
        backends: Sequence[str] = ("llguidance",),
        on_ready: Callable[[], None] | None = None,
        control_token_ids: Iterable[int] = (),
        mask_threads: int = 1,
        clock: Clock = time.monotonic,
        loader: Loader | None = None,
    ) -> None:
        """tokenizer: a transformers fast tokenizer, or a Vocabulary. vocab_size: width of the logits.

        backends: names that requests may ask for; a library is loaded when its first grammar comes.
        on_ready: called from any thread whenever a handle has become done. mask_threads: see LlguidanceBackend.
        loader: makes a backend by name; `load_backend` where None.
        """
        if isinstance(tokenizer, Vocabulary):
            self.vocabulary = tokenizer
        else:
            self.vocabulary = Vocabulary.from_tokenizer(
                tokenizer,
                vocab_size=vocab_size,
                eos_token_ids=eos_token_ids,
                control_token_ids=tuple(control_token_ids),
            )
        self.limits = limits or GrammarLimits()
        self.masks = MaskFiller(self.vocabulary)
        self.num_abandoned = 0
        self._on_ready = on_ready or (lambda: None)
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, _Job] = OrderedDict()  # finished and unfinished; least recently used first
        self._cached_bytes = 0
        self._closed = False
        load = loader or partial(load_backend, mask_threads=mask_threads)
        self._lanes = {
            name: _Lane(name, partial(load, name, self.vocabulary, self.limits), self._run, self.limits.compile_threads)
            for name in backends
        }

    # The engine's side

    def submit(self, spec: GrammarSpec) -> GrammarHandle:
        """Ask for a compiled grammar. Never blocks, never raises for the grammar's sake: see GrammarHandle.result."""
        key = _key(spec)
        with self._lock:
            job = self._entries.get(key)
            if job is not None and job.expires_s is not None and job.expires_s <= self._clock():
                self._forget(job)
                job = None
            if job is not None:
                self._entries.move_to_end(key)
                job.num_waiting += 1
                return GrammarHandle(job, was_cached=job.finished)
            job = _Job(key, spec, num_waiting=1)
            refusal = self._refusal(spec)
            if refusal is not None:
                job.finished, job.error = True, refusal
                return GrammarHandle(job)
            self._entries[key] = job
        self._lanes[spec.backend].put(job)
        return GrammarHandle(job)

    def close(self) -> None:
        """End threads and worker processes; compilations still waiting end with an error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            unfinished = [job for job in self._entries.values() if not job.finished]
        for job in unfinished:
            self._finish(job, error=EngineFailure("the server is stopping"))
        for lane in self._lanes.values():
            lane.close()

    def statistics(self) -> dict[str, int]:
        """Gauges: cached entries and bytes, compilations unfinished, threads abandoned."""
        with self._lock:
            return {
                "cached_entries": sum(job.finished for job in self._entries.values()),
                "cached_bytes": self._cached_bytes,
                "pending": sum(not job.finished for job in self._entries.values()),
                "abandoned_threads": self.num_abandoned,
            }

    # The threads' side

    def _refusal(self, spec: GrammarSpec) -> EngineError | None:
        if self._closed:
            return EngineFailure("the server is stopping")
        if spec.backend not in self._lanes:
            enabled = ", ".join(self._lanes)
            return Unsupported(f"grammar_backend {spec.backend!r} is not enabled on this server; enabled: {enabled}")
        if sum(not job.finished for job in self._entries.values()) >= self.limits.max_pending:
            return Overloaded(f"{self.limits.max_pending} grammars are waiting to be compiled")
        return None

    def _run(self, lane: _Lane, job: _Job) -> bool:
        """Compile one job on a lane's thread; False where the job was answered meanwhile, by its timer."""
        with self._lock:
            if job.finished:
                return True
            if job.num_waiting <= 0:
                self._forget(job)
                job.finished, job.error = True, EngineFailure("cancelled")
                return True
        try:
            backend = lane.backend()  # loading a library is not the grammar's fault: outside the limit
        except EngineError as error:
            return self._finish(job, error=error)
        timer = threading.Timer(self.limits.compile_timeout_s, self._expire, args=(lane, job))
        timer.daemon = True
        if backend.uninterruptible:
            timer.start()
        start_s = time.monotonic()
        try:
            compiled = backend.compile(job.spec)
        except EngineError as error:
            return self._finish(job, error=error)
        except Exception as error:  # a library's own bug: one request's refusal, with a name to search for
            text = f"{lane.name} failed on this grammar: {type(error).__name__}: {error}"
            return self._finish(job, error=GrammarError(text[:500]))
        else:
            return self._finish(job, compiled=compiled, compile_s=time.monotonic() - start_s)
        finally:
            timer.cancel()

    def _expire(self, lane: _Lane, job: _Job) -> None:
        """The limit has passed: answer now, and give the lane another thread in place of the late one."""
        if self._finish(job, error=GrammarError(too_slow(self.limits))):
            with self._lock:
                self.num_abandoned += 1
            lane.replace_thread()

    def _finish(
        self,
        job: _Job,
        *,
        compiled: CompiledGrammar | None = None,
        error: EngineError | None = None,
        compile_s: float | None = None,
    ) -> bool:
        """Settle a job once; False where it was settled before (a late result is dropped)."""
        with self._lock:
            if job.finished:
                return False
            job.compiled, job.error, job.compile_s = compiled, error, compile_s
            job.finished = True
            job.size_bytes = 256 + len(job.spec.value) + (compiled.size_bytes if compiled is not None else 0)
            if isinstance(error, GrammarError | Unsupported):
                job.expires_s = self._clock() + self.limits.failure_ttl_s
            elif error is not None:
                self._entries.pop(job.key, None)  # not the grammar's fault: the next request tries again
            if job.key in self._entries:
                self._cached_bytes += job.size_bytes
                self._evict()
        self._on_ready()
        return True

    def _forget(self, job: _Job) -> None:
        if self._entries.pop(job.key, None) is not None and job.finished:
            self._cached_bytes -= job.size_bytes

    def _evict(self) -> None:
        """Drop finished entries, least recently used first, until both bounds hold. Requests keep what they hold."""
        num_finished = sum(job.finished for job in self._entries.values())
        for job in list(self._entries.values()):
            if num_finished <= self.limits.cache_entries and self._cached_bytes <= self.limits.cache_bytes:
                return
            if job.finished:
                self._forget(job)
                num_finished -= 1


class _Lane:
    """The queue and threads of one backend. Threads start with the first job."""

    def __init__(
        self,
        name: str,
        load: Callable[[], GrammarBackend],
        run: Callable[[_Lane, _Job], bool],
        num_threads: int,
    ) -> None:
        self.name = name
        self._load = load
        self._run = run
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._num_idle = 0
        self._num_threads = 0
        self._max_threads = num_threads
        self._closed = False
        self._loading = threading.Lock()
        self._backend: GrammarBackend | None = None
        self._load_error: EngineError | None = None

    def put(self, job: _Job) -> None:
        with self._wake:
            self._jobs.append(job)
            if self._num_idle < len(self._jobs) and self._num_threads < self._max_threads:
                self._start_thread()
            self._wake.notify()

    def backend(self) -> GrammarBackend:
        """The backend, loaded by whoever needs it first; a failure to load stays."""
        with self._loading:
            if self._load_error is not None:
                raise self._load_error
            if self._backend is None:
                try:
                    self._backend = self._load()
                except EngineError as error:
                    self._load_error = error
                    raise
                except Exception as error:
                    self._load_error = Unsupported(f"grammar_backend {self.name} cannot be loaded: {error}"[:500])
                    raise self._load_error from error
            return self._backend

    def replace_thread(self) -> None:
        """Start one more thread, because one is stuck in a compilation; that one ends when it comes back."""
        with self._wake:
            self._max_threads += 1
            self._start_thread()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._jobs.clear()
            self._wake.notify_all()
        if self._backend is not None:
            self._backend.close()

    def _start_thread(self) -> None:
        self._num_threads += 1
        threading.Thread(target=self._serve, name=f"grammar-{self.name}", daemon=True).start()

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._num_idle += 1
                while not self._jobs and not self._closed:
                    self._wake.wait()
                self._num_idle -= 1
                if self._closed:
                    return
                job = self._jobs.popleft()
            in_time = self._run(self, job)
            if not in_time:  # this thread was replaced
                with self._wake:
                    self._num_threads -= 1
                    self._max_threads -= 1
                return


def too_slow(limits: GrammarLimits) -> str:
    return f"the grammar took longer than {limits.compile_timeout_s:g} s to compile"


def load_backend(name: str, vocabulary: Vocabulary, limits: GrammarLimits, *, mask_threads: int = 1) -> GrammarBackend:
    """The backend of that name. Raises Unsupported, naming the package, where its library is not installed."""
    if name == "llguidance":
        from textgen_engine.grammar.llguidance_backend import LlguidanceBackend

        return LlguidanceBackend(vocabulary, limits, num_threads=mask_threads)
    if name == "xgrammar":
        from textgen_engine.grammar.xgrammar_backend import XgrammarBackend

        return XgrammarBackend(vocabulary, limits)
    if name == "lmfe":
        from textgen_engine.grammar.lmfe_backend import LmfeBackend

        return LmfeBackend(vocabulary, limits)
    raise Unsupported(f"grammar_backend {name!r} does not exist; there are llguidance, xgrammar and lmfe")


def _key(spec: GrammarSpec) -> bytes:
    """Digest of a spec: the cache then holds long texts once, not twice."""
    head = f"{spec.backend}\0{spec.kind}\0{spec.whitespace}\0{spec.lenient}\0"
    return hashlib.sha256(head.encode() + spec.value.encode()).digest()
