"""`Vocabulary`: what grammar backends must know of a tokenizer, computed once, free of any grammar library.

Owns the bytes of each token, the set of special and control tokens, and the two constant mask rows made of them. Plain
values only, so a vocabulary can be sent to a worker process.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from textgen_engine.errors import ModelLoadError
from textgen_engine.grammar.base import MaskRow


@dataclass(frozen=True)
class Vocabulary:
    """One tokenizer beside one model.

    vocab_size: width of the model's logits. num_tokens: ids the tokenizer knows (more or fewer than vocab_size), with
    the gap_token_ids among them, which no token has.
    special_token_ids: never part of a text. eos_token_ids: every id that ends one, sorted.
    tokenizer_json: the `tokenizers` library's own serialisation, padding and truncation off.
    """

    vocab_size: int
    num_tokens: int
    gap_token_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]
    special_token_ids: frozenset[int]
    tokenizer_json: str

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        control_token_ids: Collection[int] = (),
    ) -> Vocabulary:
        """Read a transformers fast tokenizer (or a `tokenizers.Tokenizer`).

        control_token_ids: further ids that must never appear in constrained text; a GGUF file marks control tokens
        (token_type 3) that its converted tokenizer treats as ordinary ones.
        Raises ModelLoadError for a tokenizer without the fast implementation, and for a model without an end token.
        """
        fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(fast, "to_str"):
            raise ModelLoadError("grammar-constrained generation needs a fast tokenizer (tokenizer.json)")
        state = json.loads(fast.to_str())
        state["padding"] = state["truncation"] = None
        known = set(fast.get_vocab(with_added_tokens=True).values())
        num_tokens = max(known, default=-1) + 1
        eos = tuple(sorted({int(i) for i in eos_token_ids}))
        if not eos:
            raise ModelLoadError("grammar-constrained generation needs an end-of-sequence token")
        special = {added["id"] for added in state.get("added_tokens", []) if added.get("special")}
        special.update(int(i) for i in getattr(tokenizer, "all_special_ids", ()))
        special.update(int(i) for i in control_token_ids)
        special.update(eos)
        gaps = frozenset(range(num_tokens)) - known
        return cls(vocab_size, num_tokens, gaps, eos, frozenset(special), json.dumps(state, ensure_ascii=False))

    @property
    def width(self) -> int:
        """Ids a mask row covers."""
        return max(self.vocab_size, self.num_tokens)

    @property
    def num_words(self) -> int:
        """int32 words of a mask row."""
        return (self.width + 31) // 32

    @cached_property
    def text_row(self) -> MaskRow:
        """int32 [num_words]: the tokens that stand for text; special tokens, unknown ids and id >= vocab_size are 0.

        First asked for in the middle of a step, for which it must be cheap: it does not read `token_bytes`.
        """
        allowed = np.zeros(self.num_words * 32, dtype=np.uint8)
        allowed[: min(self.num_tokens, self.vocab_size)] = 1
        allowed[[i for i in self.special_token_ids | self.gap_token_ids if i < allowed.size]] = 0
        return pack_bits(allowed)

    @cached_property
    def eos_row(self) -> MaskRow:
        """int32 [num_words]: the end-of-sequence ids."""
        allowed = np.zeros(self.num_words * 32, dtype=np.uint8)
        allowed[[i for i in self.eos_token_ids if i < self.vocab_size]] = 1
        return pack_bits(allowed)

    @cached_property
    def token_bytes(self) -> tuple[bytes | None, ...]:
        """UTF-8 bytes of each id as it stands inside a text; None for an id no token has. Special tokens included."""
        state = json.loads(self.tokenizer_json)
        model = state["model"]
        vocab = model["vocab"]
        pieces: list[str | None] = [None] * self.num_tokens
        if isinstance(vocab, dict):
            for piece, token_id in vocab.items():
                pieces[token_id] = piece
        else:  # Unigram: [[piece, score], ...]
            for token_id, (piece, _score) in enumerate(vocab):
                pieces[token_id] = piece
        decoders = _component_types(state.get("decoder"))
        pre_tokenizers = _component_types(state.get("pre_tokenizer"))
        if "ByteLevel" in decoders or "ByteLevel" in pre_tokenizers:
            table = {char: byte for byte, char in _byte_level_alphabet().items()}
            out = [None if piece is None else _byte_level_bytes(piece, table) for piece in pieces]
        elif "WordPiece" in decoders:
            prefix = (state["decoder"] or {}).get("prefix", "##")
            out = [
                None if piece is None else (piece[len(prefix) :] if piece.startswith(prefix) else " " + piece).encode()
                for piece in pieces
            ]
        else:  # SentencePiece: "▁" is a blank, <0xNN> a byte
            out = [None if piece is None else _sentencepiece_bytes(piece) for piece in pieces]
        for added in state.get("added_tokens", []):
            if added["id"] < len(out):
                out[added["id"]] = added["content"].encode()
        return tuple(out)


def pack_bits(allowed: np.ndarray[Any, np.dtype[np.uint8]]) -> MaskRow:
    """Pack uint8 [32 * n] of 0 and 1 into int32 [n], id i at bit i & 31 of word i >> 5."""
    return np.packbits(allowed, bitorder="little").view("<i4").astype(np.int32)


def unpack_bits(row: MaskRow) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The inverse of `pack_bits`: int32 [n] to uint8 [32 * n]."""
    return np.unpackbits(np.ascontiguousarray(row).astype("<i4").view(np.uint8), bitorder="little")


def _component_types(component: Any) -> set[str]:
    """The type names in a tokenizer component, sequences opened."""
    if not isinstance(component, dict):
        return set()
    found = {component.get("type", "")}
    for key in ("decoders", "pretokenizers"):
        for inner in component.get(key, []):
            found |= _component_types(inner)
    return found


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else 256, 257, ... in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(printable))
    return table


def _byte_level_bytes(piece: str, table: dict[str, int]) -> bytes:
    if all(char in table for char in piece):
        return bytes(table[char] for char in piece)
    return piece.encode()  # an added token, written out


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
