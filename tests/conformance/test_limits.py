"""Cases 13 to 18: what is refused, with the limit and the given value in the text; neighbours do not notice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .asking import ALPHABET, assert_refused, ids_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from textgen_client import Client, Generation


@pytest.fixture(scope="module", autouse=True)
def _neighbour(client: Client, solo: Generation) -> Iterator[None]:
    """A request that runs while all these are refused, and must equal #2 in the end."""
    stream = client.stream(ALPHABET, max_new_tokens=24, details=True)
    ids = [token["id"] for token in (next(stream).details or {})["tokens"]]
    yield
    ids += [token["id"] for chunk in stream for token in (chunk.details or {})["tokens"]]
    assert ids == ids_of(solo)


def test_case_13_best_of_refused(client: Client) -> None:
    """best_of 2 without sampling, with a seed, on a stream, and above max_best_of."""
    assert_refused(client, "`best_of`", "do_sample", best_of=2)
    assert_refused(client, "`best_of`", "`seed`", 7, best_of=2, do_sample=True, seed=7)
    assert_refused(client, "`best_of`", "max_best_of", 2, "given: 3", best_of=3, do_sample=True)
    assert_refused(client, "`best_of`", "stream", "given: 2", stream=True, best_of=2, do_sample=True)
    # Difference: TGI takes 0 for 1 where it does not stream.
    assert_refused(client, "`best_of`", "given: 0", best_of=0)


@pytest.mark.parametrize("value", [0, -1])
def test_case_14_temperature_refused(client: Client, value: float) -> None:
    """0 and below."""
    assert_refused(client, "`temperature`", "above 0", f"given: {value}", temperature=value)


def test_case_15_filters_refused(client: Client, solo: Generation) -> None:
    """top_p 0, -1; typical_p 0; top_k 0, -1. Difference: top_p and typical_p of 1.0 mean off, and are taken."""
    for name, values in (("top_p", (0, -1, 1.1)), ("typical_p", (0, -1, 1.1)), ("top_k", (0, -1))):
        for value in values:
            assert_refused(client, f"`{name}`", f"given: {value}", **{name: value})
    off = client.generate(ALPHABET, max_new_tokens=4, details=True, top_p=1.0, typical_p=1.0)
    assert ids_of(off) == ids_of(solo)[:4]


def test_case_16_penalties_refused(client: Client) -> None:
    """repetition_penalty 0; frequency_penalty outside -2 to 2."""
    assert_refused(client, "`repetition_penalty`", "above 0", "given: 0", repetition_penalty=0)
    assert_refused(client, "`frequency_penalty`", "-2 and 2", "given: 2.1", frequency_penalty=2.1)
    assert_refused(client, "`frequency_penalty`", "given: -2.1", frequency_penalty=-2.1)


def test_case_17_counts_refused(client: Client) -> None:
    """max_new_tokens 0; no text; five stop strings; top_n_tokens 6; truncate 0 and above max_input_tokens."""
    assert_refused(client, "`max_new_tokens`", "1 and", "given: 0", max_new_tokens=0)
    assert_refused(client, "empty", prompt="")
    assert_refused(client, "`stop`", "4 (max_stop_sequences)", "given: 5", stop=["a", "b", "c", "d", "e"])
    assert_refused(client, "`top_n_tokens`", "5 (max_top_n_tokens)", "given: 6", top_n_tokens=6)
    assert_refused(client, "`truncate`", "1 and", "given: 0", truncate=0)
    assert_refused(client, "`truncate`", "960 (max_input_tokens)", "given: 961", truncate=961)


def test_case_18_too_long(client: Client) -> None:
    """A prompt above max_input_tokens; prompt and new tokens above max_total_tokens.

    Difference: TGI checks max_new_tokens above 1024 as if they were 1024, and takes the last of these.
    """
    assert_refused(client, 960, 1001, prompt="word" + " word" * 1000)
    assert_refused(client, "1024 (MAX_TOTAL_TOKENS)", "11 tokens", "`max_new_tokens` is 1014", max_new_tokens=1014)
    assert_refused(client, "1024 (MAX_TOTAL_TOKENS)", "is 100000", max_new_tokens=100_000)
