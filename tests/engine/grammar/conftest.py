"""A small tokenizer with everything that is awkward about big ones, and each installed grammar backend on top of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from textgen_engine.grammar import CompiledGrammar, GrammarLimits, GrammarMatcher, Vocabulary, parse_grammar
from textgen_engine.grammar.base import GrammarBackend
from textgen_engine.grammar.compiler import load_backend

LIBRARIES = {"llguidance": "llguidance", "xgrammar": "xgrammar", "lmfe": "lmformatenforcer"}
CORPUS = [
    '{"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "poetry"], "alive": false, "note": null}',
    '{\n  "kind": "circle",\n  "radius": 1.5,\n  "items": [1, 2, 3]\n}',
    "the quick brown fox jumps over the lazy dog 0123456789 192.168.0.1 été 日本語 😀",
] * 4
SPECIAL_TOKENS = ["<|end|>", "<|start|>", "<|stop|>", "<|file|>"]
END, START, STOP, FILE = range(4)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, 4 special tokens first; its size is no multiple of 32."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=389,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|start|>")
    assert len(fast) == 389
    return fast


@pytest.fixture(scope="session")
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Logits wider than the tokenizer, two end-of-sequence ids."""
    return Vocabulary.from_tokenizer(tokenizer, vocab_size=450, eos_token_ids=[END, STOP])


@pytest.fixture(scope="session")
def limits() -> GrammarLimits:
    return GrammarLimits(compile_timeout_s=20.0)


@pytest.fixture(scope="session", params=sorted(LIBRARIES))
def backend(request: pytest.FixtureRequest, vocabulary: Vocabulary, limits: GrammarLimits) -> Iterator[GrammarBackend]:
    if importlib.util.find_spec(LIBRARIES[request.param]) is None:
        pytest.skip(f"{LIBRARIES[request.param]} is not installed")
    loaded = load_backend(request.param, vocabulary, limits)
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def llguidance_backend(vocabulary: Vocabulary, limits: GrammarLimits) -> Iterator[GrammarBackend]:
    pytest.importorskip("llguidance")
    loaded = load_backend("llguidance", vocabulary, limits, mask_threads=2)
    yield loaded
    loaded.close()


class Walker:
    """Compiles request forms and walks texts through masks, as the engine does."""

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary, limits: GrammarLimits, backend: GrammarBackend) -> None:
        self.tokenizer, self.vocabulary, self.limits, self.backend = tokenizer, vocabulary, limits, backend

    def compile(self, grammar: object, **options: Any) -> CompiledGrammar:
        spec = parse_grammar(grammar, limits=self.limits, backend=self.backend.name, **options)
        assert spec is not None
        return self.backend.compile(spec)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def row(self, matcher: GrammarMatcher) -> np.ndarray:
        row = np.full(self.vocabulary.num_words, 0x55555555, dtype=np.int32)  # what a neighbour left behind
        matcher.fill(row)
        return row

    def accepts(self, compiled: CompiledGrammar, text: str) -> bool:
        matcher = compiled.matcher()
        try:
            for token_id in self.ids(text):
                allowed = is_allowed(self.row(matcher), token_id)
                assert matcher.advance([token_id]) == int(allowed), "mask and advance disagree"
                if not allowed:
                    return False
            row = self.row(matcher)
            assert is_allowed(row, END) == is_allowed(row, STOP) == matcher.can_stop()
            return matcher.can_stop()
        finally:
            matcher.close()


def is_allowed(row: np.ndarray, token_id: int) -> bool:
    return bool((int(row[token_id >> 5]) >> (token_id & 31)) & 1)


@pytest.fixture
def walker(
    tokenizer: PreTrainedTokenizerFast, vocabulary: Vocabulary, limits: GrammarLimits, backend: GrammarBackend
) -> Walker:
    return Walker(tokenizer, vocabulary, limits, backend)


@pytest.fixture(scope="session")
def llguidance_walker(
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: Vocabulary,
    limits: GrammarLimits,
    llguidance_backend: GrammarBackend,
) -> Walker:
    return Walker(tokenizer, vocabulary, limits, llguidance_backend)
