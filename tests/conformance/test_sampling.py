"""Cases 9 to 12, 26 and 27: seeds, candidates, and penalties that leave the neighbours alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from .asking import ALPHABET, coming_and_going, ids_of, together, tokens_of

if TYPE_CHECKING:
    from textgen_client import Client, Generation

OPENING = "My favourite day of the year began when"
SEEDED: dict[str, Any] = {"temperature": 0.7, "seed": 42, "max_new_tokens": 16, "details": True}


@pytest.fixture(scope="module")
def seeded(client: Client) -> Generation:
    """SEEDED on an idle server."""
    return client.generate(OPENING, **SEEDED)


def seed_of(answer: Generation) -> int:
    assert answer.details is not None
    seed: int = answer.details["seed"]
    return seed


def mean_logprob(details: dict[str, Any]) -> float:
    logprobs = [token["logprob"] for token in details["tokens"]]
    return float(sum(logprobs)) / len(logprobs)


def test_case_09_seed_repeats(client: Client, seeded: Generation) -> None:
    """Seed 42 at temperature 0.7, twice: identical, and reported; another seed gives another text."""
    again = client.generate(OPENING, **SEEDED)
    assert (again.text, ids_of(again)) == (seeded.text, ids_of(seeded))
    assert seed_of(again) == seed_of(seeded) == 42
    assert client.generate(OPENING, **SEEDED | {"seed": 43}).text != seeded.text


def test_case_10_seed_under_load(client: Client, seeded: Generation) -> None:
    """The same ids while other requests join and leave the batch. Difference: TGI starts the seed over and fails."""
    with coming_and_going(client, 5):
        beside, streamed = together(
            lambda: ids_of(client.generate(OPENING, **SEEDED)),
            lambda: [token["id"] for token in tokens_of(list(client.stream(OPENING, **SEEDED)))],
        )
    assert beside == streamed == ids_of(seeded)


def test_case_11_seed_drawn_and_reported(client: Client) -> None:
    """Sampling without a seed reports the one it drew, an unsigned 64-bit integer, which gives the same text again."""
    asked = {"do_sample": True, "max_new_tokens": 12, "details": True}
    drawn, another = together(*[lambda: client.generate(OPENING, **asked)] * 2)
    seed = seed_of(drawn)
    assert isinstance(seed, int) and 0 <= seed < 2**64
    assert seed_of(another) != seed
    again = client.generate(OPENING, seed=seed, **asked)
    assert (again.text, ids_of(again), seed_of(again)) == (drawn.text, ids_of(drawn), seed)


def test_case_12_best_of(client: Client) -> None:
    """The better of two by mean log-probability; the other one in best_of_sequences, with a seed of its own."""
    best = client.generate(OPENING, best_of=2, do_sample=True, max_new_tokens=12, details=True)
    assert len(best.choices) == 1 and best.details is not None
    (other,) = best.details["best_of_sequences"]
    assert set(other) >= {"generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"}
    assert other["generated_tokens"] == len(other["tokens"]) == 12
    assert mean_logprob(best.details) >= mean_logprob(other)
    assert other["generated_text"] != best.text and other["seed"] != seed_of(best)
    # Each seed alone repeats its text.
    for seed, text in ((seed_of(best), best.text), (other["seed"], other["generated_text"])):
        assert client.generate(OPENING, do_sample=True, seed=seed, max_new_tokens=12).text == text


def penalized_beside_default(client: Client, **penalty: float) -> tuple[list[int], list[int]]:
    """Ids of a request with the penalty, and of a default one that starts and ends while the first runs."""
    with client.stream(ALPHABET, max_new_tokens=20, details=True, ignore_eos_token=True, **penalty) as penalized:
        chunks = [next(penalized)]
        beside = client.generate(ALPHABET, max_new_tokens=12, details=True)
        chunks += list(penalized)
    return [token["id"] for token in tokens_of(chunks)], ids_of(beside)


def test_case_26_repetition_penalty(client: Client, solo: Generation) -> None:
    """1.2 changes the greedy text, 1.0 does not; a default request in the same batch equals #2."""
    penalized, beside = penalized_beside_default(client, repetition_penalty=1.2)
    assert penalized[:12] != ids_of(solo)[:12] == beside
    assert ids_of(client.generate(ALPHABET, max_new_tokens=12, details=True, repetition_penalty=1.0)) == beside


def test_case_27_frequency_penalty(client: Client, solo: Generation) -> None:
    """1.5 beside a default request: the default one equals #2. (And TGI's formula is not ours: output tokens only.)"""
    penalized, beside = penalized_beside_default(client, frequency_penalty=1.5)
    assert penalized[:12] != ids_of(solo)[:12] == beside
    # " E" has never been generated when it is chosen, however often the prompt held it: only the output counts.
    assert penalized[0] == beside[0]
