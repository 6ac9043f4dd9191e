"""Case 55: texts longer than 1024 tokens, where TGI queues a request anew and loses count, seed, grammar and stop."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .asking import ids_of

if TYPE_CHECKING:
    from textgen_client import Client, Generation

PROMPT = "a stream of tokens becomes"
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 55, "ignore_eos_token": True}


def test_case_55_long_outputs(tiny_client: Client) -> None:
    """1500 and 3000 tokens: exactly so many, and the shorter text is the longer one's beginning, seed and all.

    Across token 1024 a grammar goes on and a stop string is found.
    """
    digits = {"type": "regex", "value": "[0-9]{1200}"}
    with ThreadPoolExecutor(3) as threads:
        longer = threads.submit(tiny_client.generate, PROMPT, max_new_tokens=3000, **SAMPLED)
        number = threads.submit(
            tiny_client.generate, PROMPT, max_new_tokens=3000, seed=1, do_sample=True, grammar=digits
        )
        shorter = tiny_client.generate(PROMPT, max_new_tokens=1500, details=True, **SAMPLED)
        stop = stop_across_token(shorter, 1024)
        stopped = tiny_client.generate(PROMPT, max_new_tokens=3000, stop=[stop], **SAMPLED)

    for answer, count in ((shorter, 1500), (longer.result(), 3000)):
        assert (answer.num_output_tokens, answer.finish_reason) == (count, "length")
    # The last token may be a part of a character, which the shorter text shows as broken.
    assert longer.result().text.startswith(shorter.text.rstrip("\N{REPLACEMENT CHARACTER}"))
    ids = ids_of(shorter)
    assert len(ids) == 1500
    assert ids[1024:1100] != ids[:76], "a seed that starts over would repeat itself"

    assert re.fullmatch("[0-9]{1200}", number.result().text) and number.result().finish_reason == "eos_token"
    assert (number.result().num_output_tokens or 0) > 1024

    assert (stopped.text, stopped.finish_reason) == (shorter.text[: shorter.text.find(stop)], "stop_sequence")
    assert 1024 < (stopped.num_output_tokens or 0) < 1024 + 2 * 40


def stop_across_token(answer: Generation, position: int) -> str:
    """A piece of the text that lies across the border before token `position`, and appears there first."""
    assert answer.details is not None
    border = len("".join(token["text"] for token in answer.details["tokens"][:position]))
    for width in range(4, 40):
        piece = answer.text[border - width : border + width]
        if answer.text.find(piece) == border - width:
            return piece
    raise AssertionError("the text repeats itself too much to choose a stop string")
