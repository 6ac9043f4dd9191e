"""Chat messages to the text of a prompt, through the checkpoint's chat template.

Owns the form of messages and the choice of template and of its ending; the rendering itself is transformers'
`apply_chat_template`, so that a prompt is what the model's authors tested.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from textgen_tokenizer.errors import InvalidParameter, TemplateError, Unsupported
from textgen_tokenizer.options import Json, PromptOptions, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOOL_PROMPT = (
    "To use one of these functions, answer with a JSON object that holds its name as `name` and its arguments, by"
    " name, as `arguments`."
)
# What `apply_chat_template` and the tokenizer give to every template; a request may not replace it sideways.
_TAKEN_NAMES = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "sanitize_control_tokens",
        "tokenizer_kwargs",
    }
)


def parse_messages(text: str) -> list[dict[str, Json]]:
    """The messages in `text`, a JSON array. Raises InvalidParameter (or Unsupported) naming the message at fault.

    Contents given in parts are joined to one string, as Text Generation Inference does. A tool call's arguments, which
    OpenAI's clients send as a string of JSON, become the object that templates expect.
    """
    messages = parse_json("messages", text)
    if not isinstance(messages, list) or not messages:
        raise InvalidParameter.for_value("messages", messages, "a non-empty JSON array of messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Json]], options: PromptOptions) -> str:
    """The prompt's text. Raises TemplateError where there is no template or it does not take these messages.

    A last message of the assistant is continued, as Text Generation Inference does, unless `add_generation_prompt` or
    `continue_final_message` says otherwise; any other conversation ends in the assistant's opening.
    """
    template = template_of(tokenizer, options)
    continues = options.continue_final_message
    if continues is None:
        continues = options.add_generation_prompt is None and _is_open_answer(messages[-1])
    opens = options.add_generation_prompt if options.add_generation_prompt is not None else not continues
    if opens and continues:
        raise InvalidParameter("`add_generation_prompt` and `continue_final_message` exclude each other")
    taken = _TAKEN_NAMES.intersection(options.chat_template_kwargs)
    if taken:
        raise InvalidParameter(f"`chat_template_kwargs` may not hold {', '.join(sorted(taken))}")
    if options.tools:
        messages = _with_tool_prompt(messages, options, template)
    arguments = dict(options.chat_template_kwargs)
    if options.tool_choice is not None:
        arguments.setdefault("tool_choice", options.tool_choice)
    try:
        prompt: str = tokenizer.apply_chat_template(
            messages,
            tools=list(options.tools) or None,
            documents=None if options.documents is None else list(options.documents),
            chat_template=template,
            add_generation_prompt=opens,
            continue_final_message=continues,
            tokenize=False,
            **arguments,
        )
    except Exception as error:  # a template is a program of the checkpoint's author: it may raise anything
        text = str(error) or type(error).__name__
        raise TemplateError(text if len(text) <= 500 else text[:497] + "...") from error
    return prompt


def template_of(tokenizer: PreTrainedTokenizerBase, options: PromptOptions) -> str:
    """The source of a request's template; TemplateError where there is none.

    Chosen by name only: a template is code, and comes with the checkpoint, not with a request.
    """
    templates = tokenizer.chat_template
    if not templates:
        raise TemplateError("this model has no chat template; send `text_input`, or set TOKENIZER_CONFIG_PATH")
    if isinstance(templates, str):
        templates = {"default": templates}
    name = options.chat_template
    if name is None:
        name = "tool_use" if options.tools and "tool_use" in templates else "default"
    if name not in templates:
        raise TemplateError(f"this model has no chat template {name!r}; it has: {', '.join(sorted(templates))}")
    template: str = templates[name]
    return template


def _is_open_answer(message: dict[str, Json]) -> bool:
    return message["role"] == "assistant" and bool(message.get("content")) and not message.get("tool_calls")


def _message(message: Json, where: str) -> dict[str, Json]:
    if not isinstance(message, dict):
        raise InvalidParameter.for_value(where, message, "an object")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidParameter.for_value(f"{where}.role", role, "a non-empty string")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise InvalidParameter(f"`{where}` has no content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise InvalidParameter.for_value(f"{where}.content", content, "a string or a list of parts")
    checked: dict[str, Json] = {**message, "content": content}
    if message.get("tool_calls"):
        checked["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return checked


def _part(part: Json, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise Unsupported(f"`{where}` is of type {kind!r}; this server takes text only")
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise InvalidParameter.for_value(where, part, 'an object like {"type": "text", "text": ...}')
    return text


def _tool_calls(calls: Json, where: str) -> list[Json]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidParameter.for_value(where, calls, "a list of objects")
    return [_tool_call(call) for call in calls]


def _tool_call(call: dict[str, Json]) -> dict[str, Json]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call  # what a model once wrote, however broken: the template shows it as it is
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _with_tool_prompt(messages: list[dict[str, Json]], options: PromptOptions, template: str) -> list[dict[str, Json]]:
    """The messages, with what a template does not say of the tools added to the last one that is not the assistant's.

    A template that knows `tools` shows them in the form the model was trained on, so only a `tool_prompt` of the
    request is added. To any other, the tools are added as JSON, which is what Text Generation Inference does.
    """
    parts: list[str] = []
    if not re.search(r"\btools\b", template):
        parts += [json.dumps(list(options.tools), ensure_ascii=False), options.tool_prompt or _TOOL_PROMPT]
    elif options.tool_prompt:
        parts.append(options.tool_prompt)
    for i in reversed(range(len(messages))):
        if parts and messages[i]["role"] != "assistant":
            content = "\n".join([f"{messages[i]['content'] or ''}\n---", *parts])
            return [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]
    return messages
