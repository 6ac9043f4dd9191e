"""The tokenizer is asked for what a request needs, and its errors keep their kind."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from textgen_engine import errors
from textgen_engine.config import GrammarConfig
from textgen_engine.parameters import ParameterLimits

from .fake_backend import InferenceResponse, Tensor, TritonError, request


def test_the_tokenizer_is_asked_with_the_prompt_and_what_changes_it(
    triton_requests: Any, triton_tokenizer: Any
) -> None:
    arrived = request(text_input="a", sampling_parameters={"truncate": 4})
    parsed = triton_requests.parse_request(
        arrived, limits=ParameterLimits(), vocab_size=100, grammar_config=GrammarConfig()
    )
    asked = triton_tokenizer.tokenizer_request(arrived, parsed)
    assert asked.model_name == "tokenizer"
    assert asked.inputs["text_input"].as_numpy().tolist() == [b"a"]
    assert json.loads(asked.inputs["sampling_parameters"].as_numpy()[0]) == {"truncate": 4}


@pytest.mark.parametrize(
    "error",
    [errors.InvalidParameter("a: b"), errors.TemplateError("a: b"), errors.ToolError("x"), errors.NotReady("x")],
)
def test_an_error_of_the_tokenizer_keeps_its_kind(triton_tokenizer: Any, error: errors.EngineError) -> None:
    """A call to another model loses the code; the text has to carry everything."""
    answer = InferenceResponse(error=TritonError(f"Failed to process the request(s), message: {error}"))
    with pytest.raises(errors.EngineError) as raised:
        triton_tokenizer.read_tokenizer_response(answer)
    assert str(raised.value) == str(error)
    assert raised.value.public_type == error.public_type


@pytest.mark.parametrize("text", ["", "Stub process 'tokenizer' is not healthy.", "Traceback\n  File x"])
def test_a_failing_tokenizer_is_no_fault_of_the_client(triton_tokenizer: Any, text: str) -> None:
    with pytest.raises(errors.EngineError) as raised:
        triton_tokenizer.read_tokenizer_response(InferenceResponse(error=TritonError(text)))
    assert not isinstance(raised.value, errors.RequestError)
    assert "\n" not in str(raised.value)


def test_ids_and_text_of_the_tokenizer(triton_tokenizer: Any) -> None:
    tensors = [
        Tensor("input_ids", np.array([1, 2], dtype=np.int32)),
        Tensor("prompt_text", np.array(["é".encode()], dtype=np.object_)),
    ]
    assert triton_tokenizer.read_tokenizer_response(InferenceResponse(tensors)) == ([1, 2], "é")
