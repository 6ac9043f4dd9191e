"""What TGI's routes take and answer. The meaning of parameters, and most of their limits, are the server's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_UINT64 = 2**64 - 1


class Grammar(BaseModel):
    """A form that the text must have."""

    model_config = ConfigDict(extra="allow")

    type: str
    value: Any = None


class GenerateParameters(BaseModel):
    """Every parameter of TGI; this server's further ones (docs/parameters.md) may stand beside them."""

    model_config = ConfigDict(extra="allow", strict=True)

    best_of: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    do_sample: bool | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=2**32 - 1)] | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: Annotated[int, Field(ge=1)] | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: Annotated[int, Field(ge=0, le=_UINT64)] | None = None
    top_n_tokens: Annotated[int, Field(ge=0)] | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None


class GenerateRequest(BaseModel):
    """A prompt and how to continue it."""

    model_config = ConfigDict(extra="forbid")

    inputs: str
    parameters: GenerateParameters | None = None


class CompatRequest(GenerateRequest):
    """As GenerateRequest; `stream` chooses the form of the answer."""

    stream: bool = False


class Token(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(BaseModel):
    """A token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class Sequence(BaseModel):
    """What is told of one generated sequence."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class BestOfSequence(Sequence):
    """A sequence that best_of did not pick."""

    generated_text: str


class Details(Sequence):
    """What is told of the answer."""

    best_of_sequences: list[BestOfSequence] | None = None
    warnings: list[str] | None = None


class GenerateResponse(BaseModel):
    """The answer; `details` on request."""

    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    """What is told of a streamed answer, in its last event."""

    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(BaseModel):
    """One event: a token, and with the last one the whole text."""

    index: int
    token: Token
    top_tokens: list[Token] | None = None
    generated_text: str | None
    details: StreamDetails | None


class ErrorResponse(BaseModel):
    """Every error."""

    error: str
    error_type: str


class SimpleToken(BaseModel):
    """A token of a text and its place there, in characters."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(BaseModel):
    """A conversation as the model reads it."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class Info(BaseModel):
    """What is served. null: not known."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse, "description": text}
    for code, text in {
        400: "the body is no JSON",
        401: "no valid API key",
        408: "the request's time was up",
        413: "the body is too large",
        415: "the body's type is not JSON",
        422: "the request is wrong",
        424: "generation failed",
        429: "the model is overloaded",
        503: "the model is not ready",
    }.items()
}
STREAM: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"description": "a stream of events", "content": {"text/event-stream": {}}},
}
EITHER: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    404: {"model": ErrorResponse, "description": "no such model"},
    200: {
        "description": "the answer, or a stream of events",
        "content": {"application/json": {"schema": {}}, "text/event-stream": {}},
    },
}
