"""Prompts over HTTP: rendered as transformers renders them; and reasoning that the prompt, not the answer, opens."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from ..engine.tiny import make_tokenizer
from .conftest import TEMPLATES
from .running_gateway import Gateway

USER = {"role": "user", "content": "What is 2+2? 😀"}
CHAT = [USER, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "And <3 & more?"}]
TOOL = {"name": "weather", "description": "today's", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
TOOL_CHAT = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "21", "tool_call_id": "1"},
]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("messages", [[USER], CHAT, TOOL_CHAT], ids=["user", "chat", "tool_chat"])
def test_prompts_equal_transformers(http: httpx.Client, family: str, tools: Any, messages: Any) -> None:
    if family == "chatml" and (tools or messages is TOOL_CHAT):
        pytest.skip("a template that knows no tools: the server shows them in its own words")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[family]
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    sent: Any = json.loads(json.dumps(messages))
    for call in sent[1].get("tool_calls", []) if len(sent) > 1 else []:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])  # a string, as OpenAI's clients send
    body = {"messages": sent, "tools": tools, "chat_template": family}
    found = http.post("/chat_tokenize", json={name: value for name, value in body.items() if value}).json()
    assert found["templated_text"] == expected
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
    assert [token["id"] for token in found["tokenize_response"]] == ids


ANSWER = r"hm</think>\n\nyes"
FORCED: dict[str, Any] = {
    "model": "tgi",
    "temperature": 0,
    "extra_body": {"chat_template": "opened", "grammar": {"type": "regex", "value": ANSWER}},
}


def test_reasoning_that_the_prompt_opens(gateway: Gateway, http: httpx.Client) -> None:
    """Whole, streamed, as items; not where the template opens none, or the conversation's last word has closed it."""
    messages: Any = [{"role": "user", "content": "hi"}]
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0) as client:
        message = client.chat.completions.create(messages=messages, **FORCED).choices[0].message
        assert (message.model_dump()["reasoning_content"], message.content) == ("hm", "yes")
        chunks = list(client.chat.completions.create(messages=messages, stream=True, **FORCED))
        deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "hm"
        assert "".join(delta.get("content") or "" for delta in deltas) == "yes"
        answer = client.responses.create(input="hi", **FORCED)
        assert [item.type for item in answer.output] == ["reasoning", "message"]
        assert answer.output_text == "yes"
        assert answer.usage is not None
        assert 0 < answer.usage.output_tokens_details.reasoning_tokens < answer.usage.output_tokens
        begun = [*messages, {"role": "assistant", "content": "<think>so</think>"}]
        message = client.chat.completions.create(messages=begun, **FORCED).choices[0].message
        assert message.content == "hm</think>\n\nyes"
    body = {"messages": messages, "temperature": 0, "max_tokens": 4}
    cut = http.post("/v1/chat/completions", json={**body, "chat_template": "opened"}).json()["choices"][0]["message"]
    assert cut["content"] == ""
    assert cut["reasoning_content"]
    plain = http.post("/v1/chat/completions", json={**body, "chat_template": "thinking"}).json()["choices"][0][
        "message"
    ]
    assert plain["content"]
    assert "reasoning_content" not in plain
