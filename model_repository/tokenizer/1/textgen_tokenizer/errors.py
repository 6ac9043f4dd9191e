"""The errors of the tokenizer model. Their texts begin with the same prefixes as the engine's.

The engine's `textgen_engine/errors.py` defines the public texts; this process has only its own folder on its path,
so the four classes it needs are written again here, and a test compares them.
"""

from __future__ import annotations

from typing import Any, ClassVar


class TokenizerError(Exception):
    """Base. `str(error)` is the full public text, prefix included."""

    prefix: ClassVar[str] = "Request failed during generation"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.prefix}: {self.message}"


class InvalidParameter(TokenizerError):
    """An input or parameter that is missing, malformed, out of range, or in conflict with another."""

    prefix = "Input validation error"

    @classmethod
    def for_value(cls, name: str, value: Any, allowed: str) -> InvalidParameter:
        """The usual text: the parameter's name, the value given (cut at 100 characters) and what is allowed."""
        shown = repr(value)
        if len(shown) > 100:
            shown = shown[:97] + "..."
        return cls(f"`{name}` must be {allowed}; given: {shown}")


class PromptTooLong(TokenizerError):
    """The prompt has more tokens than one request may use."""

    prefix = "Input validation error"


class Unsupported(TokenizerError):
    """Something a request of this kind may hold, but not here: an image, offsets from a slow tokenizer."""

    prefix = "Input validation error"


class TemplateError(TokenizerError):
    """The chat template is missing, or refused the messages."""

    prefix = "Template error"


class ToolError(TokenizerError):
    """The tools or the tool choice cannot be honoured."""

    prefix = "Tool error"


class ConfigError(Exception):
    """An option is unknown, out of range, or in conflict with another; raised while the model loads."""
