"""OpenAI's /v1/responses through OpenAI's own client, unmodified: whole, streamed, parsed, with tools, refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage
from pydantic import BaseModel

from .running_gateway import Gateway

MODEL = "org/tiny"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 5}
PARAMETERS = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "light", "parameters": PARAMETERS, "strict": True, "description": "a lamp"}


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def test_an_answer_is_the_chats(client: openai.OpenAI) -> None:
    answer = client.responses.create(input="hi", instructions="Be brief.", metadata={"a": "b"}, **GREEDY)
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=5)
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.status, answer.model, answer.metadata) == ("incomplete", MODEL, {"a": "b"})
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and chat.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (chat.usage.prompt_tokens, 5)
    assert answer.usage.input_tokens_details.cached_tokens >= 0
    (item,) = answer.output
    assert isinstance(item, ResponseOutputMessage)
    assert answer.id != client.responses.create(input="hi", **GREEDY).id


def test_a_stream_builds_the_same(client: openai.OpenAI, http: httpx.Client) -> None:
    whole = client.responses.create(input="hi", **GREEDY)
    events = list(client.responses.create(input="hi", stream=True, **GREEDY))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert last.type == "response.incomplete"
    assert text == whole.output_text == last.response.output_text
    assert last.response.usage == whole.usage
    raw = http.post("/v1/responses", json={"input": "hi", "stream": True, **GREEDY}).text
    assert raw.startswith("event: response.created\ndata: {")
    assert raw.endswith("\n\n")


class Lamp(BaseModel):
    on: bool


def test_structured_output(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "input": "hi", "text_format": Lamp, "max_output_tokens": 60, "temperature": 0}
    asked["extra_body"] = {"grammar_whitespace": "none"}
    parsed = client.responses.parse(**asked)
    assert isinstance(parsed.output_parsed, Lamp)
    assert parsed.status == "completed"
    with client.responses.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.output_text.delta" in kinds
    assert final.output_parsed == parsed.output_parsed


def test_tools_and_the_way_back(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "tools": [TOOL], "max_output_tokens": 60, "temperature": 0}
    asked |= {"parallel_tool_calls": False, "extra_body": {"grammar_whitespace": "none"}}
    question: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    for choice in ("required", {"type": "function", "name": "light"}):
        answer = client.responses.create(input=question, tool_choice=choice, **asked)
        (call,) = answer.output
        assert isinstance(call, ResponseFunctionToolCall)
        assert (call.name, answer.status) == ("light", "completed")
        assert set(json.loads(call.arguments)) == {"on"}
    with client.responses.stream(input=question, tool_choice="required", **asked) as stream:
        arguments = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        streamed = stream.get_final_response().output[0]
    assert isinstance(streamed, ResponseFunctionToolCall)
    assert "".join(arguments) == streamed.arguments == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    after = client.responses.create(input=[*question, call, result], tool_choice="none", **asked)
    assert after.output_text
    assert [item.type for item in after.output] == ["message"]


def test_logprobs(client: openai.OpenAI) -> None:
    asked: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, **GREEDY}
    (item,) = client.responses.create(input="hi", **asked).output
    assert isinstance(item, ResponseOutputMessage)
    (part,) = item.content
    assert part.type == "output_text" and part.logprobs is not None
    assert len(part.logprobs) == 5
    assert all(len(token.top_logprobs) == 2 for token in part.logprobs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"background": True},
        {"input": []},
        {"input": [{"type": "item_reference", "id": "1"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a"}]}]},
        {"input": [{"role": "nobody", "content": "a"}]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}},
        {"max_output_tokens": 100000},
        {"nonsense": 1},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_have_their_status(http: httpx.Client, wrong: dict[str, Any], stream: bool) -> None:
    refused = http.post("/v1/responses", json={"input": "hi", "stream": stream, **wrong})
    assert refused.status_code == 422, refused.text
    assert refused.json()["error"]["type"] == "invalid_request_error"


def test_the_async_client(gateway: Gateway) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
            whole = await client.responses.create(input="hi", **GREEDY)
            async with client.responses.stream(input="hi", **GREEDY) as stream:
                text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        return whole.output_text, text

    whole, streamed = asyncio.run(ask())
    assert whole == streamed
