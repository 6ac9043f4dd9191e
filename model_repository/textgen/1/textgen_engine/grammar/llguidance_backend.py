"""llguidance: the default backend. JSON Schema, regexes, Lark, GBNF, choices, tools; forced tokens; roll-back.

The only file that imports `llguidance`, inside functions. The library drops the interpreter lock while it compiles and
fills, bounds its own work by fuel counters (a mask takes milliseconds at worst), and never raises for a bad grammar:
its matchers carry an error text instead. A matcher that is fed a refused token through `consume_token` is dead for
good, so only `try_consume_tokens` is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from textgen_engine.errors import GrammarError, Unsupported
from textgen_engine.grammar.base import GrammarLimits, GrammarMatcher, GrammarSpec, MaskRow, grammar_error
from textgen_engine.grammar.capabilities import LLGUIDANCE
from textgen_engine.grammar.lark_schema import LibraryForm, counts_open_names, mentions_names
from textgen_engine.grammar.matcher import TextMatcher
from textgen_engine.grammar.regex import escape_regex, to_rust_regex
from textgen_engine.grammar.rewrite import PreparedSchema, WrittenGrammar, prepare_schema, write_grammar
from textgen_engine.grammar.sandbox import Sandbox, WorkerDied, WorkerLate
from textgen_engine.grammar.tools import PLAIN_TEXT_PATTERN
from textgen_engine.grammar.vocabulary import Vocabulary

# One blank, or a newline and an indent: all that compact, spaced and indented JSON need, and no run of newlines.
BOUNDED_WHITESPACE = r"( ?|\n[ \t]{0,32})"

# The library's own, for whitespace_flexible: two ways to say it would be two kinds of blanks.
FLEXIBLE_WHITESPACE = r"[\x20\x0A\x0D\x09]+"

# Tokens of so many ordinary characters, in sets that the library allows or leaves out as a whole. Its own sets (10 and
# 30 characters) leave thousands of tokens to be walked one by one in a string that may still have 10 to 30 characters:
# a mask took eight times as long there. What they allow is the same.
_ORDINARY = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [*(f"{_ORDINARY}{{1,{most}}}" for most in (3, 6, 10, 16)), f"{_ORDINARY}+"]

# One compiled grammar holds its text several times over (AST, symbols, lexer) beside lazily built lexer states.
_BYTES_PER_GRAMMAR_BYTE = 32
_BYTES_PER_GRAMMAR = 64 * 1024

# Python work on a longer schema could hold the engine's interpreter lock for longer than a decode step. Writing a
# grammar takes longer than cleaning, and is linear in the schema only where none of these keywords multiplies cases.
_PREPARED_HERE_CHARS = 8 * 1024
_WRITTEN_HERE_CHARS = 2 * 1024
_MULTIPLYING = re.compile(
    r'"(?:anyOf|allOf|oneOf|not|if|dependen\w+|contains|unevaluated\w+|propertyNames|uniqueItems|m\w+Properties|\$\w*[rR]ef)"'
)


class LlguidanceBackend:
    """Implements base.GrammarBackend."""

    name = "llguidance"
    uninterruptible = True

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits, *, num_threads: int = 1) -> None:
        """num_threads: for filling the rows of one batch. Raises Unsupported where the package is missing."""
        try:
            import llguidance
        except ImportError:
            raise Unsupported("grammar_backend llguidance: the package `llguidance` is not installed") from None
        self._library = llguidance
        self._vocabulary = vocabulary
        self._limits = limits
        self._tokenizer = llguidance.LLTokenizer(
            vocabulary.tokenizer_json,
            n_vocab=vocabulary.width,
            eos_token=list(vocabulary.eos_token_ids),
            slices=_SLICES,
        )
        self._parser_limits = llguidance.LLParserLimits(verbose_errors=False)
        self._executor = llguidance.LLExecutor(num_threads)
        self._rewriter = Sandbox(
            "textgen_engine.grammar.rewrite:prepare_sessions",
            limits,
            memory_bytes=limits.worker_memory_bytes,
            niceness=5,
        )
        self._rewriter.start()

    def compile(self, spec: GrammarSpec) -> LlguidanceGrammar:
        if spec.kind not in ("json_schema", "json_object", "tools"):
            return self._compiled(spec, self._plain_grammar(spec), ())
        prepared = self._prepare(spec, rebuild=False)
        own: LlguidanceGrammar | GrammarError
        try:
            own = self._compiled(spec, self._schema_grammar(spec, prepared), prepared.warnings)
        except GrammarError as refusal:
            own = refusal
        if spec.property_order == "any" and self._limits.max_rewritten_nodes and mentions_names(prepared.schema):
            try:
                written = self._write(spec)
                if written is not None:
                    return self._compiled(spec, self._written_grammar(written), written.warnings)
            except GrammarError as reason:
                if not isinstance(own, GrammarError):
                    why = reason.message.removeprefix("JSON schema: ").split("\n")[0]
                    own.warnings = [*own.warnings, f"properties are made in the order of the schema ({why:.200})"]
        if not isinstance(own, GrammarError):
            return own
        if not self._limits.max_rewritten_nodes:
            raise own
        try:
            rebuilt = self._prepare(spec, rebuild=True)
            return self._compiled(spec, self._schema_grammar(spec, rebuilt), rebuilt.warnings)
        except GrammarError as reason:
            if spec.lenient:
                return self._lenient(spec, prepared)
            # The rewriter knows keyword and place; the library's word is about the rewritten text then.
            raise (reason if "cannot be enforced" in reason.message else own) from None

    def _prepare(self, spec: GrammarSpec, *, rebuild: bool) -> PreparedSchema:
        """Short work here, long work in a worker process, within the time limit."""
        if not rebuild and len(spec.value) <= _PREPARED_HERE_CHARS:
            return prepare_schema(spec, LLGUIDANCE, self._limits, rebuild=False)
        prepared = self._in_worker("prepare", spec, LLGUIDANCE, rebuild)
        assert isinstance(prepared, PreparedSchema)
        return prepared

    def _write(self, spec: GrammarSpec) -> WrittenGrammar | None:
        """The schema as a grammar with members in any order."""
        if len(spec.value) <= _WRITTEN_HERE_CHARS and not _MULTIPLYING.search(spec.value):
            return write_grammar(spec, self._limits, _library_form(spec))
        written = self._in_worker("write", spec, _library_form(spec))
        assert isinstance(written, WrittenGrammar | None)
        return written

    def _in_worker(self, method: str, *arguments: Any) -> Any:
        """A call of rewrite.RewriteSession. Raises GrammarError, also where it takes too long."""
        worker = self._rewriter.open()
        try:
            return worker.call(method, *arguments, timeout_s=self._limits.compile_timeout_s)
        except WorkerLate:
            limit = self._limits.compile_timeout_s
            raise GrammarError(
                f"JSON schema: cannot be enforced by llguidance: rewriting took over {limit:g} s"
            ) from None
        except WorkerDied:
            raise GrammarError("JSON schema: cannot be enforced by llguidance: rewriting used up its memory") from None
        finally:
            worker.close()

    def _lenient(self, spec: GrammarSpec, prepared: PreparedSchema) -> LlguidanceGrammar:
        """With the library's own leave to drop what it does not know."""
        options = {"lenient": True, "coerce_one_of": True}
        warning = "grammar_lenient: keywords that llguidance cannot enforce are dropped"
        grammar = self._schema_grammar(spec, prepared, options)
        return self._compiled(spec, grammar, [*prepared.warnings, warning])

    def _compiled(self, spec: GrammarSpec, text: str, warnings: Sequence[str]) -> LlguidanceGrammar:
        template = self._library.LLMatcher(self._tokenizer, text, log_level=0, limits=self._parser_limits)
        if template.is_error():
            raise grammar_error(f"{_what(spec)}: {template.get_error()}")
        # Some faults (an empty language, a lexer over its fuel) show at the first mask only.
        probe = template.deep_copy()
        probe.compute_bitmask()
        if probe.is_error():
            reason = "no text satisfies it" if "NoExtension" in probe.get_error() else probe.get_error()
            raise grammar_error(f"{_what(spec)}: {reason}")
        every_warning = [*warnings, *template.get_grammar_warnings()]
        size_bytes = _BYTES_PER_GRAMMAR + _BYTES_PER_GRAMMAR_BYTE * len(text)
        return LlguidanceGrammar(self, template, every_warning, size_bytes)

    def close(self) -> None:
        self._rewriter.close()

    def new_matcher(self, template: Any) -> LlguidanceMatcher:
        return LlguidanceMatcher(self, self._vocabulary, template.deep_copy())

    def fill_rows(self, matchers: Sequence[GrammarMatcher], rows: MaskRow, row_ids: Sequence[int]) -> None:
        """Fill rows [num_rows, num_words] in parallel, without the interpreter lock."""
        work = []
        for matcher, row_id in zip(matchers, row_ids, strict=True):
            assert isinstance(matcher, LlguidanceMatcher)
            if matcher.live:
                work.append((matcher.native, row_id))
        assert rows.flags.c_contiguous
        if work:
            self._executor.unsafe_compute_mask_ptr(work, rows.ctypes.data, rows.shape[1] * 4, rows.shape[0])
        for matcher, row_id in zip(matchers, row_ids, strict=True):
            assert isinstance(matcher, LlguidanceMatcher)
            matcher.check()
            matcher.finish_row(rows[row_id])

    def _plain_grammar(self, spec: GrammarSpec) -> str:
        """The library's own form of a grammar that is no schema."""
        native = self._library.LLMatcher
        if spec.kind == "regex":
            return str(native.grammar_from_regex(to_rust_regex(spec.value)))
        if spec.kind == "choice":
            pattern = "|".join(escape_regex(text) for text in json.loads(spec.value))
            return str(native.grammar_from_regex(pattern))
        text = spec.value if spec.kind == "lark" else self._lark_of_ebnf(spec.value)
        return str(native.grammar_from_lark(text))

    def _schema_grammar(self, spec: GrammarSpec, prepared: PreparedSchema, extra: dict[str, Any] | None = None) -> str:
        """The library's own form of a schema: properties in the order of the schema."""
        options = {**_library_form(spec).options_of(prepared.schema), **(extra or {})}
        schema = {**prepared.schema, "x-guidance": options}
        if counts_open_names(prepared.schema) and not spec.lenient:
            raise GrammarError(
                "JSON schema: 'minProperties' cannot be enforced by llguidance in the order of the schema "
                "(a name made twice would count twice)"
            )
        native = self._library.LLMatcher
        if prepared.or_plain_text:
            return self._or_plain_text("%json " + json.dumps(schema, ensure_ascii=False))
        return str(native.grammar_from_json_schema(schema))

    def _written_grammar(self, written: WrittenGrammar) -> str:
        if written.or_plain_text:
            # The call is a grammar of its own: blanks are ignored in it, not in the text.
            return self._or_plain_text("@body", {"name": "body", "lark_grammar": written.lark})
        return str(self._library.LLMatcher.grammar_from_lark(written.lark))

    @staticmethod
    def _or_plain_text(call: str, *others: dict[str, str]) -> str:
        lark = f"start: call | TEXT |\ncall: {call}\nTEXT: /{PLAIN_TEXT_PATTERN}/\n"
        return json.dumps({"grammars": [{"lark_grammar": lark}, *others]}, ensure_ascii=False)

    @staticmethod
    def _lark_of_ebnf(text: str) -> str:
        from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

        try:
            return str(gbnf_to_lark(text))
        except GbnfToLarkError as error:
            raise grammar_error(f"ebnf grammar: {error}") from None
        except Exception as error:  # the converter has no error class for everything it meets
            raise grammar_error(f"ebnf grammar: {type(error).__name__}: {error}") from None


class LlguidanceGrammar:
    """Implements base.CompiledGrammar: a matcher at the start that is only ever copied."""

    def __init__(self, backend: LlguidanceBackend, template: Any, warnings: list[str], size_bytes: int) -> None:
        self._backend = backend
        self._template = template
        self.warnings: Sequence[str] = warnings
        self.size_bytes = size_bytes

    def matcher(self) -> LlguidanceMatcher:
        return self._backend.new_matcher(self._template)


class LlguidanceMatcher(TextMatcher):
    """Implements base.GrammarMatcher. `native` is the library's matcher, for filling many rows at once."""

    def __init__(self, backend: LlguidanceBackend, vocabulary: Vocabulary, native: Any) -> None:
        super().__init__(vocabulary)
        self.group = backend
        self.native = native

    @property
    def live(self) -> bool:
        return not self._ended and self._error is None

    def check(self) -> None:
        """Take over an error of the library's matcher."""
        if self._error is None and self.native.is_error():
            self.fail(grammar_error(self.native.get_error()).message)

    def _fill_text(self, row: MaskRow) -> None:
        self.native.unsafe_compute_mask_ptr(row.ctypes.data, row.size * 4)
        self.check()

    def _advance_text(self, token_ids: Sequence[int]) -> int:
        num_taken = int(self.native.try_consume_tokens(list(token_ids)))
        self.check()
        return num_taken

    def _rollback_text(self, num_tokens: int) -> None:
        self.native.rollback(num_tokens)
        self.check()

    def _may_end(self) -> bool:
        return bool(self.native.is_accepting())

    def _must_end(self) -> bool:
        return bool(self.native.is_stopped())

    def _forced_text(self) -> list[int]:
        forced = [int(token_id) for token_id in self.native.compute_ff_tokens()]
        self.check()
        return forced


def _library_form(spec: GrammarSpec) -> LibraryForm:
    options: dict[str, Any]
    if spec.whitespace == "bounded":
        blanks, options = BOUNDED_WHITESPACE, {"whitespace_pattern": BOUNDED_WHITESPACE}
    elif spec.whitespace == "flexible":
        blanks, options = FLEXIBLE_WHITESPACE, {"whitespace_flexible": True}
    else:
        blanks, options = None, {"whitespace_flexible": False}
    # Where names are told apart, the library compares them as they are written: none may be written with \\u.
    strict = {**options, "json_allowed_escapes": 'nrbtf\\"'}
    return LibraryForm(blanks, {**options, "json_allow_general_unicode_escapes": True}, strict)


def _what(spec: GrammarSpec) -> str:
    return {
        "json_schema": "JSON schema",
        "json_object": "JSON schema",
        "lark": "lark grammar",
        "ebnf": "ebnf grammar",
    }.get(spec.kind, spec.kind)
