"""`service.py`: prompt forms, lengths, offsets, decoding, and the text of each refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from textgen_engine import errors as engine_errors
from textgen_tokenizer.errors import InvalidParameter, PromptTooLong, TokenizerError
from textgen_tokenizer.service import TokenizerRequest, TokenizerService


def _bos_service(loaded: Any, **limits: Any) -> TokenizerService:
    """Words as tokens, with a begin-of-text mark that the tokenizer adds itself."""
    words = ["<unk>", "<s>", "hello", "world", "again"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    return TokenizerService(replace(loaded, tokenizer=fast, vocab_size=8, max_chars_per_token=None, **limits))


def _refusal(service: TokenizerService, **inputs: Any) -> str:
    with pytest.raises(TokenizerError) as caught:
        service.answer(TokenizerRequest(**inputs))
    return str(caught.value)


def test_text(service: TokenizerService, loaded: Any) -> None:
    for text in ("Hello, world!", " ", "emoji 😀\n\n", "a\x00b", "<|im_start|>user"):
        answer = service.answer(TokenizerRequest(text_input=text.encode()))
        assert answer.prompt_text == text
        assert answer.input_ids == loaded.tokenizer(text)["input_ids"]
        assert answer.tokens is answer.text is None


def test_special_tokens_are_added_to_text_only(loaded: Any) -> None:
    service = _bos_service(loaded)
    chat = json.dumps([{"role": "user", "content": "hello"}]).encode()
    off, on = b'{"add_special_tokens": false}', b'{"add_special_tokens": true}'
    assert service.answer(TokenizerRequest(text_input=b"hello world")).input_ids == [1, 2, 3]
    assert service.answer(TokenizerRequest(text_input=b"hello world", sampling_parameters=off)).input_ids == [2, 3]
    assert service.answer(TokenizerRequest(messages=chat)).input_ids == [1, 2]
    assert service.answer(TokenizerRequest(messages=chat, sampling_parameters=on)).input_ids == [1, 1, 2]


def test_a_template_and_what_it_renders_without_tokens(loaded: Any) -> None:
    service = _bos_service(loaded, max_input_tokens=1)  # lengths are nobody's business here
    chat = json.dumps([{"role": "user", "content": "hello world"}]).encode()
    rendered = service.answer(TokenizerRequest(action="render", messages=chat))
    assert (rendered.prompt_text, rendered.input_ids) == ("<s> hello world", None)
    source = service.answer(TokenizerRequest(action="template")).text
    assert source == "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}"
    assert "needs `messages`" in _refusal(service, action="render", text_input=b"hello")
    unknown = b'{"chat_template": "other"}'
    assert "has no chat template 'other'" in _refusal(service, action="template", sampling_parameters=unknown)


def test_truncate_keeps_the_last_tokens(service: TokenizerService, loaded: Any) -> None:
    text = "one two three four five six seven"
    ids = loaded.tokenizer(text)["input_ids"]
    for n in (1, 3, len(ids), 200):
        answer = service.answer(TokenizerRequest(text_input=text.encode(), parameters={"truncate": n}))
        assert answer.input_ids == ids[-n:]
        assert answer.prompt_text == text
    answer = service.answer(TokenizerRequest(input_ids=ids, sampling_parameters=b'{"truncate": 2}'))
    assert answer.input_ids == ids[-2:]
    # A begin-of-text mark is a token like any other.
    answer = _bos_service(loaded).answer(TokenizerRequest(text_input=b"hello world", parameters={"truncate": 2}))
    assert answer.input_ids == [2, 3]


def test_truncate_makes_a_long_text_fit(service: TokenizerService) -> None:
    answer = service.answer(TokenizerRequest(text_input=b"word " * 100_000, parameters={"truncate": 200}))
    assert answer.input_ids is not None
    assert len(answer.input_ids) == 200


def test_ids(service: TokenizerService, loaded: Any) -> None:
    answer = service.answer(TokenizerRequest(input_ids=[1, 19556, 905]))
    assert answer.input_ids == [1, 19556, 905]
    assert answer.prompt_text == "<|im_start|>Hello world"
    padded = TokenizerService(replace(loaded, vocab_size=50_000))
    assert padded.answer(TokenizerRequest(input_ids=[19556, 49_999])).prompt_text == "Hello"


@pytest.mark.parametrize("text", ["Hello 😀 world", "日本語 العربية", "é 👩‍👩‍👧 x", "line\n\n  two"])
def test_tokenize_gives_character_offsets(service: TokenizerService, loaded: Any, text: str) -> None:
    answer = service.answer(TokenizerRequest(action="tokenize", text_input=text.encode()))
    assert answer.tokens is not None
    assert [span.id for span in answer.tokens] == answer.input_ids == loaded.tokenizer(text)["input_ids"]
    assert all(text[span.start : span.stop] == span.text != "" for span in answer.tokens)
    covered = {i for span in answer.tokens for i in range(span.start, span.stop)}
    assert covered == set(range(len(text)))


def test_tokenize_measures(service: TokenizerService, loaded: Any) -> None:
    """Special tokens are counted, without text; neither `truncate` nor the limit applies; chats are rendered."""
    spans = _bos_service(loaded).answer(TokenizerRequest(action="tokenize", text_input=b"hello")).tokens
    assert spans is not None
    assert [(span.id, span.text, span.start, span.stop) for span in spans] == [(1, "", 0, 0), (2, "hello", 0, 5)]
    long = service.answer(TokenizerRequest(action="tokenize", text_input=b"word " * 1000, parameters={"truncate": 3}))
    assert len(long.tokens or ()) == 1001
    chat = json.dumps([{"role": "user", "content": "hi"}]).encode()
    measured = service.answer(TokenizerRequest(action="tokenize", messages=chat))
    encoded = service.answer(TokenizerRequest(messages=chat))
    assert (measured.input_ids, measured.prompt_text) == (encoded.input_ids, encoded.prompt_text)


def test_decode(service: TokenizerService) -> None:
    ids = [1, 19556, 905, 2]
    assert service.answer(TokenizerRequest(action="decode", token_ids=ids)).text == "Hello world"
    kept = service.answer(
        TokenizerRequest(action="decode", token_ids=ids, sampling_parameters=b'{"skip_special_tokens": false}')
    )
    assert kept.text == "<|im_start|>Hello world<|im_end|>"
    assert kept.input_ids is kept.prompt_text is kept.tokens is None


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "given: none of them"),
        ({"text_input": b"a", "input_ids": [1]}, "given: `text_input` and `input_ids`"),
        ({"text_input": b"a", "messages": b"[]"}, "given: `text_input` and `messages`"),
        ({"text_input": b""}, "`text_input` must not be empty"),
        ({"text_input": b"ab\xffc"}, "`text_input` is not valid UTF-8: invalid start byte at byte 2"),
        ({"messages": b"\xc3"}, "`messages` is not valid UTF-8: unexpected end of data at byte 0"),
        ({"messages": b'[{"role": "user" "content"}]'}, "line 1, column 18 (character 17)"),
        ({"messages": b"{}"}, "`messages` must be a non-empty JSON array of messages; given: {}"),
        ({"messages": b"[]"}, "`messages` must be a non-empty JSON array of messages; given: []"),
        ({"messages": b'["hi"]'}, "`messages[0]` must be an object; given: 'hi'"),
        ({"messages": b'[{"content": "x"}]'}, "`messages[0].role` must be a non-empty string; given: None"),
        (
            {"messages": b'[{"role": "user", "content": 5}]'},
            "`messages[0].content` must be a string or a list of parts",
        ),
        ({"messages": b'[{"role": "user"}]'}, "`messages[0]` has no content"),
        (
            {"messages": b'[{"role": "user", "content": [{"type": "text"}]}]'},
            "`messages[0].content[0]` must be an object",
        ),
        (
            {"messages": b'[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]'},
            "`messages[0].content[0]` is of type 'image_url'; this server takes text only",
        ),
        ({"messages": b'[{"role": "user", "content": "\\ud800"}]'}, "half a surrogate pair, '\\ud800'"),
        ({"messages": b"[" * 100_000}, "`messages` is not valid JSON"),
        ({"messages": b"[" + b"9" * 5000 + b"]"}, "`messages` is not valid JSON"),
        ({"input_ids": []}, "`input_ids` must not be empty"),
        ({"input_ids": [1, -5]}, "from 0 to 49151 (vocabulary size 49152); given: -5 at position 1"),
        ({"input_ids": [49152]}, "given: 49152 at position 0"),
        ({"input_ids": [1] * 201}, "the prompt has 201 tokens; allowed are 200 (MAX_INPUT_TOKENS)"),
        ({"text_input": b"word " * 300}, "the prompt has 301 tokens; allowed are 200 (MAX_INPUT_TOKENS)"),
        ({"text_input": b"word " * 100_000}, "(500000 characters); allowed are 200 (MAX_INPUT_TOKENS)"),
        ({"text_input": b"a", "sampling_parameters": b"{"}, "`sampling_parameters` is not valid JSON"),
        ({"text_input": b"a", "sampling_parameters": b"\xff"}, "`sampling_parameters` is not valid UTF-8"),
        (
            {"text_input": b"a", "sampling_parameters": b"[1]"},
            "`sampling_parameters` must be a JSON object; given: [1]",
        ),
        (
            {"text_input": b"a", "parameters": {"truncate": 0}},
            "`truncate` must be a whole number of at least 1; given: 0",
        ),
        ({"text_input": b"a", "parameters": {"truncate": True}}, "`truncate` must be a whole number"),
        ({"text_input": b"a", "parameters": {"truncate": 201}}, "`truncate` must be at most 200"),
        (
            {"text_input": b"a", "parameters": {"truncate": 2}, "sampling_parameters": b'{"truncate": 3}'},
            "`truncate` is given twice, with different values: 3 and 2",
        ),
        (
            {"text_input": b"a", "parameters": {"add_special_tokens": "no"}},
            "`add_special_tokens` must be true or false",
        ),
        (
            {"text_input": b"a", "action": "sing"},
            "`action` must be one of encode, tokenize, decode, render, template; given: 'sing'",
        ),
        ({"text_input": b"a", "token_ids": [1]}, "`token_ids` belongs to the action `decode`"),
        ({"action": "decode"}, "the action `decode` needs `token_ids`"),
        ({"action": "decode", "token_ids": [70_000]}, "`token_ids` must hold token ids from 0 to 49151"),
        ({"action": "tokenize", "input_ids": [1]}, "the action `tokenize` needs `text_input` or `messages`"),
    ],
)
def test_refusals(service: TokenizerService, inputs: dict[str, Any], text: str) -> None:
    refusal = _refusal(service, **inputs)
    assert refusal.startswith("Input validation error: ")
    assert text in refusal


def test_a_prompt_of_no_tokens_is_refused(loaded: Any) -> None:
    service = _bos_service(loaded)
    assert "no tokens" in _refusal(service, text_input=b"  ", parameters={"add_special_tokens": False})


def test_no_limit_known(loaded: Any) -> None:
    service = _bos_service(loaded, max_input_tokens=None)
    answer = service.answer(TokenizerRequest(text_input=b"hello " * 5000))
    assert len(answer.input_ids or ()) == 5001


def test_texts_equal_the_engines() -> None:
    """Both processes announce the same kind of error with the same words."""
    from textgen_tokenizer import errors

    for name in ("InvalidParameter", "PromptTooLong", "Unsupported", "TemplateError", "ToolError"):
        ours, theirs = getattr(errors, name)("why"), getattr(engine_errors, name)("why")
        assert str(ours) == str(theirs)
    assert str(errors.TokenizerError("why")) == str(engine_errors.EngineFailure("why"))
    value = ("x", ["long"] * 100, "short")
    assert str(InvalidParameter.for_value(*value)) == str(engine_errors.InvalidParameter.for_value(*value))
    assert issubclass(PromptTooLong, TokenizerError)
