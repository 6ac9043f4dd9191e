"""The call to the `tokenizer` model: the request that asks it for a prompt's ids, and what its answer means.

Between two models Triton carries an error as text alone: `error_from_text` finds our error in it again.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton_python_backend_utils as pb_utils
from triton_requests import ParsedRequest
from triton_tensors import text_tensor

from textgen_engine.errors import EngineError, NotReady, Overloaded, RequestError, TemplateError, ToolError

_DEAD_STUB = re.compile(r"Stub process '\w+' is not healthy")


def tokenizer_request(request: Any, parsed: ParsedRequest, version: int = -1) -> Any:
    """The BLS request that turns the prompt of a parsed request into ids. version: of the tokenizer; -1: the latest."""
    assert parsed.prompt_form is not None
    inputs = [pb_utils.get_input_tensor_by_name(request, parsed.prompt_form)]
    if parsed.given_parameters:
        inputs.append(text_tensor("sampling_parameters", [json.dumps(parsed.given_parameters)]))
    return pb_utils.InferenceRequest(
        model_name="tokenizer",
        model_version=version,
        requested_output_names=["input_ids", "prompt_text"],
        inputs=inputs,
    )


def read_tokenizer_response(response: Any) -> tuple[list[int], str]:
    """Ids and prompt text. Raises the RequestError that the tokenizer's message stands for."""
    if response.has_error():
        raise error_from_text(response.error().message())
    ids = pb_utils.get_output_tensor_by_name(response, "input_ids").as_numpy()
    text = pb_utils.get_output_tensor_by_name(response, "prompt_text").as_numpy()
    return ids.reshape(-1).tolist(), text.reshape(-1)[0].decode()


def is_from_dead_stub(response: Any) -> bool:
    """Whether Triton itself answered, for a process of the model that has died."""
    return bool(response.has_error()) and _DEAD_STUB.search(response.error().message()) is not None


def error_from_text(text: str) -> EngineError:
    """The error whose public text this is; anything unknown is an EngineFailure of the tokenizer."""
    for kind in (TemplateError, ToolError, NotReady, Overloaded):
        if kind.prefix in text:
            return kind(text.split(kind.prefix + ": ", 1)[-1])
    if RequestError.prefix in text:
        return RequestError(text.split(RequestError.prefix + ": ", 1)[-1])
    return EngineError(f"the tokenizer failed: {text.splitlines()[0][:300] if text else 'no reason given'}")
