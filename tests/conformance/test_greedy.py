"""Cases 1 to 8: greedy generation, alone, beside others, and as a stream."""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING, Any

from .asking import ALPHABET, EVEN_NUMBERS, ids_of, long_requests, together, tokens_of

if TYPE_CHECKING:
    from textgen_client import Client, Generation

    from ..running_server import RunningServer


def test_case_01_greedy_ten_tokens_with_details(client: Client) -> None:
    """Ten tokens unless EOS; finish_reason length; as many token records as generated_tokens; no seed."""
    answer = client.generate(ALPHABET, max_new_tokens=10, details=True)
    assert answer.text == " E, F, G, H, I,"
    assert answer.details is not None
    assert answer.details["finish_reason"] == answer.finish_reason == "length"
    assert len(answer.details["tokens"]) == answer.details["generated_tokens"] == answer.num_output_tokens == 10
    assert answer.details["seed"] is None
    for token in answer.details["tokens"]:
        assert set(token) == {"id", "text", "logprob", "special"}
        assert token["logprob"] < 0 and token["special"] is False


def test_case_02_same_request_twice(client: Client, solo: Generation) -> None:
    """Identical text and ids on an idle server."""
    again = client.generate(ALPHABET, max_new_tokens=24, details=True)
    assert (again.text, ids_of(again)) == (solo.text, ids_of(solo))


def test_case_03_identical_requests_at_once(client: Client, solo: Generation) -> None:
    """4, then 32 identical greedy requests at once: all equal #2."""
    for count in (4, 32):
        answers = together(*[lambda: client.generate(ALPHABET, max_new_tokens=8, details=True)] * count)
        assert [ids_of(answer) for answer in answers] == [ids_of(solo)[:8]] * count
        assert {answer.text for answer in answers} == {" E, F, G, H,"}


def test_case_04_greedy_beside_sixteen_long_ones(server: RunningServer, client: Client, solo: Generation) -> None:
    """The same ids alone and while 16 different long requests run."""
    with long_requests(client, 16):
        beside = client.generate(ALPHABET, max_new_tokens=16, details=True)
        assert server.metric("tgi_batch_current_size") >= 16
    assert ids_of(beside) == ids_of(solo)[:16]


def test_case_05_stream_equals_whole(client: Client, solo: Generation) -> None:
    """Same ids and text streamed or not; the final response alone says how it ended.

    Difference: a response carries new text, not an index and, at the end, the whole text.
    """
    chunks = list(client.stream(ALPHABET, max_new_tokens=24, details=True, return_num_output_tokens=True))
    assert "".join(chunk.text for chunk in chunks) == solo.text
    tokens = tokens_of(chunks)
    assert solo.details is not None
    assert [token["id"] for token in tokens] == ids_of(solo)
    assert [token["text"] for token in tokens] == [token["text"] for token in solo.details["tokens"]]
    assert sum(chunk.num_output_tokens or 0 for chunk in chunks) == 24
    assert [chunk.is_final for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for chunk in chunks[:-1]:
        assert chunk.finish_reason is None
        assert chunk.details is not None and set(chunk.details) == {"tokens"}
    last = chunks[-1].details
    assert last is not None
    assert (last["finish_reason"], last["generated_tokens"], last["input_length"]) == ("length", 24, 11)


def test_case_06_characters_of_several_tokens(client: Client) -> None:
    """Streamed token texts, special tokens left out, joined are the text; no broken character on the way."""

    def check(prompt: str, length: int, expected: str) -> None:
        whole = client.generate(prompt, max_new_tokens=length)
        chunks = list(client.stream(prompt, max_new_tokens=length, details=True))
        assert whole.text.startswith(expected)
        assert "".join(chunk.text for chunk in chunks) == whole.text
        tokens = tokens_of(chunks)
        assert "".join(token["text"] for token in tokens if not token["special"]) == whole.text
        assert len(tokens) == length > len(whole.text.split()), "some characters take several tokens"
        for text in [chunk.text for chunk in chunks] + [token["text"] for token in tokens]:
            assert "\N{REPLACEMENT CHARACTER}" not in text

    together(
        lambda: check("日本語 中文 日本語 中文 日本語 中文 日本語", 13, " 中文 日本語 中文"),
        lambda: check("😀 😃 😄 😁 😀 😃 😄 😁 😀 😃 😄", 12, " 😊 😊 😊 😊 😊 😊"),
    )


def test_case_07_return_full_text(client: Client) -> None:
    """The output starts with exactly the prompt, odd spaces included; streamed too."""
    odd = "  The  alphabet:\tA, B, C, D,"
    full = client.generate(odd, max_new_tokens=4, return_full_text=True)
    assert full.text == odd + client.generate(odd, max_new_tokens=4).text
    chunks = list(client.stream(ALPHABET, max_new_tokens=8, return_full_text=True))
    assert "".join(chunk.text for chunk in chunks) == ALPHABET + " E, F, G, H,"


def open_url(server: RunningServer, route: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"{server.http_url}/v2/models/textgen/{route}", json.dumps(body).encode())
    return urllib.request.urlopen(request, timeout=120)


def test_case_08_generate_and_its_stream_over_http(server: RunningServer) -> None:
    """One object, or server-sent events with `stream`.

    Difference: TGI's POST / answers with an array of one object; the routes here are Triton's.
    """
    body: dict[str, Any] = {"text_input": EVEN_NUMBERS, "max_new_tokens": 7}
    with open_url(server, "generate", body) as response:
        whole = json.loads(response.read())
    assert whole["text_output"] == " 10, 12"
    with open_url(server, "generate_stream", {**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.decode() for line in response if line.strip()]
    assert all(line.startswith("data:") for line in lines)
    events = [json.loads(line.removeprefix("data:")) for line in lines]
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    assert len(events) > 1
