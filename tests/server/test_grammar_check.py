"""Grammar checks, forced tokens and the watermark on a real server with the demonstration model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from textgen_client import AsyncClient, Client, ValidationError, detect_watermark

from ..running_server import RunningServer
from .test_client import _textgen

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json", "value": PERSON}


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=120) as client:
        yield client


def test_supported_and_not(client: Client) -> None:
    found = client.check_grammar(SCHEMA)
    assert (found.supported, found.backend, found.accepted) == (True, "llguidance", None)
    for bad, named in (
        ({"type": "regex", "value": "(a"}, "regex"),
        ({"type": "json", "value": '{"type": '}, "JSON"),
        ({"type": "json", "value": {"type": "text"}}, "text"),
        ({"type": "regex", "value": "a", "backend": "lmfe"}, "lmfe"),
        ({"type": "lark", "value": "nonsense"}, "lark"),
    ):
        found = client.check_grammar(bad, "a")
        if bad.get("backend") == "lmfe" and found.supported:
            continue  # this server has it
        assert not found.supported
        assert found.error is not None and named in found.error
        assert not found.error.startswith("Input validation error"), "the reason alone"
        assert found.accepted is None


def test_texts(client: Client) -> None:
    for text in ('{"name": "Ada", "age": 36}', '{"name":"日本 😀","age":0}'):
        found = client.check_grammar(SCHEMA, text)
        assert (found.accepted, found.accepted_prefix, found.reason) == (True, len(text), None)
    found = client.check_grammar(SCHEMA, '{"name": "日本", "age": -1}')
    assert (found.accepted, found.accepted_prefix) == (False, 22)
    assert found.reason == "'-' at character 22 is not allowed there"
    tool = {"type": "function", "function": {"name": "person", "parameters": PERSON}}
    assert client.check_grammar(None, "x", tools=[tool], tool_choice="required").accepted is False
    asked = AsyncClient(client.url, timeout=120)

    async def ask() -> tuple[Any, list[int]]:
        async with asked:
            return await asked.check_grammar(SCHEMA, "[]"), await asked.tokenize("Hello world")

    found, ids = asyncio.run(ask())
    assert (found.accepted, found.accepted_prefix) == (False, 0)
    assert ids == client.tokenize("Hello world")


def test_what_was_generated_is_accepted(client: Client) -> None:
    answer = client.generate("Ada Lovelace as JSON: ", grammar=SCHEMA, max_new_tokens=120, temperature=1.0, seed=4)
    found = client.check_grammar(SCHEMA, answer.text)
    assert found.accepted_prefix == len(answer.text)
    assert found.accepted is (answer.finish_reason == "eos_token")


def test_a_long_text(client: Client) -> None:
    text = "ab 日" * (65_536 // 6)
    found = client.check_grammar({"type": "regex", "value": "[ab 日]*"}, text)
    assert (found.accepted, found.accepted_prefix) == (True, len(text))
    with pytest.raises(ValidationError, match="max_checked_bytes"):
        client.check_grammar(SCHEMA, "a" * 65_537)


def test_wrong_requests(client: Client) -> None:
    for parameters, named in (
        ({"prompt": "a", "grammar": SCHEMA, "grammar_check": True}, "takes no prompt; given: text_input"),
        ({"prompt": "a", "grammar_check": {"text": 1}}, "grammar_check"),
    ):
        with pytest.raises(ValidationError, match=named):
            client.generate(**parameters)  # type: ignore[arg-type]
    for grammar in (None, {"type": "text"}):
        with pytest.raises(ValidationError, match="needs a grammar"):
            client.check_grammar(grammar, "a")
    with pytest.raises(ValidationError, match=r"grammar\.type"):
        client.check_grammar({"type": "nonesuch", "value": "a"})


def test_command(server: RunningServer, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(PERSON))
    said = _textgen(server, "validate", "--schema", str(schema), "--text", '{"name": "A", "age": 1}')
    assert (said.returncode, said.stdout, said.stderr) == (0, "accepted\n", "")
    said = _textgen(server, "validate", "--regex", "[0-9]+", "--text", "12x")
    assert (said.returncode, said.stdout) == (1, "not accepted: 'x' at character 2 is not allowed there\n")
    assert _textgen(server, "validate", "--regex", "(?<=a)b", "--text", "b").returncode == 2


def test_forced_tokens_are_published(server: RunningServer, client: Client) -> None:
    before = {name: server.metric(name) for name in ("tgi_jump_forward_tokens", "tgi_generated_tokens")}
    grammar = {"type": "choice", "value": ["The quick brown fox jumps over the lazy dog."]}
    answer = client.generate("Say it: ", grammar=grammar, max_new_tokens=40)
    assert answer.text == "The quick brown fox jumps over the lazy dog."
    assert answer.num_output_tokens is not None and answer.num_output_tokens > 5
    until_s = time.monotonic() + 10  # metrics follow a few times a second
    while server.metric("tgi_generated_tokens") < before["tgi_generated_tokens"] + answer.num_output_tokens:
        assert time.monotonic() < until_s, "the tokens were never counted"
        time.sleep(0.05)
    num_forced = server.metric("tgi_jump_forward_tokens") - before["tgi_jump_forward_tokens"]
    assert answer.num_output_tokens - 2 <= num_forced <= answer.num_output_tokens


def test_the_watermark_is_found_in_the_text(server: RunningServer, client: Client) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 120, "ignore_eos_token": True, "temperature": 1.0, "seed": 5}
    with ThreadPoolExecutor(2) as threads:
        answers = threads.map(lambda on: client.generate("Once upon a time", watermark=on, **asked), (True, False))
        texts = dict(zip((True, False), (answer.text for answer in answers), strict=True))
    assert detect_watermark(client.tokenize(texts[True])).z_score > 4
    assert abs(detect_watermark(client.tokenize(texts[False])).z_score) < 4
    assert "\nwatermark found\n" in _textgen(server, "detect-watermark", texts[True]).stdout
    assert "\nno watermark found\n" in _textgen(server, "detect-watermark", texts[False]).stdout
