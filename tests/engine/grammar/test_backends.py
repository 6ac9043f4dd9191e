"""Every backend accepts and refuses the same texts, and keeps the promises of base.py about its rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from textgen_engine.errors import GrammarError, RequestError, Unsupported
from textgen_engine.grammar import llguidance_backend
from textgen_engine.grammar.compiler import load_backend
from textgen_engine.grammar.masks import MaskFiller
from textgen_engine.grammar.vocabulary import Vocabulary, unpack_bits

END, STOP = 0, 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "sum", "parameters": PERSON}},
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"q": {"$ref": "#/$defs/query"}},
                "required": ["q"],
                "additionalProperties": False,
                "$defs": {"query": {"type": "string"}},
            },
        },
    },
]

# kind, value, accepted, refused
CORPUS: list[tuple[str, Any, list[str], list[str]]] = [
    (
        "json_schema",
        PERSON,
        [
            '{"name":"Ada","age":36}',
            '{"name": "Ada", "age": 36, "tags": ["a", "b"]}',
            '{\n  "name": "A",\n  "age": -1\n}',
        ],
        [
            '{"name":"Ada"}',
            '{"name":"","age":1}',
            '{"name":"Ada","age":1.5}',
            '{"name":"A","age":1,"x":2}',
            "[]",
            "x",
            '{"name":"A","age":1,}',
            '{"name":"A","age":1e-5}',
            '{"name":"A","age":01}',
            '{"name":"A\n","age":1}',
        ],
    ),
    (
        "json_schema",
        {"type": "array", "items": {"type": "object", "additionalProperties": {}}, "maxItems": 2},
        ['[{"a":1},{"b":["x",null,{"c":true}]}]', "[]"],
        ["[1]", "[{},{},{}]", "{}"],
    ),
    ("json_object", {"type": "object"}, ['{"a":[1,{"b":null}]}', '{"a": "é"}'], ["[1]", '"x"', "1", '{"a":}', "{a:1}"]),
    ("regex", r"[0-9]{1,3}(\.[0-9]{1,3}){3}", ["1.2.3.4", "192.168.0.1"], ["1.2.3", "a", "1.2.3.4.", "1234.1.1.1"]),
    ("regex", r"(a|ab|abc)d", ["ad", "abd", "abcd"], ["d", "abab", "abc"]),
    ("regex", r"^v\d+$", ["v1", "v12"], ["v", "1", "v1 "]),
    ("choice", ["a", "ab", "C++ (17)", '"q"\n'], ["a", "ab", "C++ (17)", '"q"\n'], ["b", "abc", "C++", ""]),
    (
        "ebnf",
        'root ::= expr\nexpr ::= term ("+" term)*\nterm ::= [0-9]+ | "(" expr ")"',
        ["1+2", "(1+(2))"],
        ["1+", "(1", "a"],
    ),
    ("lark", 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]+/', ["((1))", "12"], ["((1)", "()"]),
    (
        "tools",
        {"tools": TOOLS, "tool_choice": "required"},
        ['{"name":"find","arguments":{"q":"x"}}', '{"name": "sum", "arguments": {"name": "A", "age": 1}}'],
        ['{"name":"find","arguments":{"name":"A","age":1}}', '{"name":"other","arguments":{}}', "hello"],
    ),
    (
        "tools",
        {"tools": TOOLS, "tool_choice": "find"},
        ['{"name":"find","arguments":{"q":"x"}}'],
        ['{"name":"sum","arguments":{"name":"A","age":1}}'],
    ),
    (
        "tools",
        {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": True},
        [
            '{"name":"find","arguments":{"q":"x"}}',
            '[{"name":"find","arguments":{"q":"x"}}]',
            '[{"name":"find","arguments":{"q":"x"}}, {"name":"sum","arguments":{"name":"A","age":1}}]',
        ],
        ["[]", '["x"]', '[{"name":"find","arguments":{"q":"x"}}', "hello", '[{"name":"other","arguments":{}}]'],
    ),
    (
        "tools",
        {"tools": TOOLS, "tool_choice": "find", "parallel_tool_calls": True},
        ['{"name":"find","arguments":{"q":"x"}}'],
        ['[{"name":"find","arguments":{"q":"x"}}]'],
    ),
]
NO_GRAMMARS = {"lmfe": {"lark", "ebnf"}, "xgrammar": {"lark"}}


@pytest.mark.parametrize(
    ("kind", "value", "accepted", "refused"), CORPUS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_same_corpus(walker, kind: str, value: Any, accepted: list[str], refused: list[str]) -> None:
    form = {"type": kind, "value": value}
    if kind in NO_GRAMMARS.get(walker.backend.name, set()):
        with pytest.raises(Unsupported, match=walker.backend.name):
            walker.compile(form)
        return
    compiled = walker.compile(form)
    assert [text for text in accepted if not walker.accepts(compiled, text)] == []
    assert [text for text in refused if walker.accepts(compiled, text)] == []


def test_rows_hold_text_only(walker, vocabulary) -> None:
    """No special token, no unknown id, no padding of the logits; end ids exactly where the text may end."""
    compiled = walker.compile({"type": "json_object"})
    matcher = compiled.matcher()
    for token_id in walker.ids('{"a": "xyz", "b": [1, 2]}'):
        bits = unpack_bits(walker.row(matcher))
        assert not bits[389:].any()
        assert not bits[:4].any()
        assert matcher.advance([token_id]) == 1
    bits = unpack_bits(walker.row(matcher))
    assert np.flatnonzero(bits).tolist() == [END, STOP]
    assert matcher.is_complete()
    matcher.close()


def test_bit_31_and_the_last_token(walker, tokenizer) -> None:
    """A token in the sign bit of its word, and the tokenizer's last one, can be allowed and forbidden."""
    ids = [*list(range(31, 389, 32)), 388]
    texts = [tokenizer.decode([token_id]) for token_id in ids]
    picked = [(i, t) for i, t in zip(ids, texts, strict=True) if "\ufffd" not in t and walker.ids(t) == [i]]
    assert any(token_id & 31 == 31 for token_id, _ in picked)
    assert any(token_id == 388 for token_id, _ in picked)
    for token_id, text in picked:
        matcher = walker.compile({"type": "choice", "value": [text]}).matcher()
        bits = unpack_bits(walker.row(matcher))
        assert bits[token_id]
        assert not bits[[other for other, t in picked if other != token_id and not text.startswith(t)]].any()
        matcher.close()


def test_end_ids(walker) -> None:
    matcher = walker.compile({"type": "regex", "value": "[0-9]+"}).matcher()
    assert matcher.advance([END]) == 0
    assert not matcher.can_stop()
    (digit,) = walker.ids("7")
    assert matcher.advance([digit, STOP, digit]) == 2, "nothing is taken after an end id"
    assert matcher.is_complete()
    assert np.flatnonzero(unpack_bits(walker.row(matcher))).tolist() == [END, STOP]
    assert matcher.advance([digit]) == 0
    matcher.rollback(1)
    assert not matcher.is_complete()
    assert matcher.can_stop()
    assert matcher.advance([digit]) == 1
    assert matcher.error() is None
    matcher.close()


def test_refused_token_changes_nothing(walker) -> None:
    compiled = walker.compile({"type": "json_schema", "value": PERSON})
    matcher = compiled.matcher()
    for token_id in walker.ids('{"name": "A'):
        before = walker.row(matcher)
        wrong = int(np.flatnonzero(unpack_bits(before)[:389] == 0)[-1])
        assert matcher.advance([wrong]) == 0
        assert matcher.error() is None
        assert (walker.row(matcher) == before).all()
        assert matcher.advance([token_id]) == 1
    matcher.close()


def test_rollback_restores_every_mask(walker) -> None:
    compiled = walker.compile({"type": "json_schema", "value": PERSON})
    ids = walker.ids('{"name": "Ada", "age": 36}')
    matcher = compiled.matcher()
    rows = []
    for token_id in ids:
        rows.append(walker.row(matcher))
        matcher.advance([token_id])
    for back in (1, 2, len(ids)):
        matcher.rollback(back)
        assert (walker.row(matcher) == rows[len(ids) - back]).all()
        assert matcher.advance(ids[len(ids) - back :]) == back
    assert matcher.is_complete()
    matcher.close()


def test_matchers_are_independent(walker) -> None:
    compiled = walker.compile({"type": "regex", "value": "a+b"})
    first, second = compiled.matcher(), compiled.matcher()
    first.advance(walker.ids("aa"))
    assert second.advance(walker.ids("b")) == 0
    assert first.advance(walker.ids("b")) == 1
    assert first.is_complete()
    assert not second.can_stop()
    first.close()
    second.close()


def test_multi_byte_characters_stay_whole(walker) -> None:
    """After half a character only its continuation may follow."""
    compiled = walker.compile({"type": "json_schema", "value": {"type": "string"}})
    matcher = compiled.matcher()
    ids = walker.ids('"\N{SNOWMAN}"')
    assert len(ids) == 5, "the tokenizer must split the character for this test to mean anything"
    matcher.advance(ids[:2])
    allowed = np.flatnonzero(unpack_bits(walker.row(matcher)))
    assert ids[2] in allowed
    assert all(0x80 <= walker.vocabulary.token_bytes[i][0] < 0xC0 for i in allowed)
    assert matcher.advance(ids[2:]) == 3
    assert matcher.is_complete()
    matcher.close()


def test_whitespace_modes(walker) -> None:
    value = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "value": value}
    compact, spaced, wide = '{"a":1}', '{"a": 1}', '{"a":' + "\n" * 40 + "1}"
    expected = {
        "none": [True, False, False],
        "bounded": [True, True, False],
        "flexible": [True, True, True],
    }
    for mode, wanted in expected.items():
        compiled = walker.compile(form, whitespace=mode)
        assert [walker.accepts(compiled, text) for text in (compact, spaced, wide)] == wanted, mode


def test_forced_tokens_are_the_unforced_walk(walker) -> None:
    """Each forced token is allowed where it stands, and nothing but a part of the same text is."""
    value = {
        "type": "object",
        "properties": {"name": {"const": "the quick"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    # Where properties may come in any order, little is forced.
    order = {"property_order": "schema"} if walker.backend.name == "llguidance" else {}
    matcher = walker.compile({"type": "json_schema", "value": value}, whitespace="none", **order).matcher()
    forced = matcher.forced()
    pieces = walker.vocabulary.token_bytes
    text = b"".join(pieces[i] for i in forced)
    assert b'{"name":"the quick","age":'.startswith(text)
    if walker.backend.name == "llguidance":
        assert len(text) >= len('{"name":"the quick","age"')
    for token_id in forced:
        allowed = np.flatnonzero(unpack_bits(walker.row(matcher)))
        assert token_id in allowed
        assert all(text.startswith(pieces[i]) or pieces[i].startswith(text) for i in allowed)
        assert matcher.advance([token_id]) == 1
        text = text[len(pieces[token_id]) :]
    matcher.close()


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"type": "json_schema", "value": {"type": "strin"}}, "'type'"),
        ({"type": "json_schema", "value": {"type": "object", "properties": {"a": {"minimum": "x"}}}}, "#/properties/a"),
        ({"type": "json_schema", "value": {"type": "string", "pattern": "(?=a)b"}}, "look"),
        ({"type": "json_schema", "value": {"type": "string", "pattern": "a\\"}}, "pattern"),
        ({"type": "json_schema", "value": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"type": "json_schema", "value": {"$ref": "http://example.com/schema"}}, "example.com"),
        ({"type": "json_schema", "value": False}, "false"),
        ({"type": "json_schema", "value": '{"type": "object"'}, "line 1 column"),
        ({"type": "regex", "value": "abc\\"}, "position 3"),
        ({"type": "regex", "value": "(a"}, "position 0"),
        ({"type": "regex", "value": r"(?=a)b"}, "position 0"),
        ({"type": "regex", "value": r"a\b"}, "position 1"),
    ],
)
def test_refusals_name_keyword_or_position(walker, form: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        walker.compile(form)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1100
    assert str(caught.value).startswith("Input validation error: ")


def test_broken_grammars_are_refused(walker) -> None:
    for kind, value in [
        ("lark", "start: nothing"),
        ("lark", "start: ("),
        ("ebnf", "root ::= nothing"),
        ("ebnf", 'root ::= "a'),
    ]:
        with pytest.raises(GrammarError if walker.backend.name == "llguidance" else RequestError):
            walker.compile({"type": kind, "value": value})


def test_unknown_format_is_a_warning(walker) -> None:
    compiled = walker.compile({"type": "json_schema", "value": {"type": "string", "format": "semver"}})
    assert any("semver" in text for text in compiled.warnings)
    assert walker.accepts(compiled, '"1.0"')


def test_lenient_is_asked_for_and_says_so(walker) -> None:
    value = {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 1}
    form = {"type": "json_schema", "value": value}
    with pytest.raises(GrammarError, match="uniqueItems"):
        walker.compile(form)
    compiled = walker.compile(form, lenient=True)
    assert any("uniqueItems" in text for text in compiled.warnings)
    assert walker.accepts(compiled, '["a"]')
    assert walker.accepts(compiled, '["a","a"]')
    assert not walker.accepts(compiled, "[]"), "what can be enforced still is"


def test_mask_filler_writes_constrained_rows_only(walker) -> None:
    """Rows of several matchers at once equal each row alone; the buffer behind them is not touched."""
    filler = MaskFiller(walker.vocabulary)
    forms = [{"type": "regex", "value": "[0-9]+"}, {"type": "json_object"}, {"type": "choice", "value": ["yes", "no"]}]
    matchers = [walker.compile(form).matcher() for form in forms]
    matchers[0].advance(walker.ids("1"))
    alone = [walker.row(matcher) for matcher in matchers]
    buffer = np.full((5, filler.num_words), 0x33, dtype=np.int32)
    mask = filler.fill([(7, matchers[0]), (2, matchers[1]), (4, matchers[2])], out=buffer)
    assert mask.rows.tolist() == [7, 2, 4]
    assert (mask.bits == np.stack(alone)).all()
    assert np.shares_memory(mask.bits, buffer)
    assert (buffer[3:] == 0x33).all()
    assert mask.errors == []
    for matcher in matchers:
        matcher.close()


def test_random_walks_stay_inside_the_grammar(walker) -> None:
    """Sampling allowed tokens at random gives a text that the schema's meaning agrees with."""
    compiled = walker.compile({"type": "json_schema", "value": PERSON})
    rng = np.random.default_rng(0)
    finished = 0
    for _ in range(10):
        matcher = compiled.matcher()
        taken: list[int] = []
        while len(taken) < 150 and not matcher.is_complete():
            allowed = np.flatnonzero(unpack_bits(walker.row(matcher)))
            token_id = int(rng.choice(allowed))
            assert matcher.advance([token_id]) == 1
            taken.append(token_id)
        if matcher.is_complete():
            finished += 1
            value = json.loads(b"".join(walker.vocabulary.token_bytes[i] for i in taken))
            assert set(value) <= {"name", "age", "tags"}
            assert {"name", "age"} <= set(value)
            assert 1 <= len(value["name"]) <= 20
            assert isinstance(value["age"], int)
        matcher.close()
    assert finished


def test_sets_of_tokens_change_no_mask(llguidance_walker, vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """In strings of bounded length tokens are allowed in sets; one by one the rows are the same."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 14}, "note": {"type": "string", "minLength": 3}},
        "additionalProperties": False,
    }
    text = '{"name": "the quick x\\n", "note": "jumps over"}'
    rows = []
    for slices in (llguidance_backend._SLICES, []):
        monkeypatch.setattr(llguidance_backend, "_SLICES", slices)
        backend = load_backend("llguidance", vocabulary, llguidance_walker.limits)
        walker = type(llguidance_walker)(llguidance_walker.tokenizer, vocabulary, llguidance_walker.limits, backend)
        matcher = walker.compile({"type": "json", "value": schema}).matcher()
        found = []
        for token_id in walker.ids(text):
            found.append(walker.row(matcher))
            assert matcher.advance([token_id]) == 1
        rows.append(found)
        backend.close()
    np.testing.assert_array_equal(*rows)


def test_gaps_between_ids_are_no_text() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 40}, unk_token="a"))
    vocabulary = Vocabulary.from_tokenizer(tokenizer, vocab_size=64, eos_token_ids=[1])
    assert np.flatnonzero(unpack_bits(vocabulary.text_row)).tolist() == [0, 40]
