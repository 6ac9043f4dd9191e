"""Cases 22 to 25: stop strings anywhere in the text, and the model's own end.

Difference: the stop string is stripped unless include_stop_str_in_output is set; TGI leaves it in the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .asking import ALPHABET, QUESTION, together

if TYPE_CHECKING:
    from textgen_client import Client

FRANCE = "The capital of France is"  # " Paris." follows


@dataclass(frozen=True)
class Stop:
    """A prompt, the stop strings, and the text and the number of tokens that must come of them."""

    prompt: str
    stop: str | list[str]
    text: str
    tokens: int
    reason: str = "stop_sequence"
    included: bool = False


def assert_stops(client: Client, *cases: Stop) -> None:
    """All of them at once, each whole and as a stream."""

    def ask(case: Stop) -> None:
        asked = {"stop": case.stop, "max_new_tokens": 12, "include_stop_str_in_output": case.included}
        answer = client.generate(case.prompt, **asked)
        assert (answer.text, answer.finish_reason, answer.num_output_tokens) == (case.text, case.reason, case.tokens)
        chunks = list(client.stream(case.prompt, **asked))
        assert "".join(chunk.text for chunk in chunks) == case.text
        assert chunks[-1].finish_reason == case.reason

    together(*(partial(ask, case) for case in cases))


def test_case_22_stop_at_a_word(client: Client) -> None:
    """The output ends at the word; finish_reason stop_sequence; the word itself only on request."""
    assert_stops(
        client,
        Stop(ALPHABET, " H", " E, F, G,", 7),
        Stop(ALPHABET, " H", " E, F, G, H", 7, included=True),
        Stop(ALPHABET, ["never", " Z", " H", " G"], " E, F,", 5),
    )


def test_case_23_stop_across_and_inside_tokens(client: Client) -> None:
    """A stop string over two tokens; one that ends, or lies, inside a token. TGI misses these two."""
    assert_stops(
        client,
        Stop(ALPHABET, ", G", " E, F", 5),
        Stop(ALPHABET, ", G", " E, F, G", 5, included=True),
        Stop(FRANCE, " Par", "", 1),
        Stop(FRANCE, "ari", " P", 1),
        # What the token holds after the stop string is cut off in either form.
        Stop(FRANCE, "ari", " Pari", 1, included=True),
        # One that begins inside a token and ends inside a later one.
        Stop(FRANCE, "is.\n", " Par", 3),
    )


def test_case_24_stop_is_literal(client: Client) -> None:
    """Characters that mean something in a regular expression mean themselves."""
    letters = " E, F, G, H, I, J,"
    list_ = "x = [1, 2, 3]\ny = [4, 5, 6]\nz = ["  # "7, 8, 9]" follows
    algebra = "f(x) = (a+b)*c\nf(x) = (a+b)*c\nf(x) = (a+b)*c\nf(x) ="
    assert_stops(
        client,
        Stop(ALPHABET, [". G", "[A-Z], H", "(H|I)", "F.*"], letters, 12, reason="length"),
        Stop(ALPHABET, [" G$", "^ E", "\\w", "I?"], letters, 12, reason="length"),
        Stop(list_, "9]", "7, 8, ", 8),
        Stop(algebra, "+b)*", " (a", 5),
    )


def test_case_25_end_of_sequence(client: Client) -> None:
    """finish_reason eos_token; the EOS token's record is special; its text is nowhere in the output."""
    answer = client.generate(messages=QUESTION, max_new_tokens=40, details=True)
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "eos_token")
    assert answer.details is not None
    *tokens, end = answer.details["tokens"]
    assert (end["special"], end["text"]) == (True, "<|im_end|>")
    assert not any(token["special"] for token in tokens)
    assert answer.details["generated_tokens"] == len(tokens) + 1
    for skip in (True, False):
        chunks = list(client.stream(messages=QUESTION, max_new_tokens=40, skip_special_tokens=skip))
        assert "".join(chunk.text for chunk in chunks) == answer.text
        assert chunks[-1].finish_reason == "eos_token"
