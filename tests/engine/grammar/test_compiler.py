"""Compiling beside the loop: single flight, cache bounds, refusals remembered, the time limit, nobody else waits."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import pytest

from textgen_engine.errors import EngineFailure, GrammarError, Overloaded, Unsupported
from textgen_engine.grammar import GrammarCompiler, GrammarLimits, GrammarSpec
from textgen_engine.grammar.compiler import GrammarHandle


class FakeGrammar:
    def __init__(self, size_bytes: int) -> None:
        self.warnings: list[str] = []
        self.size_bytes = size_bytes

    def matcher(self) -> None:
        raise NotImplementedError


class FakeBackend:
    """Compiles when told to; counts."""

    name = "llguidance"
    uninterruptible = True

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.go = threading.Event()
        self.go.set()
        self.slow: set[str] = set()
        self.closed = False

    def compile(self, spec: GrammarSpec) -> FakeGrammar:
        self.compiled.append(spec.value)
        if spec.value in self.slow:
            assert self.go.wait(20.0)
        if spec.value.startswith("bad"):
            raise GrammarError(f"regex: {spec.value}")
        if spec.value.startswith("bug"):
            raise KeyError("inside the library")
        return FakeGrammar(1000)

    def close(self) -> None:
        self.closed = True


def spec(value: str, backend: str = "llguidance") -> GrammarSpec:
    return GrammarSpec("regex", value, backend)


def wait(handle: GrammarHandle, seconds: float = 20.0) -> GrammarHandle:
    end = time.monotonic() + seconds
    while not handle.done():
        assert time.monotonic() < end, "the compilation does not end"
        time.sleep(0.002)
    return handle


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def make(vocabulary, backend: FakeBackend):
    """A compiler over the fake backend, closed at the end."""
    compilers = []

    def build(
        limits: GrammarLimits | None = None, on_ready: Callable[[], None] | None = None, **options
    ) -> GrammarCompiler:
        compiler = GrammarCompiler(
            vocabulary,
            vocab_size=vocabulary.vocab_size,
            eos_token_ids=vocabulary.eos_token_ids,
            limits=limits,
            on_ready=on_ready,
            loader=lambda name, vocabulary, limits: backend,
            **options,
        )
        compilers.append(compiler)
        return compiler

    yield build
    backend.go.set()
    for compiler in compilers:
        compiler.close()


def test_single_flight_and_cache(make, backend: FakeBackend) -> None:
    ready = threading.Semaphore(0)
    compiler = make(on_ready=ready.release)
    backend.slow.add("a")
    backend.go.clear()
    first, second = compiler.submit(spec("a")), compiler.submit(spec("a"))
    assert not first.done()
    backend.go.set()
    assert wait(first).result() is wait(second).result()
    third = compiler.submit(spec("a"))
    assert third.done(), "a cached grammar is there at once"
    assert third.compile_s is None
    assert first.compile_s is not None
    assert backend.compiled == ["a"]
    assert ready.acquire(timeout=5.0)


def test_options_are_part_of_the_key(make, backend: FakeBackend) -> None:
    compiler = make()
    for one in (spec("a"), GrammarSpec("lark", "a", "llguidance"), GrammarSpec("regex", "a", "llguidance", "none")):
        wait(compiler.submit(one))
    assert len(backend.compiled) == 3


def test_a_slow_grammar_holds_up_nobody(make, backend: FakeBackend) -> None:
    compiler = make()
    backend.slow.add("slow")
    backend.go.clear()
    slow = compiler.submit(spec("slow"))
    wait(compiler.submit(spec("fast"))).result()
    assert not slow.done()


def test_time_limit_answers_and_frees_the_lane(make, backend: FakeBackend) -> None:
    """A compilation that never ends is refused at the limit, and as many others as there are threads can be stuck."""
    compiler = make(GrammarLimits(compile_timeout_s=0.1, compile_threads=1))
    backend.slow |= {"s1", "s2"}
    backend.go.clear()
    for value in ("s1", "s2"):
        with pytest.raises(GrammarError, match=r"longer than 0\.1 s"):
            wait(compiler.submit(spec(value))).result()
    wait(compiler.submit(spec("fast"))).result()
    assert compiler.statistics()["abandoned_threads"] == 2
    backend.go.set()
    wait(compiler.submit(spec("later"))).result()


def test_refusals_are_remembered_for_a_while(make, backend: FakeBackend) -> None:
    now = [100.0]
    compiler = make(GrammarLimits(failure_ttl_s=60.0), clock=lambda: now[0])
    for _ in range(2):
        with pytest.raises(GrammarError, match="bad"):
            wait(compiler.submit(spec("bad"))).result()
    assert backend.compiled == ["bad"]
    now[0] = 161.0
    with pytest.raises(GrammarError, match="bad"):
        wait(compiler.submit(spec("bad"))).result()
    assert backend.compiled == ["bad", "bad"]


def test_a_fault_in_the_library_is_one_clean_refusal(make) -> None:
    with pytest.raises(GrammarError, match="llguidance failed on this grammar: KeyError") as caught:
        wait(make().submit(spec("bug"))).result()
    assert "Traceback" not in str(caught.value)


def test_cache_is_bounded_in_entries(make, backend: FakeBackend) -> None:
    compiler = make(GrammarLimits(cache_entries=3))
    for value in "abcd":
        wait(compiler.submit(spec(value)))
    wait(compiler.submit(spec("b")))  # used again: now the youngest
    wait(compiler.submit(spec("e")))
    assert compiler.statistics()["cached_entries"] == 3
    wait(compiler.submit(spec("b")))
    wait(compiler.submit(spec("c")))
    assert backend.compiled == ["a", "b", "c", "d", "e", "c"]


def test_cache_is_bounded_in_bytes(make) -> None:
    compiler = make(GrammarLimits(cache_bytes=3000))
    for value in "abcdef":
        wait(compiler.submit(spec(value)))
    assert compiler.statistics()["cached_entries"] == 2
    assert 0 < compiler.statistics()["cached_bytes"] <= 3000


def test_cancelled_before_it_began_is_not_compiled(make, backend: FakeBackend) -> None:
    compiler = make(GrammarLimits(compile_threads=1))
    backend.slow.add("s")
    backend.go.clear()
    first = compiler.submit(spec("s"))
    dropped, kept = compiler.submit(spec("dropped")), compiler.submit(spec("kept"))
    shared = [compiler.submit(spec("shared")) for _ in range(2)]
    dropped.cancel()
    shared[0].cancel()
    backend.go.set()
    wait(first)
    wait(kept)
    wait(shared[1]).result()
    assert backend.compiled == ["s", "kept", "shared"]


def test_waiting_list_is_bounded(make, backend: FakeBackend) -> None:
    compiler = make(GrammarLimits(max_pending=2, compile_threads=1))
    backend.slow.add("s")
    backend.go.clear()
    compiler.submit(spec("s"))
    compiler.submit(spec("x"))
    with pytest.raises(Overloaded):
        compiler.submit(spec("y")).result()
    backend.go.set()


def test_backend_that_is_not_enabled(make) -> None:
    with pytest.raises(Unsupported, match=r"xgrammar.*not enabled.*llguidance"):
        make().submit(spec("a", "xgrammar")).result()


def test_missing_library_names_the_package(vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GrammarCompiler(vocabulary, vocab_size=vocabulary.vocab_size, eos_token_ids=vocabulary.eos_token_ids)
    with pytest.raises(Unsupported, match="package `llguidance` is not installed"):
        wait(compiler.submit(spec("a"))).result()
    compiler.close()


def test_close_answers_those_who_wait(make, backend: FakeBackend) -> None:
    compiler = make()
    backend.slow.add("s")
    backend.go.clear()
    handle = compiler.submit(spec("s"))
    while not backend.compiled:
        time.sleep(0.002)
    compiler.close()
    with pytest.raises(EngineFailure, match="stopping"):
        handle.result()
    assert backend.closed


def test_real_backend_through_the_service(vocabulary, tokenizer) -> None:
    pytest.importorskip("llguidance")
    compiler = GrammarCompiler(tokenizer, vocab_size=450, eos_token_ids=[0, 2])
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    good = compiler.submit(GrammarSpec("json_schema", json.dumps(schema), "llguidance"))
    bad = compiler.submit(GrammarSpec("json_schema", '{"type":"array","uniqueItems":true}', "llguidance"))
    matcher = wait(good).result().matcher()
    mask = compiler.masks.fill([(0, matcher)])
    assert mask.bits.shape == (1, vocabulary.num_words)
    with pytest.raises(GrammarError, match="uniqueItems"):
        wait(bad).result()
    compiler.close()
