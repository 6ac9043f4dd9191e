"""The compiling side of xgrammar, in a worker process that can be killed: seconds for a large schema are usual.

`XgrammarJob` in, the library's own serialisation of the compiled grammar out. Before it is handed over, the grammar is
tried on a random walk: a mask that takes too long there would hold up the engine's loop later.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from textgen_engine.errors import GrammarError
from textgen_engine.grammar.base import grammar_error
from textgen_engine.grammar.vocabulary import Vocabulary, unpack_bits

_PROBE_STEPS = 64
_MAX_MASK_S = 0.25


@dataclass(frozen=True)
class XgrammarJob:
    """kind: json (a schema as text), regex, ebnf. max_whitespace: None for any run, 0 for none at all."""

    kind: str
    value: str
    max_whitespace: int | None


def tokenizer_info(vocabulary: Vocabulary) -> Any:
    """xgrammar's view of a vocabulary: raw bytes per id, so that it need not guess the tokenizer's kind."""
    import xgrammar

    pieces = [piece or b"" for piece in vocabulary.token_bytes]
    # An empty token would be allowed everywhere; the library treats it as special. So it does special tokens then.
    for token_id in vocabulary.special_token_ids:
        if token_id < len(pieces):
            pieces[token_id] = b""
    return xgrammar.TokenizerInfo(
        pieces,
        xgrammar.VocabType.RAW,
        vocab_size=vocabulary.width,
        stop_token_ids=list(vocabulary.eos_token_ids),
    )


def prepare(vocabulary: Vocabulary) -> Callable[[], XgrammarSession]:
    """Load the library and its tokenizer tables once."""
    info = tokenizer_info(vocabulary)
    return lambda: XgrammarSession(vocabulary, info)


class XgrammarSession:
    """One compilation."""

    def __init__(self, vocabulary: Vocabulary, info: Any) -> None:
        self._vocabulary = vocabulary
        self._info = info

    def compile(self, job: XgrammarJob) -> tuple[str, int]:
        """(serialised grammar, its size in bytes). Raises GrammarError."""
        import xgrammar

        compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        try:
            if job.kind == "json":
                compiled = compiler.compile_json_schema(
                    job.value,
                    any_whitespace=job.max_whitespace != 0,
                    separators=(",", ":") if job.max_whitespace == 0 else None,
                    max_whitespace_cnt=job.max_whitespace or None,
                    strict_mode=False,
                )
            elif job.kind == "regex":
                compiled = compiler.compile_regex(job.value)
            else:
                compiled = compiler.compile_grammar(job.value)
            self._probe(compiled)
        except GrammarError:
            raise
        except Exception as error:
            raise grammar_error(f"xgrammar: {_last_line(str(error))}") from None
        return compiled.serialize_json(), int(compiled.memory_size_bytes)

    def _probe(self, compiled: Any) -> None:
        """Walk at random: the first mask must allow something, and no mask may take long."""
        import xgrammar

        matcher = xgrammar.GrammarMatcher(compiled)
        mask = xgrammar.allocate_token_bitmask(1, self._vocabulary.width)
        choose = random.Random(0).choice
        for step in range(_PROBE_STEPS):
            start = time.perf_counter()
            matcher.fill_next_token_bitmask(mask)
            if time.perf_counter() - start > _MAX_MASK_S:
                raise GrammarError("xgrammar: one mask of this grammar takes too long")
            row = mask[0].numpy() & self._vocabulary.text_row
            allowed = unpack_bits(row).nonzero()[0].tolist()
            if not allowed:
                if step == 0 and not matcher.is_completed():
                    raise GrammarError("xgrammar: no text satisfies the grammar")
                return
            matcher.accept_token(choose(allowed))


def _last_line(text: str) -> str:
    """The library puts file and line of its source in front of what is wrong."""
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["not compilable"]
    return " ".join(lines)[-800:].split("] ", 1)[-1]
