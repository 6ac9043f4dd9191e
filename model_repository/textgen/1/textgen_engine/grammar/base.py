"""The nouns of constrained generation: what is asked, what compiles it, what walks it, and the limits on all three.

A `GrammarSpec` is plain text and options, checked by parse.py, and crosses the process boundary. A `GrammarBackend`
wraps one grammar library and turns a spec into a `CompiledGrammar`, a template shared by requests. Each choice of a
request owns one `GrammarMatcher`, its position in the grammar. Backends of several kinds may serve one batch: they all
write the same row of bits.

Mask row: int32 [num_words], num_words = ceil(width / 32), width = max(model's logits, tokenizer's ids). Token id i is
bit `i & 31` of word `i >> 5`; 1 is allowed. Rows are host memory.

What every row of every backend obeys (masks.py enforces it, whatever the library says): special and control tokens
and ids the tokenizer does not know are 0; the end-of-sequence ids are 1 exactly when the text may end here.

Nothing in this file knows a library, a tensor or a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from textgen_engine.config import GrammarConfig
from textgen_engine.errors import GrammarError

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark", "ebnf", "tools"]
Whitespace = Literal["flexible", "bounded", "none"]
PropertyOrder = Literal["any", "schema"]
MaskRow = npt.NDArray[np.int32]

GRAMMAR_KINDS: tuple[str, ...] = get_args(GrammarKind)
WHITESPACE_MODES: tuple[str, ...] = get_args(Whitespace)
PROPERTY_ORDERS: tuple[str, ...] = get_args(PropertyOrder)
BACKEND_NAMES = ("llguidance", "xgrammar", "lmfe")

# An error text travels inside a stream and into logs: long enough for a regex and a caret, never a dump.
MAX_ERROR_CHARS = 1000


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """One grammar as a request asks for it; hashable, so it is its own cache key.

    value, by kind:
      json_schema, json_object  the schema, compact JSON, property order kept
      regex                     the pattern; the whole text must match
      choice                    JSON array of strings
      lark, ebnf                the grammar's text (ebnf is GBNF, root rule `root`)
      tools                     JSON object {"mode": "required" | "auto", "tools": [{"name", "parameters"}]}
    whitespace: between the tokens of JSON. `bounded`: one space, or a newline with at most 32 blanks behind it;
      `flexible`: any run (a model may fill its whole budget with it); `none`: compact.
    property_order: of JSON objects. `any`: whichever the backend can make (llguidance and lmfe: any order; xgrammar:
      the schema's); `schema`: the order of the schema, and no other.
    lenient: keywords the backend cannot enforce are dropped with a warning instead of refused.
    """

    kind: GrammarKind
    value: str
    backend: str
    whitespace: Whitespace = "bounded"
    lenient: bool = False
    property_order: PropertyOrder = "any"


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Bounds on one grammar and on everything kept for grammars. Sizes are bytes of UTF-8, times seconds.

    max_nesting: depth of JSON containers, of brackets in a regex or grammar. max_nodes: JSON values in one schema.
    compile_timeout_s: from the start of a compilation to its first mask. step_timeout_s: one mask of a backend that
    runs outside the engine process. failure_ttl_s: how long a refusal is remembered.
    max_rewritten_nodes: a rewriting that would make a schema larger than this is not applied.
    max_worker_matchers: matchers alive at once that hold a process each (lmfe).
    worker_memory_bytes: private memory one such process may add.
    """

    max_schema_bytes: int = 256 * 1024
    max_regex_bytes: int = 64 * 1024
    max_grammar_bytes: int = 64 * 1024
    max_choices: int = 4096
    max_tools: int = 256
    max_nesting: int = 64
    max_nodes: int = 50_000
    max_rewritten_nodes: int = 50_000
    compile_timeout_s: float = 5.0
    step_timeout_s: float = 2.0
    failure_ttl_s: float = 60.0
    cache_entries: int = 256
    cache_bytes: int = 256 * 1024 * 1024
    compile_threads: int = 2
    max_pending: int = 1024
    max_worker_matchers: int = 8
    worker_memory_bytes: int = 2 * 1024**3


def grammar_limits(config: GrammarConfig) -> GrammarLimits:
    """The limits that the server's options set; the others keep their defaults."""
    return GrammarLimits(
        max_schema_bytes=config.max_bytes,
        max_regex_bytes=config.max_regex_bytes,
        max_grammar_bytes=config.max_regex_bytes,
        step_timeout_s=config.step_timeout_s,
        max_worker_matchers=config.max_lmfe_requests,
        max_nesting=config.max_nesting,
        compile_timeout_s=config.compile_timeout_s,
        cache_bytes=config.cache_bytes,
    )


class GrammarMatcher(Protocol):
    """One text's position in a grammar. Used by one thread at a time; not shared between choices."""

    def ready(self) -> bool:
        """False while the next mask is still being made in another process; `fill` would wait for it."""
        ...

    def fill(self, row: MaskRow) -> None:
        """Write the tokens that may come next. Never raises for the grammar's sake: see `error`."""
        ...

    def advance(self, token_ids: Sequence[int]) -> int:
        """Take tokens in order; return how many the grammar took. The first refused one changes nothing.

        An end-of-sequence id is taken when the text may end here, and nothing is taken after it.
        """
        ...

    def rollback(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` taken tokens."""
        ...

    def forced(self) -> list[int]:
        """Tokens that must come next, in the tokenizer's own (canonical) split; empty where there is a choice."""
        ...

    def is_complete(self) -> bool:
        """The grammar is satisfied and nothing more may follow (or the text was ended by an end-of-sequence id)."""
        ...

    def can_stop(self) -> bool:
        """The text so far satisfies the grammar: it may end here."""
        ...

    def error(self) -> str | None:
        """Why no further mask can be made (a limit was passed, a worker died); None while all is well.

        Once set it stays, `fill` allows the end-of-sequence ids only, and the caller fails that one request.
        """
        ...

    def close(self) -> None:
        """Give back what the matcher holds outside this process. Idempotent."""
        ...


class CompiledGrammar(Protocol):
    """A grammar ready to be walked any number of times, by several requests at once."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is not enforced, or was changed, in words for the client."""
        ...

    @property
    def size_bytes(self) -> int:
        """Memory the entry costs while it is cached; an estimate where the library does not say."""
        ...

    def matcher(self) -> GrammarMatcher:
        """A new position at the start. Raises Overloaded when the backend's matchers are all in use."""
        ...


class GrammarBackend(Protocol):
    """One grammar library, bound to one tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def uninterruptible(self) -> bool:
        """`compile` runs in this process and cannot be stopped; the compiler then abandons a late thread."""
        ...

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Compile and probe the first mask. Raises GrammarError or Unsupported. Called from several threads."""
        ...

    def close(self) -> None:
        """End worker processes. Idempotent."""
        ...


def grammar_error(message: str) -> GrammarError:
    """A GrammarError with a library's message cut to size and freed of its parser-state dump."""
    text = message.split("<state>")[0].strip()
    if len(text) > MAX_ERROR_CHARS:
        text = text[: MAX_ERROR_CHARS - 4].rstrip() + " ..."
    return GrammarError(text or "the grammar cannot be compiled")
