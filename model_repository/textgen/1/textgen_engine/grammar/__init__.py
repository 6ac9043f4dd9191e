"""Constrained generation: from a request's grammar to one row of allowed tokens per step.

    parse.py        request JSON -> GrammarSpec (front process; no grammar library)
    compiler.py     GrammarSpec -> CompiledGrammar, beside the engine loop, cached, within a time limit
    masks.py        matchers of one batch -> packed rows of bits
    *_backend.py    one grammar library each, imported when its first grammar comes

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
from textgen_engine.grammar.validate import GrammarReport, validate_grammar
from textgen_engine.grammar.vocabulary import Vocabulary

__all__ = [
    "CompiledGrammar",
    "GrammarBackend",
    "GrammarCompiler",
    "GrammarHandle",
    "GrammarLimits",
    "GrammarMask",
    "GrammarMatcher",
    "GrammarReport",
    "GrammarSpec",
    "MaskFiller",
    "Vocabulary",
    "grammar_limits",
    "parse_grammar",
    "validate_grammar",
]
