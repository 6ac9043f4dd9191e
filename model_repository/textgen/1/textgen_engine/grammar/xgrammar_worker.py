"""The compiling side of xgrammar, in a worker process that can be killed: seconds for a large schema are usual.

A `GrammarSpec` in, the library's own serialisation of the compiled grammar out. Before it is handed over, the grammar
is tried on a random walk: a mask that takes too long there would hold up the engine's loop later.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from textgen_engine.errors import GrammarError, RequestError, Unsupported
from textgen_engine.grammar.base import GrammarLimits, GrammarSpec, grammar_error
from textgen_engine.grammar.capabilities import XGRAMMAR
from textgen_engine.grammar.regex import to_rust_regex
from textgen_engine.grammar.rewrite import prepare_leniently
from textgen_engine.grammar.vocabulary import Vocabulary, unpack_bits

_PROBE_STEPS = 64
_MAX_MASK_S = 0.25


@dataclass(frozen=True)
class XgrammarResult:
    """serialised: for CompiledGrammar.deserialize_json. size_bytes: of the compiled grammar, as the library says."""

    serialised: str
    size_bytes: int
    is_json: bool
    warnings: Sequence[str]


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


def prepare(payload: tuple[Vocabulary, GrammarLimits]) -> Callable[[], XgrammarSession]:
    """Load the library and its tokenizer tables once."""
    vocabulary, limits = payload
    info = tokenizer_info(vocabulary)
    return lambda: XgrammarSession(vocabulary, limits, info)


class XgrammarSession:
    """One compilation."""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits, info: Any) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        self._info = info

    def compile(self, spec: GrammarSpec) -> XgrammarResult:
        """Raises GrammarError or Unsupported."""
        import xgrammar

        compiler = xgrammar.GrammarCompiler(self._info, max_threads=1, cache_enabled=False)
        warnings: Sequence[str] = ()
        is_json = spec.kind in ("json_schema", "json_object", "tools")
        try:
            if is_json:
                prepared = prepare_leniently(spec, XGRAMMAR, self._limits)
                if prepared.or_plain_text:
                    raise Unsupported("grammar_backend xgrammar has no tool_choice auto; llguidance has")
                warnings = prepared.warnings
                compiled = compiler.compile_json_schema(
                    json.dumps(prepared.schema, ensure_ascii=False),
                    any_whitespace=spec.whitespace != "none",
                    separators=(",", ":") if spec.whitespace == "none" else None,
                    max_whitespace_cnt=33 if spec.whitespace == "bounded" else None,
                    strict_mode=False,
                )
            elif spec.kind == "regex":
                to_rust_regex(spec.value)
                compiled = compiler.compile_regex(spec.value)
            elif spec.kind == "choice":
                alternatives = " | ".join(_ebnf_string(text) for text in json.loads(spec.value))
                compiled = compiler.compile_grammar("root ::= " + alternatives)
            else:
                # A root rule that refers to itself makes the library's masks and its matcher disagree.
                compiled = compiler.compile_grammar(_wrap_root(spec.value))
            self._probe(compiled)
            return XgrammarResult(compiled.serialize_json(), int(compiled.memory_size_bytes), is_json, warnings)
        except RequestError:
            raise
        except Exception as error:
            raise grammar_error(f"xgrammar: {_last_line(str(error))}") from None

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


def _ebnf_string(text: str) -> str:
    """`text` as a GBNF string literal."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return (
        '"' + "".join(escapes.get(char, char if char.isprintable() else f"\\U{ord(char):08x}") for char in text) + '"'
    )


def _wrap_root(text: str) -> str:
    if not re.search(r"(?m)^\s*root\s*::=", text):
        raise GrammarError("ebnf grammar: no rule `root`")
    inner = "root_inner"
    while re.search(rf"\b{inner}\b", text):
        inner += "_"
    # `root` as a whole word, outside of strings, character classes and comments.
    pieces = re.split(r'("(?:[^"\\\n]|\\.)*"|\[(?:[^\]\\\n]|\\.)*\]|#[^\n]*)', text)
    renamed = "".join(
        piece if index % 2 else re.sub(r"(?<![\w-])root(?![\w-])", inner, piece) for index, piece in enumerate(pieces)
    )
    return f"root ::= {inner}\n{renamed}"
