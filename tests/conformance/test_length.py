"""Case 55: texts longer than 1024 tokens, where TGI queues a request anew and loses count, seed, grammar and stop."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .asking import ids_of, together, tokens_of

if TYPE_CHECKING:
    from textgen_client import Client

PROMPT = "a stream of tokens becomes"
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 55, "ignore_eos_token": True, "details": True}


def test_case_55_long_outputs(tiny_client: Client) -> None:
    """1500 and 3000 tokens: exactly so many, and the shorter text is the longer one's beginning, seed and all.

    Across token 1024 a grammar goes on and a stop string is found.
    """
    digits = {"type": "regex", "value": "[0-9]{1200}"}
    shorter, longer, number, greedy = together(
        lambda: tiny_client.generate(PROMPT, max_new_tokens=1500, **SAMPLED),
        lambda: tiny_client.generate(PROMPT, max_new_tokens=3000, **SAMPLED),
        lambda: tiny_client.generate(PROMPT, max_new_tokens=3000, temperature=1.0, seed=1, grammar=digits),
        lambda: tiny_client.generate(PROMPT, max_new_tokens=1500, ignore_eos_token=True, details=True),
    )
    for answer, count in ((shorter, 1500), (longer, 3000), (greedy, 1500)):
        assert len(ids_of(answer)) == answer.num_output_tokens == count
        assert answer.finish_reason == "length"
    assert ids_of(longer)[:1500] == ids_of(shorter)
    assert ids_of(longer)[1024:1100] != ids_of(longer)[:76], "a seed that starts over would repeat itself"

    assert re.fullmatch("[0-9]{1200}", number.text) and number.finish_reason == "eos_token"
    assert number.num_output_tokens is not None and number.num_output_tokens > 1024

    # A stop string that lies across the border, and appears there first.
    tokens = longer.details["tokens"] if longer.details is not None else []
    before = "".join(token["text"] for token in tokens[:1024])
    stop = next(
        found
        for width in range(4, 40)
        if longer.text.find(found := longer.text[len(before) - width : len(before) + width]) == len(before) - width
    )
    chunks = list(tiny_client.stream(PROMPT, max_new_tokens=3000, stop=[stop], **SAMPLED))
    assert chunks[-1].finish_reason == "stop_sequence"
    assert "".join(chunk.text for chunk in chunks) == longer.text[: longer.text.find(stop)]
    assert 1024 < len(tokens_of(chunks)) < 1024 + 2 * 40
