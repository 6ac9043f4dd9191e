"""The prompts that every engine gets, as token ids: real English of three lengths, the same on every machine."""

from __future__ import annotations

import itertools
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

# Tokens of each class; the order below gives every eight prompts the same mix.
_LENGTHS = {
    "short": (32, 24, 36, 28, 40, 32, 30, 34, 26, 38, 32, 32),
    "medium": (256, 192, 320, 240, 272, 224, 288, 256, 208, 304, 248, 264),
    "long": (1024, 896, 1152, 960, 1088, 1024, 992, 1056),
}
_MIX = ("short", "medium", "short", "medium", "short", "medium", "long", "long")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its class of length and its token ids."""

    number: int
    kind: str
    ids: list[int]


def make_prompts(tokenizer_folder: Path) -> list[Prompt]:
    """32 prompts cut from Python's own language reference, which every interpreter carries; no two overlap."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    topics = pydoc_data.topics.topics
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    lengths = {kind: iter(values) for kind, values in _LENGTHS.items()}
    prompts = []
    start = 0
    for number, kind in enumerate(itertools.chain.from_iterable(itertools.repeat(_MIX, 4))):
        length = next(lengths[kind])
        prompts.append(Prompt(number, kind, ids[start : start + length]))
        start += length
    assert start <= len(ids), "the language reference is shorter than the prompts"
    return prompts


def prompts_of(concurrency: int, prompts: list[Prompt]) -> list[Prompt]:
    """How many of them one run at this concurrency sends: 8 for one stream, 16 up to eight, else all."""
    return prompts[: 8 if concurrency == 1 else 16 if concurrency <= 8 else len(prompts)]
