"""Cases 19 to 21: the prompt's tokens, and the most likely tokens at each place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .asking import ALPHABET, assert_refused, ids_of

if TYPE_CHECKING:
    from textgen_client import Client, Generation

PROSE = "When the rain had stopped, the two brothers went down to the river to look at the boats."


def test_case_19_truncate(client: Client) -> None:
    """truncate 5 keeps the last five tokens of the prompt, and the model sees nothing else.

    Nothing is put in front of them: this tokenizer adds no first token, and would add it before it truncates.
    """
    whole = client.generate(PROSE, max_new_tokens=1, decoder_input_details=True).details
    cut = client.generate(PROSE, max_new_tokens=8, decoder_input_details=True, truncate=5)
    assert whole is not None and cut.details is not None
    last_ids = [token["id"] for token in whole["prefill"][-5:]]
    assert [token["id"] for token in cut.details["prefill"]] == last_ids
    assert "".join(token["text"] for token in cut.details["prefill"]) == " look at the boats."
    assert cut.num_input_tokens == cut.details["input_length"] == 5
    alone = client.generate(input_ids=last_ids, max_new_tokens=8, details=True)
    assert ids_of(alone) == ids_of(cut)


def test_case_20_decoder_input_details(client: Client) -> None:
    """As many prefill records as prompt tokens, the first without a log-probability; refused on a stream."""
    answer = client.generate(PROSE, max_new_tokens=2, decoder_input_details=True)
    assert answer.details is not None
    prefill = answer.details["prefill"]
    assert len(prefill) == answer.num_input_tokens
    assert all(set(token) == {"id", "text", "logprob"} for token in prefill)
    assert prefill[0]["logprob"] is None
    assert all(token["logprob"] <= 0 for token in prefill[1:])
    assert "".join(token["text"] for token in prefill) == PROSE
    # Not asked for: an empty list, and `details` alone does not compute it.
    only = client.generate(PROSE, max_new_tokens=2, details=True)
    assert only.details is not None and only.details["prefill"] == []
    assert_refused(client, "`decoder_input_details`", "stream", stream=True, decoder_input_details=True)


def test_case_21_top_n_tokens(client: Client, solo: Generation) -> None:
    """Three entries at each place, sorted, the greedy token first. Difference: never more than three, at a tie."""
    answer = client.generate(ALPHABET, max_new_tokens=12, details=True, top_n_tokens=3)
    assert answer.details is not None and solo.details is not None
    tokens, top_tokens = answer.details["tokens"], answer.details["top_tokens"]
    assert len(top_tokens) == len(tokens) == 12
    for token, top in zip(tokens, top_tokens, strict=True):
        assert len(top) == 3
        assert [entry["logprob"] for entry in top] == sorted((entry["logprob"] for entry in top), reverse=True)
        assert top[0] == token
        assert len({entry["id"] for entry in top}) == 3
    assert ids_of(answer) == ids_of(solo)[:12]
    assert "top_tokens" not in solo.details
