"""Constrained generation: from a request's grammar to one row of allowed tokens per step.

    parse.py        request JSON -> GrammarSpec (front process; no grammar library)
    compiler.py     GrammarSpec -> CompiledGrammar, beside the engine loop, cached, within a time limit
    rewrite.py      JSON Schema -> a schema that one backend enforces in full (schema_*.py have the algebra)
    masks.py        matchers of one batch -> packed rows of bits
    check.py        a text walked through a grammar without a model
    *_backend.py    one grammar library each, imported when its first grammar comes; *_worker.py is its other side,
                    in a process of sandbox.py that can be killed

base.py has the interface. The package imports without any of the libraries.
"""

from textgen_engine.grammar.base import (
    CompiledGrammar,
    GrammarBackend,
    GrammarLimits,
    GrammarMatcher,
    GrammarSpec,
    grammar_limits,
)
from textgen_engine.grammar.compiler import GrammarCompiler, GrammarHandle
from textgen_engine.grammar.masks import GrammarMask, MaskFiller
from textgen_engine.grammar.parse import parse_grammar
from textgen_engine.grammar.vocabulary import Vocabulary

__all__ = [
    "CompiledGrammar",
    "GrammarBackend",
    "GrammarCompiler",
    "GrammarHandle",
    "GrammarLimits",
    "GrammarMask",
    "GrammarMatcher",
    "GrammarSpec",
    "MaskFiller",
    "Vocabulary",
    "grammar_limits",
    "parse_grammar",
]
