"""What OpenAI's routes take, and their error. Ranges that differ between servers are the server's own to check."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, strict=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Temperature = Annotated[float, Field(ge=0, le=100)]


class StreamOptions(BaseModel):
    """include_usage: one more chunk, without choices, says how many tokens there were."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None


class Common(BaseModel):
    """What every route takes; this server's further parameters (docs/parameters.md) may stand beside them."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # OpenAI's bound; the server's own (max_best_of) is lower. A message reader is made for each.
    n: Annotated[int, Field(ge=1, le=128, strict=True)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None


class ChatRequest(Common):
    """A conversation to go on with."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    tool_prompt: str | None = None
    reasoning_effort: str | None = None

    def may_call(self) -> bool:
        """Whether the answer may be, or hold, a call of a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    def template_parameters(self) -> dict[str, Any]:
        """Those parameters that change the prompt; None where one is not given."""
        extra = self.model_extra or {}
        names = ("add_generation_prompt", "continue_final_message", "chat_template", "documents")
        kwargs = extra.get("chat_template_kwargs")
        if self.reasoning_effort is not None and (kwargs is None or isinstance(kwargs, dict)):
            kwargs = {"reasoning_effort": self.reasoning_effort, **(kwargs or {})}
        return {
            **{name: extra.get(name) for name in names},
            "chat_template_kwargs": kwargs,
            "tools": self.tools,
            "tool_choice": self.tool_choice,
            "tool_prompt": self.tool_prompt,
        }


class CompletionRequest(Common):
    """Prompts to continue: a text, several, or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, strict=True)] | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: str | None = None


class TextFormat(BaseModel):
    """text: the form that the answer must have (`text`, `json_object`, `json_schema`)."""

    model_config = ConfigDict(extra="allow")

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Reasoning(BaseModel):
    """How much a model is to think, if its template can tell it."""

    model_config = ConfigDict(extra="allow")

    effort: str | None = None


class ResponsesRequest(BaseModel):
    """A conversation in items. Nothing is stored, so it comes whole each time."""

    model_config = ConfigDict(extra="allow")

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None
    include: list[str] | None = None
    text: TextFormat | None = None
    reasoning: Reasoning | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error."""

    error: ErrorBody


_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse} for code in (400, 401, 404, 408, 413, 415, 422, 424, 429, 503)
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    200: {
        "description": "the answer, or a stream of events",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
}
