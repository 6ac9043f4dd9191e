"""Cases 28 to 36 and 38: output that obeys a regex, a schema or a list of tools, and what is refused.

Differences: any JSON Schema is taken, recursive ones and those without `properties` included; a schema's objects are
open unless it closes them with additionalProperties; a bad regex is refused before it is queued (TGI fails the whole
batch); the text of a tool call is the object {"name", "arguments"}.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from textgen_client import Client, Generation, ToolError, ValidationError

from .asking import ALPHABET, EVEN_NUMBERS, LONG, assert_refused, error_of, ids_of, together, tokens_of

IPV4 = r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"
ASK_ADDRESS = "The IP address of Google's public DNS server is "
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
ASK_PERSON = "David likes trees and has 2 cats. David as JSON: "
WORKOUT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "activities": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
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
ASK_WORKOUT = "Anna went for a 30 minute run and a 45 minute swim. As JSON: "
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


@pytest.fixture(scope="module")
def obeying(client: Client) -> dict[str, Generation]:
    """The answers to the requests of cases 28 to 30, all of them asked at once; two also as streams, which must say the
    same."""
    address = {"prompt": ASK_ADDRESS, "grammar": {"type": "regex", "value": IPV4}, "max_new_tokens": 40}
    person = {"prompt": ASK_PERSON, "grammar": {"type": "json", "value": PERSON}, "max_new_tokens": 60}
    workout = {"prompt": ASK_WORKOUT, "grammar": {"type": "json", "value": WORKOUT}, "max_new_tokens": 120}
    requests: dict[str, dict[str, Any]] = {
        "address": address,
        "address, sampled": {**address, "temperature": 2.0, "seed": 5},
        "person": person,
        "person, schema as text": {**person, "grammar": {"type": "json", "value": json.dumps(PERSON)}},
        "workout": workout,
        "workout, sampled": {**workout, "temperature": 1.0, "seed": 11},
    }

    def stream(asked: dict[str, Any]) -> tuple[str, str | None]:
        chunks = list(client.stream(**asked))
        return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason

    with ThreadPoolExecutor(2) as threads:
        streams = {name: threads.submit(stream, requests[name]) for name in ("address, sampled", "workout")}
        answers = dict(
            zip(
                requests,
                together(*(functools.partial(client.generate, **asked) for asked in requests.values())),
                strict=True,
            )
        )
    for name, streamed in streams.items():
        assert streamed.result() == (answers[name].text, answers[name].finish_reason)
    assert {answer.finish_reason for answer in answers.values()} == {"eos_token"}
    return answers


def test_case_28_regex(obeying: dict[str, Generation]) -> None:
    """An IPv4 address: a full match, finish_reason eos_token; greedy, and sampled at a high temperature."""
    texts = [obeying[name].text for name in ("address", "address, sampled")]
    assert all(re.fullmatch(IPV4, text) for text in texts), texts


def test_case_29_schema(obeying: dict[str, Generation]) -> None:
    """A person: it parses, every key is there, types and bounds hold; the schema as an object and as its text."""
    text = obeying["person"].text
    person = json.loads(text)
    assert set(person) == set(PERSON["required"])
    assert all(isinstance(person[key], str) and len(person[key]) >= 4 for key in ("firstName", "lastName", "hobby"))
    assert isinstance(person["numCats"], int) and person["numCats"] >= 0
    assert obeying["person, schema as text"].text == text


def test_case_30_nested_schema(obeying: dict[str, Generation]) -> None:
    """An array with minItems 1, an enum, optional fields: jsonschema agrees; greedy and sampled."""
    for name in ("workout", "workout, sampled"):
        workout = json.loads(obeying[name].text)
        jsonschema.validate(workout, WORKOUT)
        assert len(workout["activities"]) >= 1


def test_case_31_constrained_and_free_at_once(client: Client) -> None:
    """Sixteen of each at once: all constrained ones valid, every free one equal to its solo output."""
    prompts = [ALPHABET, EVEN_NUMBERS]
    alone = [ids_of(client.generate(prompt, max_new_tokens=10, details=True)) for prompt in prompts]
    code = r"[A-F]{2}-\d{3}(-(north|south))?"

    def free(prompt: str) -> Callable[[], Generation]:
        return lambda: client.generate(prompt, max_new_tokens=10, details=True)

    def constrained(seed: int) -> Callable[[], Generation]:
        grammar = {"type": "regex", "value": code}
        return lambda: client.generate("The code is ", grammar=grammar, max_new_tokens=20, temperature=1.0, seed=seed)

    calls = [call for seed in range(16) for call in (free(prompts[seed % 2]), constrained(seed))]
    answers = together(*calls)
    for index, answer in enumerate(answers[0::2]):
        assert ids_of(answer) == alone[index % 2]
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
    """64 schemas never seen before, eight at a time, beside a running stream: its gaps stay near its usual ones.

    Compiling happens beside the engine's loop, so that a gap holds one step and no compilation. The bound is generous,
    since the machine may be busy: the largest gap is at most 12 of the stream's own median gaps, or half a second.
    """

    def ask(number: int) -> None:
        key = f"key{number}"
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {key: {"enum": [number, f"text {number}"]}},
            "required": [key],
        }
        schema["additionalProperties"] = False
        grammar = {"type": "json", "value": schema, "whitespace": "none"}
        answer = client.generate("A JSON object: ", grammar=grammar, max_new_tokens=24)
        jsonschema.validate(json.loads(answer.text), schema)

    arrivals: list[float] = []
    with client.stream("Once upon a time", **LONG) as stream, ThreadPoolExecutor(8) as threads:
        for _ in range(4):
            next(stream)
        asked = [threads.submit(ask, number) for number in range(64)]
        for _ in stream:
            arrivals.append(time.monotonic())
            if all(future.done() for future in asked):
                break
        for future in asked:
            future.result()  # raises where a schema was not answered, or wrongly
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert len(gaps) > 16, "the stream must run all the while"
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
        lambda form=form: client.generate(ASK_PERSON, max_new_tokens=40, **form) for form in forms
    ])  # fmt: skip
    assert len({answer.text for answer in answers}) == 1, answers
    jsonschema.validate(json.loads(answers[0].text), schema)
    anything = client.generate(
        ASK_PERSON, max_new_tokens=48, response_format={"type": "json_object"}, grammar_whitespace="none"
    )
    assert anything.text.startswith("{")
    if anything.finish_reason == "eos_token":
        assert isinstance(json.loads(anything.text), dict)


def test_case_35_response_format_beside_tools(client: Client) -> None:
    """Refused as a tool error, even where the list of tools is empty."""
    with pytest.raises(ToolError, match=r"`response_format` and `tools` exclude each other"):
        client.generate(messages=ASK_WEATHER, response_format={"type": "json_object"}, tools=[])


def test_case_36_tool_choices(client: Client) -> None:
    """required, a name and OpenAI's object give a call of a tool; none gives plain text; auto, the default, either."""
    tools = [WEATHER, NEWS]

    def ask(choice: Any) -> Callable[[], Generation]:
        asked = {"tools": tools, "tool_choice": choice, "max_new_tokens": 40}
        return lambda: client.generate(messages=ASK_WEATHER, **asked)

    named = {"type": "function", "function": {"name": "get_news"}}
    required, weather, news, plain, auto = together(*map(ask, ["required", "get_weather", named, "none", None]))
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
    if auto.text.startswith("{") and auto.finish_reason == "eos_token":
        assert json.loads(auto.text)["name"] in ("get_weather", "get_news")


def test_case_38_unknown_tool(client: Client) -> None:
    """A choice that names no tool of the request is a tool error, which names it."""
    error = error_of(lambda: client.generate(messages=ASK_WEATHER, tools=[WEATHER], tool_choice="get_wether"))
    assert isinstance(error, ToolError) and isinstance(error, ValidationError)
    assert "get_wether" in str(error)
