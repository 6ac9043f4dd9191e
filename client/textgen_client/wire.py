"""Requests as Triton's gRPC messages, and messages back as chunks. No sockets here: both clients share this file.

The messages are tritonclient's own (`service_pb2`); of the library's client classes none is used. They allow one
stream per object, run callbacks on a thread that keeps the process from exiting, and the asyncio one cannot ask for
the empty final response, without which a stream cut by a stopping server looks like one that ended.
"""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tritonclient.grpc import InferResult, service_pb2

from textgen_client.channel import DEFAULT_MODEL
from textgen_client.errors import GenerationError, ValidationError, error_from_text
from textgen_client.results import Adapter, Choice, Chunk, Generation, GrammarCheck, ModelInfo, Token, Tokenization

# Parameters that travel as tensors of their own, named as Triton's vLLM backend names them.
_FLAGS = (
    "exclude_input_in_output",
    "return_finish_reason",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_logprobs",
)

# A response costs more with every tensor, so a stream brings no counts unless asked.
GENERATE_DEFAULTS: Mapping[str, Any] = {
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}
STREAM_DEFAULTS: Mapping[str, Any] = {"return_finish_reason": True}


def new_request_id() -> str:
    """An id no other request has; every request carries one, so that any can be cancelled and found in logs."""
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to continue; exactly one of the three is given."""

    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    input_ids: Iterable[int] | None = None


def generate_request(
    model: str,
    request_id: str,
    prompt: Prompt | None,
    *,
    stream: bool,
    timeout_s: float | None,
    parameters: Mapping[str, Any],
) -> Any:
    """The `ModelInferRequest` that asks `model` to continue `prompt` (None: a request that needs none).

    parameters: names of the server's contract; None values are left out, a lone `stop` string becomes a list.
    Raises ValidationError for what cannot be sent at all; ranges and names are the server's to check.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise ValidationError(f"`timeout` must be greater than 0 seconds; given: {timeout_s!r}", request_id)
    sampling = {name: value for name, value in parameters.items() if value is not None}
    flags = {name: bool(sampling.pop(name)) for name in _FLAGS if name in sampling}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    if timeout_s is not None:
        sampling["timeout"] = timeout_s
    request = _request(model, request_id)
    try:
        if prompt is not None:
            _add_prompt(request, prompt)
        if sampling:
            _add_strings(request, "sampling_parameters", [_to_json(sampling)])
    except UnicodeEncodeError as error:
        raise ValidationError(f"text that is not valid Unicode cannot be sent: {error}", request_id) from None
    except (TypeError, ValueError, AttributeError, struct.error) as error:
        raise ValidationError(f"the request cannot be sent: {error}", request_id) from None
    for name, value in {"stream": stream, **flags}.items():
        _add_flag(request, name, value)
    return request


def cancel_request(request_id: str) -> Any:
    """The `ModelInferRequest` that ends the live request with this id.

    It goes to the generator itself: the ensemble has no `cancel`, and its steps carry the ids of its requests.
    """
    request = _request(DEFAULT_MODEL, request_id)
    _add_flag(request, "cancel", True)
    return request


def model_info_request(model: str) -> Any:
    """The `ModelInferRequest` that asks a model about itself."""
    request = _request(model, new_request_id())
    _add_flag(request, "model_info", True)
    return request


def model_info(answer: Generation) -> ModelInfo:
    """The answer to `model_info_request`; GenerationError where the server's text is no such answer."""
    try:
        told = json.loads(answer.text)
        return ModelInfo(**{field.name: told[field.name] for field in fields(ModelInfo)})
    except (ValueError, TypeError, KeyError) as error:
        raise GenerationError(f"the server's answer about its model cannot be read: {error}") from error


def render_request(messages: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> Any:
    """The `ModelInferRequest` for the prompt that the chat template makes of a conversation."""
    return _tokenizer_request("render", ("prompt_text",), Prompt(messages=messages), parameters)


def template_request(name: str | None, has_tools: bool) -> Any:
    """The `ModelInferRequest` for the source of the chat template that a request would be rendered with."""
    tools = [{"type": "function", "function": {"name": "any"}}] if has_tools else None
    return _tokenizer_request("template", ("text",), None, {"chat_template": name, "tools": tools})


def tokenizer_text(response: Any, name: str) -> str:
    """The text in the output `name` of the tokenizer's answer."""
    texts = _strings(InferResult(response), name)
    if not texts:
        raise GenerationError(f"the server's response has no {name}")
    return texts[0]


def tokenize_request(text: str) -> Any:
    """The `ModelInferRequest` for the token ids of a text, special tokens not added."""
    request = service_pb2.ModelInferRequest(model_name="tokenizer", id=new_request_id())
    request.outputs.add(name="input_ids")
    try:
        _add_strings(request, "text_input", [text])
    except UnicodeEncodeError as error:
        raise ValidationError(f"text that is not valid Unicode cannot be sent: {error}") from None
    _add_strings(request, "action", ["tokenize"])
    _add_strings(request, "sampling_parameters", [_to_json({"add_special_tokens": False})])
    return request


def token_ids(response: Any) -> list[int]:
    """The ids in the answer to `tokenize_request`."""
    ids = InferResult(response).as_numpy("input_ids")
    if ids is None:
        raise GenerationError("the server's response has no input_ids")
    return [int(token_id) for token_id in ids.reshape(-1)]


def tokenization_request(prompt: Prompt, parameters: Mapping[str, Any]) -> Any:
    """The `ModelInferRequest` for a text's or a conversation's tokens with their places in the text.

    parameters: those that change the prompt (`tools`, `add_special_tokens`, ...); None values are left out.
    """
    return _tokenizer_request("tokenize", ("prompt_text", "tokens"), prompt, parameters)


def tokenization(response: Any) -> Tokenization:
    """The answer to `tokenization_request`."""
    result = InferResult(response)
    texts, tokens = _strings(result, "prompt_text"), _strings(result, "tokens")
    if not texts or not tokens:
        raise GenerationError("the server's response has no tokens")
    return Tokenization(texts[0], tuple(Token(**token) for token in json.loads(tokens[0])))


def grammar_check_parameters(
    grammar: Mapping[str, Any] | None, text: str | None, others: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameters of a request that asks about its grammar."""
    return {**others, "grammar": grammar, "grammar_check": True if text is None else {"text": text}}


def grammar_check(answer: Generation) -> GrammarCheck:
    """The answer to such a request; GenerationError where the server's text is no such answer."""
    try:
        fields = json.loads(answer.text)
        return GrammarCheck(**{**fields, "warnings": tuple(fields["warnings"])})
    except (ValueError, TypeError, KeyError) as error:
        raise GenerationError(f"the server's answer about the grammar cannot be read: {error}") from error


def adapter_parameters(action: str, name: str | None = None, path: str | None = None) -> dict[str, Any]:
    """The parameters of a request about the server's adapters."""
    command = {"action": action, "name": name, "path": path}
    return {"adapter_command": {field: value for field, value in command.items() if value is not None}}


def adapters(answer: Generation) -> list[Adapter]:
    """The answer to such a request; GenerationError where the server's text is no such answer."""
    try:
        return [Adapter(**fields) for fields in json.loads(answer.text)["adapters"]]
    except (ValueError, TypeError, KeyError) as error:
        raise GenerationError(f"the server's answer about its adapters cannot be read: {error}") from error


class ResponseReader:
    """Reads the responses of one request's stream, in order, and knows whether its final one has come.

    After the final one a call must be read to its end and not be cancelled: in Triton 2.51 a cancellation that meets
    the end of a stream leaves the request behind for ever, and with it a server that cannot be stopped in good order.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self.is_final = False

    def read(self, response: Any) -> Chunk | None:
        """The chunk in a `ModelStreamInferResponse`; None where it carries no tensors.

        Raises the error it carries, which ends the request, and GenerationError for a response that makes no sense.
        """
        if response.error_message:
            self.is_final = True
            raise error_from_text(response.error_message, self._request_id)
        infer_response = response.infer_response
        self.is_final = self.is_final or infer_response.parameters["triton_final_response"].bool_param
        if not infer_response.outputs:
            return None
        try:
            return self._chunk(InferResult(infer_response))
        except (ValueError, TypeError, IndexError, struct.error) as error:
            raise GenerationError(f"the server's response cannot be read: {error}", self._request_id) from error

    def end(self) -> None:
        """To be called when the stream has ended well; raises GenerationError if it ended too early.

        A server that is stopped cuts its streams, and gRPC reports that as a normal end.
        """
        if not self.is_final:
            raise GenerationError("the server ended the stream before its final response", self._request_id)

    def _chunk(self, result: InferResult) -> Chunk:
        texts = _strings(result, "text_output") or [""]
        reasons = _strings(result, "finish_reason") or []
        logprobs = _strings(result, "logprobs") or []
        details = _strings(result, "details")
        return Chunk(
            request_id=self._request_id,
            choices=tuple(
                Choice(
                    index=index,
                    text=text,
                    finish_reason=_known(reasons[index]) if index < len(reasons) else None,
                    logprobs=json.loads(logprobs[index]) if index < len(logprobs) and logprobs[index] else None,
                )
                for index, text in enumerate(texts)
            ),
            num_input_tokens=_total(result, "num_input_tokens"),
            num_output_tokens=_total(result, "num_output_tokens"),
            details=json.loads(details[0]) if details and details[0] else None,
            is_final=self.is_final,
        )


def whole_answer(chunks: Iterable[Chunk], request_id: str) -> Generation:
    """The answer to a request that does not stream: exactly one response with text, else GenerationError."""
    answers = list(chunks)
    if len(answers) != 1:
        raise GenerationError(f"expected one response, the server sent {len(answers)}", request_id)
    only = answers[0]
    return Generation(only.request_id, only.choices, only.num_input_tokens, only.num_output_tokens, only.details)


def _request(model: str, request_id: str) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    # Ask for a final response even where it carries nothing: only it tells an answer from a stream that was cut.
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def _add_prompt(request: Any, prompt: Prompt) -> None:
    if sum(form is not None for form in (prompt.text, prompt.messages, prompt.input_ids)) != 1:
        raise ValueError("give exactly one of `prompt`, `messages` and `input_ids`")
    if prompt.text is not None:
        _add_strings(request, "text_input", [prompt.text])
    elif prompt.messages is not None:
        _add_strings(request, "messages", [_to_json(list(prompt.messages))])
    elif prompt.input_ids is not None:
        ids = list(prompt.input_ids)
        _add_tensor(request, "input_ids", "INT32", len(ids), struct.pack(f"<{len(ids)}i", *ids))


def _tokenizer_request(
    action: str, outputs: Sequence[str], prompt: Prompt | None, parameters: Mapping[str, Any]
) -> Any:
    request = service_pb2.ModelInferRequest(model_name="tokenizer", id=new_request_id())
    for name in outputs:
        request.outputs.add(name=name)
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        if prompt is not None:
            _add_prompt(request, prompt)
        _add_strings(request, "action", [action])
        if given:
            _add_strings(request, "sampling_parameters", [_to_json(given)])
    except UnicodeEncodeError as error:
        raise ValidationError(f"text that is not valid Unicode cannot be sent: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValidationError(f"the request cannot be sent: {error}") from None
    return request


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _add_tensor(request: Any, name: str, datatype: str, size: int, content: bytes) -> None:
    tensor = request.inputs.add(name=name, datatype=datatype)
    tensor.shape.append(size)
    request.raw_input_contents.append(content)


def _add_strings(request: Any, name: str, values: Sequence[str]) -> None:
    encoded = [value.encode() for value in values]
    content = b"".join(struct.pack("<I", len(value)) + value for value in encoded)
    _add_tensor(request, name, "BYTES", len(encoded), content)


def _add_flag(request: Any, name: str, value: bool) -> None:
    _add_tensor(request, name, "BOOL", 1, b"\x01" if value else b"\x00")


def _strings(result: InferResult, name: str) -> list[str] | None:
    array = result.as_numpy(name)
    return None if array is None else [value.decode(errors="replace") for value in array.reshape(-1)]


def _total(result: InferResult, name: str) -> int | None:
    array = result.as_numpy(name)
    return None if array is None else int(array.sum())


def _known(finish_reason: str) -> str | None:
    # Servers that send the tensor with every response say "" or, as vLLM's backend does, "None" until the end.
    return finish_reason if finish_reason not in ("", "None") else None
