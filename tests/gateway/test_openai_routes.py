"""OpenAI's routes against a real server, through OpenAI's own client, unmodified."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from .running_gateway import Gateway

PROMPT = "the quick brown fox"
MODEL = "org/tiny"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


def tool(name: str, **properties: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("light", on={"type": "boolean"}), tool("dim", percent={"enum": [10, 50]})]


@pytest.fixture(scope="session")
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def test_chat(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, max_tokens=5, **GREEDY)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.model == MODEL
    rendered = http.post("/chat_tokenize", json={"messages": MESSAGES}).json()["templated_text"]
    same = client.completions.create(prompt=rendered, max_tokens=5, **GREEDY)
    assert same.choices[0].text == choice.message.content
    assert client.models.list().data[0].id == MODEL


@pytest.mark.parametrize("include_usage", [True, False])
def test_41_stream(client: openai.OpenAI, http: httpx.Client, include_usage: bool) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, max_tokens=5, **GREEDY)
    asked: Any = {"messages": MESSAGES, "max_tokens": 5, "stream_options": {"include_usage": include_usage}, **GREEDY}
    chunks = list(client.chat.completions.create(stream=True, **asked))
    usages = [chunk.usage for chunk in chunks]
    if include_usage:
        assert usages == [None] * (len(chunks) - 1) + [whole.usage]
        assert chunks.pop().choices == []
    else:
        assert set(usages) == {None}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    raw = http.post("/v1/chat/completions", json={**asked, "stream": True}).text
    assert raw.endswith("data: [DONE]\n\n")


def test_42_several_prompts(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "a stream", "of", "text"]
    asked: dict[str, Any] = {"max_tokens": 4, **GREEDY}
    alone = [client.completions.create(prompt=prompt, **asked).choices[0].text for prompt in prompts]
    together = client.completions.create(prompt=prompts, **asked)
    assert [(choice.index, choice.text) for choice in together.choices] == list(enumerate(alone))
    assert together.usage is not None
    assert together.usage.completion_tokens == 16
    texts = ["", "", "", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == alone
    refused: list[dict[str, Any]] = [{"prompt": [*prompts, "5"]}, {"prompt": []}, {"prompt": PROMPT, "suffix": "."}]
    for wrong in refused:
        with pytest.raises(openai.UnprocessableEntityError):
            client.completions.create(**wrong, **asked)


def test_completions_of_ids_with_echo_and_logprobs(client: openai.OpenAI, http: httpx.Client) -> None:
    ids = [token["id"] for token in http.post("/tokenize", json={"inputs": PROMPT}).json()]
    by_text = client.completions.create(prompt=PROMPT, max_tokens=3, logprobs=2, **GREEDY).choices[0]
    by_ids = client.completions.create(prompt=ids, max_tokens=3, **GREEDY).choices[0]
    assert by_ids.text == by_text.text
    assert client.completions.create(prompt=PROMPT, max_tokens=3, echo=True, **GREEDY).choices[0].text == (
        PROMPT + by_text.text
    )
    told = by_text.logprobs
    assert told is not None and told.tokens is not None and told.top_logprobs is not None
    assert "".join(told.tokens) == by_text.text
    assert told.text_offset == [by_text.text.index(told.tokens[0]), *told.text_offset[1:]]
    # Two tokens may have one text, and this form has a text's log-probability only once.
    assert all(1 <= len(top) <= 2 for top in told.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_43_logprobs(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {"messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 2, **GREEDY}
    if stream:
        chunks = client.chat.completions.create(stream=True, **asked)
        found = [chunk.choices[0].logprobs for chunk in chunks]
        content = [token for logprobs in found if logprobs for token in logprobs.content or []]
    else:
        logprobs = client.chat.completions.create(**asked).choices[0].logprobs
        assert logprobs is not None
        content = logprobs.content or []
    assert len(content) == 4
    for token in content:
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob


def test_sampling_parameters_reach_the_server(client: openai.OpenAI) -> None:
    def text(**parameters: Any) -> str | None:
        asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, **parameters}
        return client.chat.completions.create(**asked).choices[0].message.content  # type: ignore[no-any-return]

    greedy = text(temperature=0)
    assert text(seed=5) == text(seed=5) != text(seed=6)
    assert text(temperature=0, logit_bias={"300": 100}) != greedy
    assert text(temperature=0, frequency_penalty=2, presence_penalty=2) is not None
    assert text(extra_body={"top_k": 1}) == greedy
    assert text(temperature=0, user="somebody", metadata={"a": "b"}, store=False) == greedy
    choices = client.chat.completions.create(messages=MESSAGES, model=MODEL, n=2, max_tokens=4, seed=1).choices
    assert [choice.index for choice in choices] == [0, 1]
    assert choices[0].message.content != choices[1].message.content


@pytest.mark.parametrize("form", ["string", "list"])
def test_stop_is_stripped(client: openai.OpenAI, form: str) -> None:
    text = client.chat.completions.create(messages=MESSAGES, max_tokens=6, **GREEDY).choices[0].message.content or ""
    stop = text[2:4]
    asked = stop if form == "string" else [stop]
    choice = client.chat.completions.create(messages=MESSAGES, max_tokens=6, stop=asked, **GREEDY).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_34_response_formats(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    forms: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
        {"type": "json_object", "value": schema},
        {"type": "json", "value": schema},
        {"type": "json_schema", "value": {"name": "a", "schema": schema}},
    ]
    texts = {
        client.chat.completions.create(messages=MESSAGES, max_tokens=40, response_format=form, **GREEDY)
        .choices[0]
        .message.content
        for form in forms
    }
    assert len(texts) == 1
    assert json.loads(texts.pop() or "")["a"] in (1, 2)
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(messages=MESSAGES, response_format=forms[0], tools=[], **GREEDY)
    assert refused.value.code == "tool_error"


class Lamp(BaseModel):
    on: bool
    level: int


def test_structured_output_with_a_pydantic_model(client: openai.OpenAI) -> None:
    asked: Any = {"messages": MESSAGES, "response_format": Lamp, "max_tokens": 60, "seed": 3, "model": MODEL}
    try:
        answer = client.chat.completions.parse(**asked)
    except openai.LengthFinishReasonError:
        pytest.fail("the integer never ended")
    assert isinstance(answer.choices[0].message.parsed, Lamp)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"light", "dim"}),
        ({"type": "function", "function": {"name": "dim"}}, {"dim"}),
        ("none", set()),
        ("auto", {"light", "dim", None}),
        (None, {"light", "dim", None}),
    ],
    ids=["required", "named", "none", "auto", "left out"],
)
def test_36_37_tools(client: openai.OpenAI, choice: Any, names: set[str | None]) -> None:
    """A call, or text, as chosen; and the same streamed: a name once, arguments in pieces."""
    asked: Any = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 60, "parallel_tool_calls": False, **GREEDY}
    asked["extra_body"] = {"grammar_whitespace": "none"}  # of which the random model would write all it may
    if choice is not None:
        asked["tool_choice"] = choice
    answer = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(stream=True, **asked))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    content = "".join(delta.content or "" for delta in deltas)
    assert chunks[-1].choices[0].finish_reason == answer.finish_reason
    if answer.message.tool_calls is None:
        assert names == set() or None in names
        assert answer.message.content == content
        assert calls == []
        return
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name in names
    assert answer.message.content is None
    assert answer.finish_reason == "tool_calls"
    assert set(json.loads(call.function.arguments)) == ({"on"} if call.function.name == "light" else {"percent"})
    assert [call.function.name for call in calls if call.function and call.function.name] == [call.function.name]
    streamed = "".join(call.function.arguments or "" for call in calls if call.function)
    assert streamed == call.function.arguments
    assert content == ""


def test_several_calls_in_one_answer(client: openai.OpenAI, http: httpx.Client) -> None:
    """Allowed unless refused. The random model is pushed by a bias: to the list's bracket, and from call to call."""
    bracket, comma = (http.post("/tokenize", json={"inputs": text}).json()[0]["id"] for text in "[,")
    asked: Any = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "max_tokens": 120, **GREEDY}
    asked |= {"logit_bias": {bracket: 100, comma: 100}, "extra_body": {"grammar_whitespace": "none"}}
    message = client.chat.completions.create(**asked).choices[0].message
    calls = [call for call in message.tool_calls or [] if call.type == "function"]
    assert len(calls) > 1
    assert len({call.id for call in calls}) == len(calls)
    streamed: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(stream=True, **asked):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.function is not None
            assert (delta.id is None) == (delta.function.name is None)
            name, arguments = streamed.setdefault(delta.index, [delta.function.name or "", ""])
            streamed[delta.index] = [name, arguments + (delta.function.arguments or "")]
    assert list(streamed) == list(range(len(calls)))
    assert list(streamed.values()) == [[call.function.name, call.function.arguments] for call in calls]
    for call in calls[:-1]:  # the last one may be cut by max_tokens
        assert set(json.loads(call.function.arguments)) == ({"on"} if call.function.name == "light" else {"percent"})
    one = client.chat.completions.create(parallel_tool_calls=False, **asked).choices[0].message
    assert len(one.tool_calls or []) == 1


def test_38_39_40_conversations(client: openai.OpenAI, http: httpx.Client) -> None:
    unknown: Any = {"type": "function", "function": {"name": "nobody"}}
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(messages=MESSAGES, tools=TOOLS, tool_choice=unknown, **GREEDY)
    assert refused.value.code == "tool_error"
    call = {"id": "1", "type": "function", "function": {"name": "light", "arguments": '{"on": true}'}}
    after: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    assert client.chat.completions.create(messages=after, max_tokens=2, **GREEDY).choices[0].message.content
    begun: Any = [*MESSAGES, {"role": "assistant", "content": "The answer is"}]
    rendered = http.post("/chat_tokenize", json={"messages": begun}).json()["templated_text"]
    assert rendered.endswith("The answer is")
    continued = client.chat.completions.create(messages=begun, max_tokens=4, **GREEDY).choices[0].message.content
    assert continued == client.completions.create(prompt=rendered, max_tokens=4, **GREEDY).choices[0].text


def test_errors_are_openais_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as wrong:
        client.chat.completions.create(messages=MESSAGES, max_tokens=100000, stream=True, **GREEDY)
    assert wrong.value.code == "validation"
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(messages=MESSAGES, n=10**15, **GREEDY)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(messages=MESSAGES, model="gpt-unknown")
    assert unknown.value.code == "model_not_found"
    picture: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a"}}]}]
    with pytest.raises(openai.UnprocessableEntityError, match="image_url"):  # no address is ever fetched
        client.chat.completions.create(messages=picture, **GREEDY)
    with pytest.raises(openai.UnprocessableEntityError, match="nonsense"):
        client.chat.completions.create(messages=MESSAGES, extra_body={"nonsense": 1}, **GREEDY)
    with pytest.raises(openai.UnprocessableEntityError) as typed:
        client.chat.completions.create(messages=MESSAGES, max_tokens="many", **GREEDY)  # type: ignore[call-overload]
    assert typed.value.param == "max_tokens"


def test_the_async_client(gateway: Gateway) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
            asked: Any = {"messages": MESSAGES, "max_tokens": 4, **GREEDY}
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(stream=True, **asked)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content or "", "".join(pieces)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed
