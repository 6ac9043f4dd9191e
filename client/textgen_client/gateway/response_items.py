"""/v1/responses: what a request's items mean as a chat. The other direction is responses.py's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from textgen_client.errors import ToolError, ValidationError
from textgen_client.gateway.exchange import server_parameters
from textgen_client.gateway.openai_bodies import ChatRequest, ResponsesRequest

LOGPROBS = "message.output_text.logprobs"

# What needs a store, or a worker that outlives the connection.
_UNSUPPORTED = ("previous_response_id", "conversation", "prompt", "background")
_OWN_FIELDS = frozenset(
    {
        "background", "conversation", "include", "input", "instructions", "max_output_tokens", "model",
        "parallel_tool_calls", "previous_response_id", "prompt", "reasoning", "stream", "stream_options", "temperature",
        "text", "tool_choice", "tools", "top_logprobs",
    }
)  # fmt: skip


def parameters_of(body: ResponsesRequest) -> dict[str, Any]:
    """The parameters of the server that a request gives. Details tell its tokens, of which the usage has to speak."""
    wants_logprobs = body.top_logprobs is not None or LOGPROBS in (body.include or [])
    return {
        **server_parameters(body, _OWN_FIELDS),
        "max_tokens": body.max_output_tokens,
        "details": True,
        "top_n_tokens": (body.top_logprobs or None) if wants_logprobs else None,
    }


def chat_of(body: ResponsesRequest) -> ChatRequest:
    """The conversation, the tools and the form of the answer, as a chat has them. Raises ValidationError, ToolError."""
    for name in _UNSUPPORTED:
        if getattr(body, name):
            raise ValidationError(
                f"`{name}` is not supported: nothing is stored; send the whole conversation as `input`"
            )
    tools, choice = _tools(body.tools or [], body.tool_choice)
    extra = body.model_extra or {}
    return ChatRequest(
        messages=_messages(body),
        response_format=_response_format(body),
        tools=tools or None,
        tool_choice=choice if tools or choice not in ("auto", "none") else None,
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        **{name: extra[name] for name in ("chat_template", "chat_template_kwargs", "documents") if name in extra},
    )


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    reasoning = ""
    for number, item in enumerate(items):
        where = f"input[{number}]"
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "reasoning":
            reasoning += "".join(_text_of(part, where) for part in item.get("content") or [])
        elif kind == "function_call_output":
            content = _content(item.get("output"), where)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        elif kind in ("message", "function_call"):
            message = _message(item, where) if kind == "message" else _calling(item, messages, where)
            if message["role"] == "assistant" and reasoning:
                message["reasoning_content"] = reasoning
            reasoning = ""
            if not messages or message is not messages[-1]:
                messages.append(message)
        else:
            raise ValidationError(f"`{where}` is of type {kind!r:.100}, which this server does not take")
    if not messages:
        raise ValidationError("`input` must not be empty")
    return messages


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise ValidationError(f"`{where}.role` must be user, assistant, system or developer; given: {role!r:.100}")
    return {"role": "system" if role == "developer" else role, "content": _content(item.get("content"), where)}


def _calling(item: Mapping[str, Any], messages: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """The assistant's message that holds a call: the last one, if it is the assistant's."""
    name, arguments = item.get("name"), item.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise ValidationError(f"`{where}` must have a `name` and, as a string of JSON, `arguments`")
    call = {"id": item.get("call_id"), "type": "function", "function": {"name": name, "arguments": arguments}}
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        last = {"role": "assistant", "content": None}
    last.setdefault("tool_calls", []).append(call)
    return last


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValidationError(f"`{where}` must have text, or a list of parts")
    return "".join(_text_of(part, where) for part in content)


def _text_of(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if kind not in ("input_text", "output_text", "reasoning_text", "summary_text", "refusal", "text"):
        raise ValidationError(f"`{where}` has a part of type {kind!r:.100}; this server takes text only")
    if not isinstance(text, str):
        raise ValidationError(f"`{where}` has a part without text")
    return text


def _tools(tools: list[dict[str, Any]], choice: Any) -> tuple[list[dict[str, Any]], Any]:
    """Tools and choice as a chat has them."""
    functions = []
    for number, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise ToolError(
                f"`tools[{number}]` is of type {tool.get('type')!r:.100}; this server calls none of its own"
            )
        fields = ("name", "description", "parameters", "strict")
        function = {field: tool[field] for field in fields if tool.get(field) is not None}
        functions.append({"type": "function", "function": function})
    if not isinstance(choice, dict):
        return functions, choice
    if choice.get("type") == "function":
        return functions, {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools":
        allowed = [tool.get("name") for tool in choice.get("tools") or [] if isinstance(tool, dict)]
        kept = [tool for tool, given in zip(functions, tools, strict=True) if given.get("name") in allowed]
        return kept, choice.get("mode", "auto")
    raise ToolError(f"`tool_choice` {json.dumps(choice)[:200]} is none that this server knows")


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    wanted = body.text.format if body.text else None
    if wanted is None or wanted.get("type") == "text":
        return None
    if wanted.get("type") != "json_schema":
        return wanted
    fields = {name: value for name, value in wanted.items() if name != "type"}
    return {"type": "json_schema", "json_schema": fields}
