"""Token ids to text, one token at a time: whole characters only, and never a part of a stop string.

`Detokenizer` (one per engine) knows the vocabulary; `TextStream` (one per choice) is the mutable state of one text.
Knows the tokenizer object and nothing of tensors, batches or Triton.

**What the pieces add up to.** With `whole(ids)` the text of ids without those skipped as special, all deltas and
`finish()` joined are `whole(prompt + output)` without what it has in common with the beginning of `whole(prompt)`. So
the first word keeps the space that SentencePiece marks on it, and a character begun by the prompt's last token
belongs to the output. `whole` is the tokenizer's own decode, with two differences:

- Where bytes form no valid UTF-8, each maximal invalid part becomes one U+FFFD (Unicode's recommended practice). This
  is what byte-level tokenizers do themselves. Tokenizers with byte fallback would instead replace a whole run of byte
  tokens, valid characters included, because of one bad byte at its end; such a text could not be streamed.
- `clean_up_tokenization_spaces` is not applied: it would rewrite text that was already shown.

**Two ways to the same text.** Nearly all vocabularies of language models (byte-level BPE, SentencePiece-like with or
without byte fallback) map each token to fixed bytes, so a dictionary and a UTF-8 decoder with at most 3 bytes of state
do the work, in about 2 microseconds per token. Any other decoder (WordPiece, code shipped with a checkpoint) is asked
itself, about a short window of tokens, as most serving engines do: about 15 microseconds. Neither grows with the
output.
"""

from __future__ import annotations

import json
import re
from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from textgen_engine.request import OutputParams, StoppingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of the prompt that a window decoder sees before the first generated one.
_WINDOW_CONTEXT_TOKENS = 16
# Tokens a window decoder waits for the end of a character. UTF-8 needs at most 4; a longer wait is not a character
# in the making but a model talking nonsense, and waiting on would make each token dearer than the last.
_WINDOW_MAX_PENDING_TOKENS = 16


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one `push` brought.

    text: new text that is safe to show. stopped: a stop string was met, the text is complete.
    num_tokens: how many of the pushed tokens count; those after the one that completed a stop string do not.
    token_texts: one text per counted token: its own share of the output as `details` reports it (special tokens show
    their name even where the output skips them, a token that ends inside a character adds nothing yet).
    """

    text: str
    stopped: bool
    num_tokens: int
    token_texts: list[str]


class Detokenizer:
    """The vocabulary's side of detokenization. Shared by all streams of one engine, used from one thread.

    tokenizer: a transformers tokenizer, fast or slow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = frozenset(tokenizer.all_special_ids) | added
        self._rule = _byte_rule(tokenizer)
        # Fast tokenizers say None to an id they do not have; slow ones make something up, or raise.
        self._num_ids = None if tokenizer.is_fast else 1 + max(tokenizer.get_vocab().values(), default=-1)
        self._bytes: dict[int, bytes] = {}  # filled as ids come up: most of a vocabulary never does

    def stream(self, *, prompt_ids: Sequence[int], stopping: StoppingParams, output: OutputParams) -> TextStream:
        """State for one choice of one request, whose text continues the one of `prompt_ids`."""
        skip_ids = self._special_ids if output.skip_special_tokens else frozenset()
        source: _TextSource
        if self._rule is not None:
            source = _ByteSource(self, self._rule, prompt_ids, skip_ids)
        else:
            source = _WindowSource(self, prompt_ids, skip_ids)
        return TextStream(source, _StopMatcher(stopping), self, skip_ids)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """The token alone, as it reads inside a text; "" for an id that the tokenizer does not have."""
        if self._rule is not None:
            return self.token_bytes(token_id).decode("utf-8", "replace")
        return self.decode([token_id]) if self.token(token_id) is not None else ""

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry, None for an id without one: model vocabularies are often padded beyond the
        tokenizer's."""
        if token_id < 0 or (self._num_ids is not None and token_id >= self._num_ids):
            return None
        try:
            token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, OverflowError):  # a hole in a slow vocabulary; more than the library's 32 bits
            return None
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, under a byte rule; b"" for an id that the tokenizer does not have."""
        found = self._bytes.get(token_id)
        if found is None:
            assert self._rule is not None
            token = self.token(token_id)
            found = self._bytes[token_id] = self._rule.to_bytes(token) if token is not None else b""
        return found

    def decode(self, token_ids: list[int]) -> str:
        """The tokenizer's own decode, of known ids only; nothing skipped, nothing cleaned up."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class TextStream:
    """The text of one choice while it is generated. Made by `Detokenizer.stream`.

    Stop strings are matched literally, anywhere: inside a token and across tokens. The one that is completed first
    wins, of several completed by the same character the longest; so the result does not depend on how the text was
    cut into tokens. A stop string that is the exact text of a special token also stops when that token is skipped.
    A stop string completed by one of the first `min_new_tokens - 1` tokens is ordinary text.
    """

    def __init__(
        self, source: _TextSource, matcher: _StopMatcher, detokenizer: Detokenizer, skip_ids: frozenset[int]
    ) -> None:
        self._source = source
        self._matcher = matcher
        self._detokenizer = detokenizer
        self._skip_ids = skip_ids
        self._shown: list[str] = []
        self._num_tokens = 0
        self._ended = False

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._shown)

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Add generated tokens. Nothing may be pushed after a stop string was met or after `finish`."""
        assert not self._ended, "push after the end of the text"
        shown: list[str] = []
        token_texts: list[str] = []
        for token_id in token_ids:
            self._num_tokens += 1
            if token_id in self._skip_ids:
                name = self._detokenizer.token_text(token_id)
                token_texts.append(name)
                self._ended = self._matcher.is_stop(name, self._num_tokens)
                if self._ended:
                    # The special token stands where the stop string would: what was held back is ordinary text.
                    shown.append(self._matcher.flush() + self._source.flush())
            else:
                new = self._source.add(token_id)
                token_texts.append(self._detokenizer.token_text(token_id) if self._is_special(token_id) else new)
                if new:
                    visible, self._ended = self._matcher.feed(new, self._num_tokens)
                    shown.append(visible)
            if self._ended:
                break
        text = "".join(shown)
        if text:
            self._shown.append(text)
        return TextDelta(text=text, stopped=self._ended, num_tokens=len(token_texts), token_texts=token_texts)

    def finish(self) -> str:
        """End the text without a stop string and return what was held back: the beginning of a stop string that never
        came, and U+FFFD for a character that was never completed. "" when the text had already ended."""
        if self._ended:
            return ""
        self._ended = True
        text = self._matcher.flush() + self._source.flush()
        if text:
            self._shown.append(text)
        return text

    def fork(self) -> TextStream:
        """An independent copy, for another choice that shares the tokens so far."""
        copy = TextStream(self._source.fork(), self._matcher.fork(), self._detokenizer, self._skip_ids)
        copy._shown = list(self._shown)
        copy._num_tokens = self._num_tokens
        copy._ended = self._ended
        return copy

    def _is_special(self, token_id: int) -> bool:
        return self._detokenizer.is_special(token_id)


class _StopMatcher:
    """Finds stop strings in a text that arrives in pieces, and holds back the end that may become one.

    Invariant: `_held` is the longest end of the text so far that is a proper beginning of some stop string.
    """

    def __init__(self, stopping: StoppingParams) -> None:
        self._stopping = stopping
        self._stop = tuple(stop for stop in stopping.stop if stop)
        self._held = ""

    def is_stop(self, token_text: str, num_tokens: int) -> bool:
        """Whether a skipped special token of this name ends the text."""
        return num_tokens >= self._stopping.min_new_tokens and token_text in self._stop

    def feed(self, new: str, num_tokens: int) -> tuple[str, bool]:
        """Add text that came with token number `num_tokens` (from 1). Returns what may be shown, and whether a stop
        string was completed by it."""
        if not self._stop:
            return new, False
        num_old = len(self._held)
        text = self._held + new
        if num_tokens >= self._stopping.min_new_tokens:
            match = self._first_match(text, num_old)
            if match is not None:
                start, end = match
                self._held = ""
                return text[: end if self._stopping.include_stop_str_in_output else start], True
        shown_len = len(text) - self._num_to_hold(text)
        self._held = text[shown_len:]
        return text[:shown_len], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def fork(self) -> _StopMatcher:
        copy = _StopMatcher(self._stopping)
        copy._held = self._held
        return copy

    def _first_match(self, text: str, num_old: int) -> tuple[int, int] | None:
        """(start, end) of the stop string that ends first, the longest of those; it ends after `num_old` characters:
        what ended earlier was seen, and passed over, with an earlier token."""
        best: tuple[int, int] | None = None
        for stop in self._stop:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or (end, start) < (best[1], best[0]):
                best = (start, end)
        return best

    def _num_to_hold(self, text: str) -> int:
        longest = 0
        for stop in self._stop:
            # From the earliest place where a proper beginning of `stop` could reach the end of the text; str.find
            # makes the usual case, no such place, one scan in C.
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                    break
                start = text.find(stop[0], start + 1)
        return longest


class _TextSource(Protocol):
    """Complete characters out of token ids; skipped tokens never reach it."""

    def add(self, token_id: int) -> str:
        """The characters that this token completes."""

    def flush(self) -> str:
        """The end of the text: U+FFFD for what is incomplete."""

    def fork(self) -> _TextSource: ...


class _ByteSource:
    """For vocabularies whose tokens stand for fixed bytes.

    State: `_pending`, the beginning of a character (at most 3 bytes), and what is still to be stripped from the start
    of the text, which only matters where the prompt has no text of its own.
    """

    def __init__(
        self, detokenizer: Detokenizer, rule: _ByteRule, prompt_ids: Sequence[int], skip_ids: frozenset[int]
    ) -> None:
        self._detokenizer = detokenizer
        self._rule = rule
        self._at_start = True
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id in skip_ids or detokenizer.token(token_id) is None:
                continue
            self._at_start = False
            tail = detokenizer.token_bytes(token_id) + tail
            if len(tail) >= max(4, rule.num_leading_spaces):
                break
        # Only the last 3 bytes can be the beginning of an unfinished character; a decoder that starts inside an older
        # character drops its continuation bytes one by one and is in step at the next first byte.
        _, num_used = utf_8_decode(tail[-3:], "replace", False)
        self._pending = tail[-3:][num_used:]
        self._prompt_end = utf_8_decode(self._pending, "replace", True)[0]
        self._num_to_strip = 0 if tail.strip(b" ") else max(0, rule.num_leading_spaces - len(tail))

    def add(self, token_id: int) -> str:
        new = self._detokenizer.token_bytes(token_id)
        if self._at_start:
            token = self._detokenizer.token(token_id)
            if token is None:
                return ""
            self._at_start = False
            if self._rule.first_to_bytes is not None:
                new = self._rule.first_to_bytes(token)
        return self._decode(new, False)

    def flush(self) -> str:
        return self._decode(b"", True)

    def fork(self) -> _ByteSource:
        copy = _ByteSource(self._detokenizer, self._rule, (), frozenset())
        copy._pending = self._pending
        copy._prompt_end = self._prompt_end
        copy._num_to_strip = self._num_to_strip
        copy._at_start = self._at_start
        return copy

    def _decode(self, new: bytes, final: bool) -> str:
        text, num_used = utf_8_decode(self._pending + new, "replace", final)
        self._pending = (self._pending + new)[num_used:]
        if text and self._prompt_end:
            # The prompt's text ends in U+FFFD for its unfinished character. If that stays so, it is not ours to show.
            text = _beyond(self._prompt_end, text)
            self._prompt_end = ""
        if text and self._num_to_strip:
            stripped = text[: self._num_to_strip].lstrip(" ") + text[self._num_to_strip :]
            self._num_to_strip = 0 if stripped else self._num_to_strip - len(text)
            text = stripped
        return text


class _WindowSource:
    """For every other decoder: decode a few tokens with and without the new ones, and show the difference.

    `_context` are tokens whose text is shown; it is what was last completed together, so that it starts between two
    characters. `_pending` are the tokens since.
    """

    def __init__(self, detokenizer: Detokenizer, prompt_ids: Sequence[int], skip_ids: frozenset[int]) -> None:
        self._detokenizer = detokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        for token_id in reversed(prompt_ids):
            if len(self._context) == _WINDOW_CONTEXT_TOKENS:
                break
            if token_id not in skip_ids and detokenizer.token(token_id) is not None:
                self._context.insert(0, token_id)
        self._base = detokenizer.decode(self._context)

    def add(self, token_id: int) -> str:
        if self._detokenizer.token(token_id) is None:
            return ""
        self._pending.append(token_id)
        whole = self._detokenizer.decode(self._context + self._pending)
        if whole.endswith("\ufffd") and len(self._pending) < _WINDOW_MAX_PENDING_TOKENS:
            return ""
        return self._complete(whole)

    def flush(self) -> str:
        return self._complete(self._detokenizer.decode(self._context + self._pending)) if self._pending else ""

    def fork(self) -> _WindowSource:
        copy = _WindowSource(self._detokenizer, (), frozenset())
        copy._context = list(self._context)
        copy._pending = list(self._pending)
        copy._base = self._base
        return copy

    def _complete(self, whole: str) -> str:
        new = _beyond(self._base, whole)
        # Tokens without text of their own cannot be context: a decoder would take what follows for a text's start.
        own_text = self._detokenizer.decode(self._pending)
        if own_text:
            self._context, self._base = self._pending, own_text
        else:
            self._context, self._base = self._context + self._pending, whole
            if len(self._context) > 2 * _WINDOW_CONTEXT_TOKENS:
                self._context = self._context[-_WINDOW_CONTEXT_TOKENS:]
                self._base = self._detokenizer.decode(self._context)
        self._pending = []
        return new


def _beyond(before: str, whole: str) -> str:
    """`whole` without what it has in common with the beginning of `before`: all of `before`, unless that ends in
    U+FFFD for a character that `whole` completes."""
    num_common = len(before)
    while not whole.startswith(before[:num_common]):
        num_common -= 1
    return whole[num_common:]


@dataclass(frozen=True, slots=True)
class _ByteRule:
    """How a vocabulary's tokens become bytes.

    to_bytes: of one token of the vocabulary. first_to_bytes: of a text's first token, where that differs.
    num_leading_spaces: spaces stripped from the start of a text.
    """

    to_bytes: Callable[[str], bytes]
    first_to_bytes: Callable[[str], bytes] | None = None
    num_leading_spaces: int = 0


def _byte_rule(tokenizer: PreTrainedTokenizerBase) -> _ByteRule | None:
    """The rule that does what the tokenizer's decoder does, or None where tokens do not stand for fixed bytes.

    Reads the `tokenizers` library's description of the decoder: ByteLevel; Metaspace; or a sequence of Replace,
    ByteFallback, Fuse, and Strip of leading spaces, in this order.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None or _decodes_itself(tokenizer):
        return None
    description = json.loads(decoder.__getstate__())
    steps = description["decoders"] if description["type"] == "Sequence" else [description]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _ByteRule(_byte_level_bytes)
    if [step["type"] for step in steps] == ["Metaspace"]:
        marker = steps[0]["replacement"]
        return _ByteRule(
            to_bytes=lambda token: token.replace(marker, " ").encode(),
            first_to_bytes=None if steps[0]["prepend_scheme"] == "never" else lambda t: t.replace(marker, "").encode(),
        )
    replacements: list[tuple[str, str]] = []
    byte_fallback = False
    num_leading_spaces = 0
    order = ("Replace", "ByteFallback", "Fuse", "Strip")
    reached = 0
    for step in steps:
        kind = step["type"]
        if kind not in order or order.index(kind) < reached:
            return None
        reached = order.index(kind)
        if kind == "Replace":
            if "String" not in step["pattern"]:
                return None
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Strip":
            # Before Fuse, a Strip would work on every token.
            if step["content"] != " " or step["stop"] != 0 or not any(other["type"] == "Fuse" for other in steps):
                return None
            num_leading_spaces += step["start"]

    def to_bytes(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        if byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.encode()

    return _ByteRule(to_bytes, num_leading_spaces=num_leading_spaces)


def _decodes_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's class puts its own decoding over the library's (Whisper and code from checkpoints)."""
    for cls in type(tokenizer).__mro__:
        if "decode" in vars(cls) or "_decode" in vars(cls):
            return cls.__module__ not in (
                "transformers.tokenization_utils_tokenizers",
                "transformers.tokenization_utils_base",
            )
    return False


_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def _byte_level_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes the 256 bytes (GPT-2's table): printable Latin-1 characters stand
    for themselves, the other bytes, in order, for U+0100 and following."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """An added token may hold characters outside the alphabet; then all of it is taken as it is written."""
    try:
        return bytes([_BYTE_LEVEL_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()
