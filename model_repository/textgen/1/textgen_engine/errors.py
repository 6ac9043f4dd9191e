"""Every error a user or a machine can cause, in one tree, each with the public type its text announces.

    EngineError
      RequestError            the client's mistake; nothing was generated
        InvalidParameter      a name, type, range or combination that is refused
        PromptTooLong         prompt, or prompt + max_new_tokens, over the limit
        TemplateError         the chat template is missing or refused the messages
        ToolError             the tools or the tool choice make no sense
        GrammarError          a grammar that does not compile
        Unsupported           a known feature this server (or version) does not have
      Overloaded              admission refused: too many requests at once
      DeadlineExceeded        the request's time was up
      Cancelled               the client, or a `cancel` request, ended it
      NotReady                no engine to take the request, and none is coming
      EngineFailure           the engine died or a step failed; started requests are lost
    ConfigError               an option outside its range, at start-up
    ModelLoadError            a checkpoint that cannot be served, at start-up
    RankFailure               one of the processes that share a model is gone; the engine ends, and is restarted

A Triton stream carries an error as text alone, without a status code. So the text itself is the contract: it begins
with `prefix` (Text Generation Inference's own prefixes where it has one), and `kind_of` reads it back. Triton codes
live in triton_responses.py, HTTP codes in the gateway.
"""

from __future__ import annotations

from typing import Any, ClassVar


class EngineError(Exception):
    """Base of all our errors. `str(error)` is the full public text, prefix included."""

    public_type: ClassVar[str] = "generation"
    prefix: ClassVar[str] = "Request failed during generation"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.prefix}: {self.message}"


class RequestError(EngineError):
    """The request itself is wrong; the same request will always be refused."""

    public_type = "validation"
    prefix = "Input validation error"


class InvalidParameter(RequestError):
    """A parameter that is unknown, of the wrong type, out of range, or in conflict with another."""

    @classmethod
    def for_value(cls, name: str, value: Any, allowed: str) -> InvalidParameter:
        """The usual text: the parameter's name, the value given (cut at 100 characters) and what is allowed."""
        shown = repr(value)
        if len(shown) > 100:
            shown = shown[:97] + "..."
        return cls(f"`{name}` must be {allowed}; given: {shown}")


class PromptTooLong(RequestError):
    """The prompt, or prompt plus new tokens, exceeds what one request may use."""


class TemplateError(RequestError):
    """The chat template is missing, or raised while rendering the messages."""

    public_type = "template_error"
    prefix = "Template error"


class ToolError(RequestError):
    """The tools or the tool choice cannot be honoured."""

    public_type = "tool_error"
    prefix = "Tool error"


class GrammarError(RequestError):
    """A grammar (regex, JSON Schema, ...) that is malformed, unsupported or over its limits."""


class Unsupported(RequestError):
    """A parameter of the contract that this server cannot honour."""


class Overloaded(EngineError):
    """Admission refused at once; the same request may succeed later."""

    public_type = "overloaded"
    prefix = "Model is overloaded"


class DeadlineExceeded(EngineError):
    """The request's deadline passed before it could be answered in full."""

    public_type = "timeout"
    prefix = "Request timeout"


class Cancelled(EngineError):
    """Ended by its client, or by a `cancel` request."""

    public_type = "cancelled"
    prefix = "Request cancelled"


class NotReady(EngineError):
    """The server is starting, stopping, or has given up restarting its engine."""

    public_type = "healthcheck"
    prefix = "Model is not ready"


class EngineFailure(EngineError):
    """The engine process died, or the step that this request was part of failed."""


class ConfigError(Exception):
    """An option is unknown, out of range, or in conflict with another; raised while the server starts."""


class ModelLoadError(Exception):
    """The checkpoint is missing, damaged, of an unknown architecture, or does not fit into memory."""


class RankFailure(Exception):
    """A process that holds part of the model is gone, or did not answer in time: no later step can succeed."""
