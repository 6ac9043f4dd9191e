"""Cases 28 to 36 and 38: output that obeys a regex, a schema or a list of tools, and what is refused.

Differences: any JSON Schema is taken, recursive ones and those without `properties` included; a schema's objects are
open unless it closes them with additionalProperties; a bad regex is refused before it is queued (TGI fails the whole
batch); the text of a tool call is the object {"name", "arguments"}.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from textgen_client import Client, Generation, ToolError, ValidationError

from .asking import ALPHABET, assert_refused, error_of, ids_of, together, tokens_of

IPV4 = r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"
ASK_ADDRESS = [{"role": "user", "content": "What is the IP address of Google's public DNS server?"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "firstName": {"type": "string", "minLength": 4, "maxLength": 16},
        "lastName": {"type": "string", "minLength": 4, "maxLength": 16},
        "hobby": {"type": "string", "minLength": 4, "maxLength": 16},
        "numCats": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["firstName", "lastName", "hobby", "numCats"],
    "additionalProperties": False,
}
ASK_PERSON = [{"role": "user", "content": "David likes trees and maths. He has 2 cats. Describe David as JSON."}]
WORKOUT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "activities": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "kind": {"enum": ["run", "bike", "swim"]},
                    "minutes": {"type": "integer", "minimum": 1, "maximum": 600},
                    "place": {"type": "string", "maxLength": 20},
                },
                "required": ["kind", "minutes"],
                "additionalProperties": False,
            },
        },
        "note": {"type": "string", "maxLength": 20},
    },
    "required": ["name", "activities"],
    "additionalProperties": False,
}
ASK_WORKOUT = [{"role": "user", "content": "Anna went for a 30 minute run and a 45 minute swim. Answer in JSON."}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["location", "unit"],
            "additionalProperties": False,
        },
    },
}
NEWS: dict[str, Any] = {"type": "function", "function": {"name": "get_news"}}
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


def whole_and_streamed(client: Client, **asked: Any) -> Generation:
    """The answer; its stream, running at the same time, must say the same."""
    answer, chunks = together(
        lambda: (client.generate(details=True, **asked), None), lambda: (None, list(client.stream(**asked)))
    )
    assert answer[0] is not None and chunks[1] is not None
    assert "".join(chunk.text for chunk in chunks[1]) == answer[0].text
    assert chunks[1][-1].finish_reason == answer[0].finish_reason
    return answer[0]


def test_case_28_regex(client: Client) -> None:
    """An IPv4 address: a full match, finish_reason eos_token; greedy, and sampled at a high temperature."""
    grammar = {"type": "regex", "value": IPV4}
    for sampling in ({}, {"temperature": 2.0, "seed": 5}):
        answer = whole_and_streamed(client, messages=ASK_ADDRESS, grammar=grammar, max_new_tokens=40, **sampling)
        assert re.fullmatch(IPV4, answer.text), answer.text
        assert answer.finish_reason == "eos_token"


def test_case_29_schema(client: Client) -> None:
    """A person: it parses, every key is there, types and bounds hold; as an object and as its text."""
    for value in (PERSON, json.dumps(PERSON)):
        grammar = {"type": "json", "value": value}
        answer = whole_and_streamed(client, messages=ASK_PERSON, grammar=grammar, max_new_tokens=100)
        person = json.loads(answer.text)
        assert answer.finish_reason == "eos_token"
        assert set(person) == set(PERSON["required"])
        assert all(isinstance(person[key], str) and len(person[key]) >= 4 for key in ("firstName", "lastName", "hobby"))
        assert isinstance(person["numCats"], int) and person["numCats"] >= 0


def test_case_30_nested_schema(client: Client) -> None:
    """An array with minItems 1, an enum, optional fields: jsonschema agrees, sampled as well."""
    grammar = {"type": "json", "value": WORKOUT}
    for sampling in ({}, {"temperature": 1.0, "seed": 11}):
        asked = {"messages": ASK_WORKOUT, "grammar": grammar, "max_new_tokens": 200, **sampling}
        answer = whole_and_streamed(client, **asked)
        workout = json.loads(answer.text)
        jsonschema.validate(workout, WORKOUT)
        assert answer.finish_reason == "eos_token" and len(workout["activities"]) >= 1


def test_case_31_constrained_and_free_at_once(client: Client) -> None:
    """Sixteen of each at once: all constrained ones valid, every free one equal to its solo output."""
    prompts = [f"{ALPHABET[:-3]} {letter}," for letter in "DEFG"]
    alone = {prompt: ids_of(client.generate(prompt, max_new_tokens=12, details=True)) for prompt in prompts}
    code = r"[A-F]{2}-\d{3}(-(north|south))?"

    def free(prompt: str) -> Callable[[], Generation]:
        return lambda: client.generate(prompt, max_new_tokens=12, details=True)

    def constrained(seed: int) -> Callable[[], Generation]:
        grammar = {"type": "regex", "value": code}
        return lambda: client.generate("The code is ", grammar=grammar, max_new_tokens=20, temperature=1.0, seed=seed)

    calls = [call for seed in range(16) for call in (free(prompts[seed % 4]), constrained(seed))]
    answers = together(*calls)
    for index, answer in enumerate(answers[0::2]):
        assert ids_of(answer) == alone[prompts[index % 4]]
    texts = [answer.text for answer in answers[1::2]]
    assert all(re.fullmatch(code, text) for text in texts), texts
    assert len(set(texts)) > 8


def test_case_32_bad_grammars(client: Client, solo: Generation) -> None:
    """Refused with the place or the keyword; the server stays healthy and a running neighbour equals #2.

    Difference: a schema without `properties` is a schema, and is taken.
    """
    with client.stream(ALPHABET, max_new_tokens=24, details=True) as neighbour:
        chunks = [next(neighbour)]
        for grammar, said in (
            ({"type": "json", "value": {"type": "strin"}}, ["'type'", "strin"]),
            ({"type": "json", "value": {"properties": {"a": {"minimum": "x"}}}}, ["minimum"]),
            ({"type": "json", "value": "{not JSON"}, ["JSON", "line 1 column 2"]),
            ({"type": "json", "value": 7}, ["JSON schema", "object or a boolean"]),
            ({"type": "regex", "value": "(unclosed"}, ["regex", "position 0"]),
            ({"type": "regex", "value": "a{3,1}"}, ["regex"]),
            ({"type": "regex"}, ["`grammar.value`"]),
            ({"type": "prose", "value": "x"}, ["`grammar.type`", "prose"]),
            ({"type": "lark", "value": "start: missing_rule"}, ["missing_rule"]),
        ):
            assert_refused(client, *said, grammar=grammar, max_new_tokens=8)
        no_properties = {"type": "json", "value": {"type": "string", "maxLength": 5}}
        assert len(json.loads(client.generate(ALPHABET, grammar=no_properties, max_new_tokens=30).text)) <= 5
        chunks += list(neighbour)
    assert [token["id"] for token in tokens_of(chunks)] == ids_of(solo)
    assert client.health().inference


def test_case_33_many_new_schemas_beside_a_stream(client: Client) -> None:
    """64 schemas never seen before, one after another, beside a running stream: its gaps stay near its usual ones.

    Compiling happens beside the engine's loop, so that a gap holds one step and no compilation. The bound is generous,
    since the machine may be busy: the largest gap is at most 12 of the stream's own median gaps, or half a second.
    """
    arrivals: list[float] = []
    answered = 0
    with client.stream("Once upon a time", max_new_tokens=900, ignore_eos_token=True) as stream:
        for _ in range(4):
            next(stream)

        def ask_all() -> int:
            count = 0
            for number in range(64):
                schema = {
                    "type": "object",
                    "properties": {f"key{number}": {"enum": [number, f"text {number}"]}},
                    "required": [f"key{number}"],
                    "additionalProperties": False,
                }
                grammar = {"type": "json", "value": schema, "whitespace": "none"}
                answer = client.generate("A JSON object: ", grammar=grammar, max_new_tokens=24)
                jsonschema.validate(json.loads(answer.text), schema)
                count += 1
            return count

        def watch() -> int:
            for _ in stream:
                arrivals.append(time.monotonic())
                if answered:
                    break
            return len(arrivals)

        def ask_then_tell() -> int:
            nonlocal answered
            answered = ask_all()
            return answered

        assert together(watch, ask_then_tell)[1] == 64
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert len(gaps) > 64, "the stream must run all the while"
    assert max(gaps) < max(12 * statistics.median(gaps), 0.5), (max(gaps), statistics.median(gaps))


def test_case_34_spellings_of_response_format(client: Client) -> None:
    """TGI's three spellings, OpenAI's, and `grammar`: identical content. A schema-less json_object is any object."""
    shape = {"type": "object", "properties": {"cats": {"enum": [1, 2, 3]}, "name": {"enum": ["David", "Anna"]}}}
    schema = {**shape, "required": ["cats", "name"], "additionalProperties": False}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object", "value": schema}},
        {"response_format": {"type": "json", "value": schema}},
        {"response_format": {"type": "json_schema", "value": {"name": "person", "schema": schema}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": schema, "strict": True}}},
        {"grammar": {"type": "json", "value": schema}},
    ]
    answers = together(*[
        lambda form=form: client.generate(messages=ASK_PERSON, max_new_tokens=40, **form) for form in forms
    ])  # fmt: skip
    assert len({answer.text for answer in answers}) == 1, answers
    jsonschema.validate(json.loads(answers[0].text), schema)
    anything = client.generate(
        messages=ASK_PERSON, max_new_tokens=120, response_format={"type": "json_object"}, grammar_whitespace="none"
    )
    assert anything.text.startswith("{")
    if anything.finish_reason == "eos_token":
        assert isinstance(json.loads(anything.text), dict)


def test_case_35_response_format_beside_tools(client: Client) -> None:
    """Refused as a tool error, even where the list of tools is empty."""
    with pytest.raises(ToolError, match=r"`response_format` and `tools` exclude each other"):
        client.generate(messages=ASK_WEATHER, response_format={"type": "json_object"}, tools=[])


def test_case_36_tool_choices(client: Client) -> None:
    """required, a name and OpenAI's object give a call of a tool allowed; none gives plain text; auto either."""
    tools = [WEATHER, NEWS]

    def ask(choice: Any) -> Callable[[], Generation]:
        asked = {"tools": tools, "tool_choice": choice, "max_new_tokens": 60}
        return lambda: client.generate(messages=ASK_WEATHER, **asked)

    named = {"type": "function", "function": {"name": "get_news"}}
    choices = ["required", "get_weather", named, "none", "auto", None]
    required, weather, news, plain, auto, default = together(*map(ask, choices))
    for answer in (required, weather, news):
        call = json.loads(answer.text)
        assert set(call) == {"name", "arguments"} and answer.finish_reason == "eos_token"
        if call["name"] == "get_weather":
            jsonschema.validate(call["arguments"], WEATHER["function"]["parameters"])
        else:
            assert call == {"name": "get_news", "arguments": {}}
    assert json.loads(weather.text)["name"] == "get_weather"
    assert json.loads(news.text)["name"] == "get_news"
    assert not plain.text.startswith("{")
    assert auto.text == default.text
    if auto.text.startswith("{") and auto.finish_reason == "eos_token":
        assert json.loads(auto.text)["name"] in ("get_weather", "get_news")


def test_case_38_unknown_tool(client: Client) -> None:
    """A choice that names no tool of the request is a tool error, which names it."""
    error = error_of(lambda: client.generate(messages=ASK_WEATHER, tools=[WEATHER], tool_choice="get_wether"))
    assert isinstance(error, ToolError) and isinstance(error, ValidationError)
    assert "get_wether" in str(error)
