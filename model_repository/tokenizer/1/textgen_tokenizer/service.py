"""`TokenizerService`: one request in, its answer out. What the model does, without Triton.

Knows prompt forms, lengths and vocabularies; chat.py renders messages, options.py reads parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from textgen_tokenizer import chat
from textgen_tokenizer.errors import InvalidParameter, PromptTooLong, Unsupported
from textgen_tokenizer.loading import LoadedTokenizer
from textgen_tokenizer.options import Json, PromptOptions, parse_options

Action = Literal["encode", "tokenize", "decode", "render", "template"]


@dataclass(frozen=True, slots=True)
class TokenizerRequest:
    """The inputs of one request, as they came; None where one was not given.

    parameters: the request's own scalar parameters.
    """

    action: str | None = None
    text_input: bytes | None = None
    messages: bytes | None = None
    input_ids: Sequence[int] | None = None
    token_ids: Sequence[int] | None = None
    sampling_parameters: bytes | None = None
    parameters: Mapping[str, Json] | None = None


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """One token of a text. start, end: character positions, so that text[start:end] is `text`; a token that holds only
    a part of a character has the whole character, and a token that the text does not hold (a begin-of-text mark) is
    empty."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TokenizerAnswer:
    """The outputs of one request; None where it asked for something else.

    prompt_text: the text that `input_ids` was made from, before any truncation. text: decoded, or a template's source.
    """

    input_ids: list[int] | None = None
    prompt_text: str | None = None
    tokens: list[TokenSpan] | None = None
    text: str | None = None


class TokenizerService:
    """Answers requests with one loaded tokenizer. Holds no state between them."""

    def __init__(self, loaded: LoadedTokenizer) -> None:
        self._loaded = loaded
        self._tokenizer: Any = loaded.tokenizer

    def answer(self, request: TokenizerRequest) -> TokenizerAnswer:
        """Raises one of the errors of errors.py."""
        action = request.action or "encode"
        if action not in get_args(Action):
            raise InvalidParameter.for_value("action", action, "one of " + ", ".join(get_args(Action)))
        options = parse_options(
            _decode_utf8("sampling_parameters", request.sampling_parameters), request.parameters or {}
        )
        if action == "decode":
            return self._decode(request, options)
        if action == "template":
            return TokenizerAnswer(text=chat.template_of(self._tokenizer, options))
        if request.token_ids is not None:
            raise InvalidParameter("`token_ids` belongs to the action `decode`; a prompt is given as `input_ids`")
        given = [name for name in ("text_input", "messages", "input_ids") if getattr(request, name) is not None]
        if len(given) != 1:
            raise InvalidParameter(
                "give one of `text_input`, `messages` and `input_ids`; given: "
                + (" and ".join(f"`{name}`" for name in given) or "none of them")
            )
        if action == "tokenize":
            return self._tokenize(request, options)
        if action == "render":
            if request.messages is None:
                raise InvalidParameter("the action `render` needs `messages`")
            return TokenizerAnswer(prompt_text=self._prompt_text(request, options))
        return self._encode(request, options)

    def _encode(self, request: TokenizerRequest, options: PromptOptions) -> TokenizerAnswer:
        limit = self._loaded.max_input_tokens
        if options.truncate is not None and limit is not None and options.truncate > limit:
            raise InvalidParameter.for_value("truncate", options.truncate, f"at most {limit} (MAX_INPUT_TOKENS)")
        if request.input_ids is not None:
            ids = self._checked_ids("input_ids", request.input_ids)
            prompt_text = self._text_of(ids, skip_special_tokens=False)
        else:
            prompt_text = self._prompt_text(request, options)
            if options.truncate is None:
                self._refuse_hopeless(prompt_text)
            ids = self._ids_of(prompt_text, request, options)
        if not ids:
            raise InvalidParameter("the prompt must not be empty: it has no tokens")
        if options.truncate is not None:
            ids = ids[-options.truncate :]
        if limit is not None and len(ids) > limit:
            raise PromptTooLong(f"the prompt has {len(ids)} tokens; allowed are {limit} (MAX_INPUT_TOKENS)")
        return TokenizerAnswer(input_ids=ids, prompt_text=prompt_text)

    def _tokenize(self, request: TokenizerRequest, options: PromptOptions) -> TokenizerAnswer:
        """Ids with their places in the text. Neither truncated nor bounded: it is asked in order to measure."""
        if not self._tokenizer.is_fast:
            raise Unsupported("this model's tokenizer knows no offsets; use the action `encode`")
        if request.input_ids is not None:
            raise InvalidParameter("the action `tokenize` needs `text_input` or `messages`")
        text = self._prompt_text(request, options)
        encoded = self._call(text, request, options, return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        spans = [TokenSpan(i, text[a:b], a, b) for i, (a, b) in zip(ids, encoded["offset_mapping"], strict=True)]
        return TokenizerAnswer(input_ids=ids, prompt_text=text, tokens=spans)

    def _decode(self, request: TokenizerRequest, options: PromptOptions) -> TokenizerAnswer:
        if request.token_ids is None:
            raise InvalidParameter("the action `decode` needs `token_ids`")
        ids = self._checked_ids("token_ids", request.token_ids)
        return TokenizerAnswer(text=self._text_of(ids, options.skip_special_tokens))

    def _prompt_text(self, request: TokenizerRequest, options: PromptOptions) -> str:
        text = _decode_utf8("text_input", request.text_input)
        if text is not None:
            if not text:
                raise InvalidParameter("`text_input` must not be empty")
            return text
        messages = _decode_utf8("messages", request.messages)
        assert messages is not None
        prompt = chat.render(self._tokenizer, chat.parse_messages(messages), options)
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # JSON can write \ud800 alone, UTF-8 cannot
            raise InvalidParameter(f"`messages` holds half a surrogate pair, {prompt[error.start]!r}") from error
        return prompt

    def _ids_of(self, text: str, request: TokenizerRequest, options: PromptOptions) -> list[int]:
        ids: list[int] = self._call(text, request, options)["input_ids"]
        return ids

    def _call(self, text: str, request: TokenizerRequest, options: PromptOptions, **more: Any) -> Any:
        # A rendered template has its special tokens in its text; a second begin-of-text mark degrades answers.
        add = options.add_special_tokens if options.add_special_tokens is not None else request.messages is None
        return self._tokenizer(
            text,
            add_special_tokens=add,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about lengths: they are judged here
            **more,
        )

    def _refuse_hopeless(self, text: str) -> None:
        """Refuse a text that cannot fit whatever its tokens are, before spending time on it (about 0.5 s per
        megabyte)."""
        limit, chars = self._loaded.max_input_tokens, self._loaded.max_chars_per_token
        if limit is not None and chars is not None and len(text) > limit * chars:
            raise PromptTooLong(
                f"the prompt has at least {-(-len(text) // chars)} tokens ({len(text)} characters);"
                f" allowed are {limit} (MAX_INPUT_TOKENS)"
            )

    def _checked_ids(self, name: str, ids: Sequence[int]) -> list[int]:
        if not len(ids):
            raise InvalidParameter(f"`{name}` must not be empty")
        size = self._loaded.vocab_size
        for position, token_id in enumerate(ids):
            if not 0 <= token_id < size:
                raise InvalidParameter(
                    f"`{name}` must hold token ids from 0 to {size - 1} (vocabulary size {size});"
                    f" given: {token_id} at position {position}"
                )
        return [int(token_id) for token_id in ids]

    def _text_of(self, ids: list[int], skip_special_tokens: bool) -> str:
        # Ids of the model's padding beyond the tokenizer's vocabulary have no text.
        known = [i for i in ids if i < len(self._tokenizer)] if max(ids) >= len(self._tokenizer) else ids
        text: str = self._tokenizer.decode(
            known, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def _decode_utf8(name: str, content: bytes | None) -> str | None:
    if content is None:
        return None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidParameter(f"`{name}` is not valid UTF-8: {error.reason} at byte {error.start}") from error
