"""Cases 22 to 25: stop strings anywhere in the text, and the model's own end.

Difference: the stop string is stripped unless include_stop_str_in_output is set; TGI leaves it in the text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .asking import ALPHABET, QUESTION, together

if TYPE_CHECKING:
    from textgen_client import Chunk, Client

FRANCE = "The capital of France is"  # " Paris." follows


def stopped(
    client: Client, prompt: str, stop: str | list[str], **parameters: Any
) -> tuple[str, str | None, int | None]:
    """Text, finish reason and number of tokens, which are the same whole and streamed."""
    asked = {"stop": stop, "max_new_tokens": 24, **parameters}
    chunks: list[Chunk] = []
    answer, _ = together(
        lambda: client.generate(prompt, **asked), lambda: chunks.extend(client.stream(prompt, **asked))
    )
    assert answer is not None
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert chunks[-1].finish_reason == answer.finish_reason
    return answer.text, answer.finish_reason, answer.num_output_tokens


def test_case_22_stop_at_a_word(client: Client) -> None:
    """The output ends at the word; finish_reason stop_sequence; the word itself only on request."""
    assert stopped(client, ALPHABET, " H") == (" E, F, G,", "stop_sequence", 7)
    assert stopped(client, ALPHABET, " H", include_stop_str_in_output=True) == (" E, F, G, H", "stop_sequence", 7)
    assert stopped(client, ALPHABET, ["never", " Z", " H", " G"]) == (" E, F,", "stop_sequence", 5)


def test_case_23_stop_across_and_inside_tokens(client: Client) -> None:
    """A stop string over two tokens; one that ends, or lies, inside a token. TGI misses these two."""
    assert stopped(client, ALPHABET, ", G") == (" E, F", "stop_sequence", 5)
    assert stopped(client, ALPHABET, ", G", include_stop_str_in_output=True)[0] == " E, F, G"
    assert stopped(client, FRANCE, " Par") == ("", "stop_sequence", 1)
    assert stopped(client, FRANCE, "ari") == (" P", "stop_sequence", 1)
    # What the token holds after the stop string is cut off in either form.
    assert stopped(client, FRANCE, "ari", include_stop_str_in_output=True) == (" Pari", "stop_sequence", 1)
    # One that begins inside a token and ends inside a later one.
    assert stopped(client, FRANCE, "is.\n") == (" Par", "stop_sequence", 3)


def test_case_24_stop_is_literal(client: Client) -> None:
    """Characters that mean something in a regular expression mean themselves."""
    for patterns in ([". G", "[A-Z], H", "(H|I)", "F.*"], [" G$", "^ E", "\\w", "I?"]):
        assert stopped(client, ALPHABET, patterns, max_new_tokens=12) == (" E, F, G, H, I, J,", "length", 12)
    code = "x = [1, 2, 3]\ny = [4, 5, 6]\nz = ["  # "7, 8, 9]" follows
    assert stopped(client, code, "9]", max_new_tokens=12) == ("7, 8, ", "stop_sequence", 8)
    algebra = "f(x) = (a+b)*c\nf(x) = (a+b)*c\nf(x) = (a+b)*c\nf(x) ="
    assert stopped(client, algebra, "+b)*", max_new_tokens=12)[:2] == (" (a", "stop_sequence")


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
