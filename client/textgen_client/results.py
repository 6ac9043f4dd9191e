"""What a caller gets back: a whole generation, a chunk of a stream, the answer about a grammar, the state of a model.

Plain frozen records; they know neither Triton nor gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a request's `n` answers: its whole text, or in a stream what a response adds to it.

    finish_reason: `length`, `eos_token`, `stop_sequence` or `timeout`; None while the choice goes on.
    logprobs: parsed JSON, one entry per token of `text`, when `return_logprobs` was asked for.
    """

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: Any = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What one response of the server says; `Generation` and `Chunk` tell whole answers from parts.

    num_input_tokens, num_output_tokens (of all choices): None unless asked for. details: parsed JSON, when `details`
    was asked for. text, finish_reason and logprobs are those of the first choice.
    """

    request_id: str
    choices: tuple[Choice, ...]
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    details: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> Any:
        return self.choices[0].logprobs


@dataclass(frozen=True, slots=True)
class Generation(Answer):
    """The whole answer to a request."""


@dataclass(frozen=True, slots=True)
class Chunk(Answer):
    """A part of a streamed answer. `text` is the delta: all of them joined are the whole text.

    is_final: the server's last word on this request; a stream that ends without one raises instead.
    """

    is_final: bool = False


@dataclass(frozen=True, slots=True)
class GrammarCheck:
    """What the server says of a grammar, and of a text held against it.

    backend, warnings: what enforces a supported grammar, and what of it is not enforced. error: why it is not
    supported. accepted: whether the server could generate the text; None where none was given, the grammar is not
    supported, or the walk could not be finished. accepted_prefix: characters of the text that the grammar takes.
    reason: why the text is not accepted.
    """

    supported: bool
    backend: str | None = None
    warnings: tuple[str, ...] = ()
    error: str | None = None
    accepted: bool | None = None
    accepted_prefix: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter of the server. num_bytes: of its matrices. at_start: the server was started with it.

    live_requests: those that run with it now. unloading: its name is gone, and those end it.
    """

    name: str
    rank: int
    num_layers: int
    num_bytes: int
    at_start: bool
    live_requests: int
    unloading: bool


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text: `text` is the characters from `start` to `stop` of it."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A prompt as the model reads it. text: the given one, or the messages as the chat template renders them."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model says of itself: where it came from, where it runs (`cpu`, `cuda`), and its limits; lengths in
    tokens."""

    model_id: str
    device: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_total_tokens: int


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One version of a model in the server's repository. state: `READY`, `LOADING`, `UNAVAILABLE`, ... or empty."""

    name: str
    version: str
    state: str
    reason: str = ""

    @property
    def ready(self) -> bool:
        return self.state == "READY"
