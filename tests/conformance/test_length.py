"""Case 55: texts longer than 1024 tokens, where TGI queues a request anew and loses count, seed, grammar and stop."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .asking import ids_of, together

if TYPE_CHECKING:
    from textgen_client import Client

PROMPT = "a stream of tokens becomes"
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 55, "ignore_eos_token": True}


def test_case_55_long_outputs(tiny_client: Client) -> None:
    """1500 and 3000 tokens: exactly so many, and the shorter text is the longer one's beginning, seed and all.

    Across token 1024 a grammar goes on and a stop string is found.
    """
    digits = {"type": "regex", "value": "[0-9]{1200}"}
    shorter, longer, number = together(
        lambda: tiny_client.generate(PROMPT, max_new_tokens=1500, **SAMPLED),
        lambda: tiny_client.generate(PROMPT, max_new_tokens=3000, details=True, **SAMPLED),
        lambda: tiny_client.generate(PROMPT, max_new_tokens=3000, temperature=1.0, seed=1, grammar=digits),
    )
    for answer, count in ((shorter, 1500), (longer, 3000)):
        assert (answer.num_output_tokens, answer.finish_reason) == (count, "length")
    # The last token may be a part of a character, which the shorter text shows as broken.
    assert longer.text.startswith(shorter.text.rstrip("\N{REPLACEMENT CHARACTER}"))
    ids = ids_of(longer)
    assert len(ids) == 3000
    assert ids[1024:1100] != ids[:76], "a seed that starts over would repeat itself"

    assert re.fullmatch("[0-9]{1200}", number.text) and number.finish_reason == "eos_token"
    assert number.num_output_tokens is not None and number.num_output_tokens > 1024

    # A stop string that lies across the border, and appears there first.
    assert longer.details is not None
    border = len("".join(token["text"] for token in longer.details["tokens"][:1024]))
    stop = next(
        found
        for width in range(4, 40)
        if longer.text.find(found := longer.text[border - width : border + width]) == border - width
    )
    stopped = tiny_client.generate(PROMPT, max_new_tokens=3000, stop=[stop], **SAMPLED)
    assert (stopped.text, stopped.finish_reason) == (longer.text[: longer.text.find(stop)], "stop_sequence")
    assert stopped.num_output_tokens is not None and 1024 < stopped.num_output_tokens < 1024 + 2 * 40
