"""`chat.py`: prompts equal those of `apply_chat_template`, for templates of several families; endings; tools."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from textgen_tokenizer.errors import InvalidParameter, TemplateError, ToolError
from textgen_tokenizer.service import TokenizerRequest, TokenizerService

FAMILIES = sorted(path.stem for path in (Path(__file__).parent / "templates").glob("*.jinja"))

USER = {"role": "user", "content": "What is 2+2? 😀"}
CHAT = [USER, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "And <3 & more?"}]
OPEN = [USER, {"role": "assistant", "content": "The answer is"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather, today's",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def _call(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


TOOL_CHAT = [USER, _call({"city": "Köln"}), {"role": "tool", "content": "21", "tool_call_id": "1"}]


def _source(family: str) -> str:
    return (Path(__file__).parent / "templates" / f"{family}.jinja").read_text()


@pytest.fixture
def make_service(loaded: Any) -> Any:
    """A service whose tokenizer has other templates."""

    def make(template: Any) -> TokenizerService:
        tokenizer = copy.copy(loaded.tokenizer)
        tokenizer.chat_template = template
        return TokenizerService(replace(loaded, tokenizer=tokenizer, max_input_tokens=4000))

    return make


def _prompt(service: TokenizerService, messages: Any, **parameters: Any) -> str:
    answer = service.answer(
        TokenizerRequest(messages=json.dumps(messages).encode(), sampling_parameters=json.dumps(parameters).encode())
    )
    assert answer.prompt_text is not None
    return answer.prompt_text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, CLOCK]])
@pytest.mark.parametrize("name", ["user", "chat", "tool_chat"])
def test_prompts_equal_transformers(family: str, tools: Any, name: str, make_service: Any) -> None:
    if family == "chatml" and (tools or name == "tool_chat"):
        pytest.skip("a template that knows no tools: see test_tools_for_a_template_that_knows_none")
    messages = {"user": [USER], "chat": CHAT, "tool_chat": TOOL_CHAT}[name]
    service = make_service(_source(family))
    tokenizer = service._tokenizer
    parameters = {} if tools is None else {"tools": tools}
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert _prompt(service, messages, **parameters) == expected
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
    answer = service.answer(
        TokenizerRequest(messages=json.dumps(messages).encode(), sampling_parameters=json.dumps(parameters).encode())
    )
    assert answer.input_ids == ids


def test_the_demonstration_models_own_template(service: TokenizerService, loaded: Any) -> None:
    expected = loaded.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert _prompt(service, CHAT) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_open_answer_is_continued(family: str, make_service: Any) -> None:
    service = make_service(_source(family))
    tokenizer = service._tokenizer
    continued = tokenizer.apply_chat_template(OPEN, tokenize=False, continue_final_message=True)
    assert continued.endswith("The answer is")
    assert _prompt(service, OPEN) == continued
    assert _prompt(service, OPEN, continue_final_message=True) == continued
    closed = tokenizer.apply_chat_template(OPEN, tokenize=False)
    assert _prompt(service, OPEN, add_generation_prompt=False) == closed
    assert _prompt(service, OPEN, continue_final_message=False, add_generation_prompt=False) == closed
    opened = tokenizer.apply_chat_template(OPEN, tokenize=False, add_generation_prompt=True)
    assert _prompt(service, OPEN, add_generation_prompt=True) == opened
    assert _prompt(service, OPEN, continue_final_message=False) == opened
    with pytest.raises(InvalidParameter, match="exclude each other"):
        _prompt(service, OPEN, continue_final_message=True, add_generation_prompt=True)


def test_a_tool_call_is_not_continued(make_service: Any) -> None:
    service = make_service(_source("thinking"))
    assert _prompt(service, [USER, _call({"city": "Köln"})]).endswith("<|im_start|>assistant\n")


def test_any_last_message_can_be_continued(make_service: Any) -> None:
    prompt = _prompt(make_service(_source("chatml")), [USER], continue_final_message=True)
    assert prompt.endswith(USER["content"])


def test_parts_are_joined(make_service: Any) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2? 😀"}]
    service = make_service(_source("chatml"))
    assert _prompt(service, [{"role": "user", "content": parts}]) == _prompt(service, [USER])


@pytest.mark.parametrize("family", ["headers", "thinking"])
def test_arguments_as_a_string_of_json(family: str, make_service: Any) -> None:
    """OpenAI's clients send a string, templates are written for an object."""
    service = make_service(_source(family))
    assert _prompt(service, [USER, _call('{"city": "Köln"}'), TOOL_CHAT[2]]) == _prompt(service, TOOL_CHAT)


def test_broken_arguments_are_shown_as_they_are(make_service: Any) -> None:
    assert '"arguments": {"city"}' in _prompt(make_service(_source("thinking")), [USER, _call('{"city"'), TOOL_CHAT[2]])


@pytest.mark.parametrize("choice", ["weather", {"type": "function", "function": {"name": "weather"}}])
def test_a_named_tool_is_shown_alone(choice: Any, make_service: Any) -> None:
    service = make_service(_source("thinking"))
    prompt = _prompt(service, [USER], tools=[WEATHER, CLOCK], tool_choice=choice)
    assert prompt == _prompt(service, [USER], tools=[WEATHER])


def test_tool_choice(make_service: Any) -> None:
    service = make_service(_source("thinking"))
    assert _prompt(service, [USER], tools=[WEATHER], tool_choice="none") == _prompt(service, [USER])
    assert _prompt(service, [USER], tools=[]) == _prompt(service, [USER])
    for choice in ("auto", "required", None):
        assert _prompt(service, [USER], tools=[WEATHER], tool_choice=choice) == _prompt(
            service, [USER], tools=[WEATHER]
        )
    # A template may look at the choice itself.
    assert 'Choice: "required"' in _prompt(
        make_service(_source("headers")), [USER], tools=[CLOCK], tool_choice="required"
    )


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"tools": {}}, "`tools` must be a list of tools; given: dict"),
        ({"tools": ["weather"]}, "`tools[0]` must be an object like"),
        ({"tools": [WEATHER, {"type": "function", "function": {}}]}, "`tools[1]` must be an object like"),
        ({"tools": [WEATHER], "tool_choice": "sing"}, "`tool_choice` names 'sing'; given in `tools`: weather"),
        ({"tool_choice": "weather"}, "`tool_choice` names 'weather'; given in `tools`: no tools"),
        ({"tools": [WEATHER], "tool_choice": 5}, '`tool_choice` must be "auto"'),
    ],
)
def test_tool_errors(parameters: dict[str, Any], text: str, service: TokenizerService) -> None:
    with pytest.raises(ToolError) as caught:
        _prompt(service, [USER], **parameters)
    assert str(caught.value).startswith("Tool error: ")
    assert text in str(caught.value)


def test_tools_for_a_template_that_knows_none(make_service: Any) -> None:
    service = make_service(_source("chatml"))
    shown = json.dumps([WEATHER], ensure_ascii=False)
    expected = f"{USER['content']}\n---\n{shown}\nUse them."
    assert expected in _prompt(service, [USER], tools=[WEATHER], tool_prompt="Use them.")
    assert shown in _prompt(service, [USER], tools=[WEATHER])
    # Never inside the answer that is continued.
    prompt = _prompt(service, OPEN, tools=[WEATHER], tool_prompt="Use them.")
    assert expected in prompt
    assert prompt.endswith("The answer is")


def test_tool_prompt_for_a_template_that_knows_tools(make_service: Any) -> None:
    service = make_service(_source("thinking"))
    prompt = _prompt(service, [USER], tools=[WEATHER], tool_prompt="Use them.")
    assert f"{USER['content']}\n---\nUse them.<|im_end|>" in prompt
    assert _prompt(service, [USER], tool_prompt="Use them.") == _prompt(service, [USER])


def test_template_arguments(make_service: Any) -> None:
    service = make_service(_source("thinking"))
    assert _prompt(service, [USER], chat_template_kwargs={"enable_thinking": False}).endswith("</think>\n\n")
    assert not _prompt(service, [USER], chat_template_kwargs={"enable_thinking": True}).endswith("</think>\n\n")
    with pytest.raises(InvalidParameter, match="may not hold chat_template, tokenize"):
        _prompt(service, [USER], chat_template_kwargs={"tokenize": True, "chat_template": "x"})


def test_documents(make_service: Any) -> None:
    service = make_service("{% for d in documents or [] %}{{ d.title }};{% endfor %}{{ messages[0].content }}")
    assert _prompt(service, [USER], documents=[{"title": "A"}, {"title": "B"}]) == "A;B;" + USER["content"]
    with pytest.raises(InvalidParameter, match="`documents` must be a list of objects"):
        _prompt(service, [USER], documents=["A"])


def test_named_templates(make_service: Any) -> None:
    service = make_service({"default": "D", "tool_use": "T", "rag": "R"})
    assert _prompt(service, [USER]) == "D"
    assert _prompt(service, [USER], tools=[WEATHER]) == "T"
    assert _prompt(service, [USER], chat_template="rag") == "R"
    with pytest.raises(TemplateError, match="no chat template 'x'; it has: default, rag, tool_use"):
        _prompt(service, [USER], chat_template="x")
    with pytest.raises(TemplateError, match="no chat template 'default'; it has: rag"):
        _prompt(make_service({"rag": "R"}), [USER])


def test_a_template_cannot_come_with_a_request(make_service: Any) -> None:
    with pytest.raises(TemplateError, match="no chat template"):
        _prompt(make_service("ours"), [USER], chat_template="{{ 'theirs' }}")


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (None, [USER], "this model has no chat template"),
        ("instruct", [USER, USER], "Conversation roles must alternate user/assistant/user/assistant/..."),
        ("instruct", [{"role": "system", "content": "x"}], "Only user, assistant and tool roles are supported!"),
        ("{{ nothing.at.all }}", [USER], "'nothing' is undefined"),
        ("{% if %}", [USER], "Expected an expression, got 'end of statement block'"),
        ("{{ 1 / 0 }}", [USER], "division by zero"),
        ("{{ messages.__class__.__mro__ }}", [USER], "access to attribute '__class__' of 'list' object is unsafe."),
        ("{{ messages[0].role }}", OPEN, "not an accepted field"),
    ],
)
def test_template_errors(template: str | None, messages: Any, text: str, make_service: Any) -> None:
    service = make_service(_source(template) if template in FAMILIES else template)
    with pytest.raises(TemplateError) as caught:
        _prompt(service, messages)
    assert str(caught.value).startswith("Template error: ")
    assert text in str(caught.value)
