"""Requests carry what was asked, unchanged; responses are read in full or refused."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textgen_client import GenerationError, ValidationError, wire

from .fake_triton import flag_of, parameters_of, response, strings_of


def _request(
    prompt: wire.Prompt | None = None, stream: bool = False, timeout_s: float | None = None, **parameters: Any
) -> Any:
    return wire.generate_request(
        "textgen", "id-1", prompt or wire.Prompt("hi"), stream=stream, timeout_s=timeout_s, parameters=parameters
    )


@given(text=st.text(), stop=st.lists(st.text()))
def test_text_travels_unchanged(text: str, stop: list[str]) -> None:
    request = _request(wire.Prompt(text), stop=stop, grammar={"type": "regex", "value": text})
    assert strings_of(request, "text_input") == [text]
    assert parameters_of(request) == {"stop": stop, "grammar": {"type": "regex", "value": text}}


@given(ids=st.lists(st.integers(0, 2**31 - 1)))
def test_ids_travel_unchanged(ids: list[int]) -> None:
    request = _request(wire.Prompt(input_ids=ids))
    assert request.inputs[0].name == "input_ids"
    assert list(request.inputs[0].shape) == [len(ids)]
    assert list(struct.unpack(f"<{len(ids)}i", request.raw_input_contents[0])) == ids


def test_messages_are_json() -> None:
    messages = [{"role": "user", "content": "Grüße 🦙"}]
    request = _request(wire.Prompt(messages=messages))
    assert [json.loads(text) for text in strings_of(request, "messages") or []] == [messages]


def test_flags_are_tensors_and_the_rest_is_json() -> None:
    request = _request(
        stream=True, timeout_s=2.5, return_logprobs=True, return_finish_reason=False, stop="END", seed=None, top_k=5
    )
    assert flag_of(request, "stream") is True
    assert flag_of(request, "return_logprobs") is True
    assert flag_of(request, "return_finish_reason") is False
    assert flag_of(request, "return_num_input_tokens") is None
    assert parameters_of(request) == {"stop": ["END"], "top_k": 5, "timeout": 2.5}
    assert request.parameters["triton_enable_empty_final_response"].bool_param
    assert (request.model_name, request.id) == ("textgen", "id-1")


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": wire.Prompt()},
        {"prompt": wire.Prompt("a", input_ids=[1])},
        {"prompt": wire.Prompt("\ud800")},
        {"prompt": wire.Prompt(3)},  # type: ignore[arg-type]
        {"prompt": wire.Prompt(input_ids=[2**31])},
        {"prompt": wire.Prompt(input_ids=[1.5])},  # type: ignore[list-item]
        {"temperature": float("nan")},
        {"stop": ["\udfff"]},
        {"grammar": object()},
        {"timeout_s": 0},
        {"timeout_s": -1.0},
    ],
)
def test_what_cannot_be_sent_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        _request(**bad)
    assert caught.value.request_id == "id-1"


def test_all_outputs_are_read() -> None:
    reader = wire.ResponseReader("id-1")
    chunk = reader.read(
        response(
            final=True,
            text_output=["é", "🦙"],
            finish_reason=["None", "length"],
            logprobs=['[{"5": {"logprob": -1}}]', ""],
            num_input_tokens=[7],
            num_output_tokens=[1, 2],
            details='{"tokens": []}',
        )
    )
    assert chunk is not None
    assert [choice.text for choice in chunk.choices] == ["é", "🦙"]
    assert [choice.finish_reason for choice in chunk.choices] == [None, "length"]
    assert [choice.logprobs for choice in chunk.choices] == [[{"5": {"logprob": -1}}], None]
    assert (chunk.num_input_tokens, chunk.num_output_tokens) == (7, 3)
    assert chunk.details == {"tokens": []}
    assert chunk.is_final
    reader.end()


def test_an_empty_final_response_ends_without_a_chunk() -> None:
    reader = wire.ResponseReader("id-1")
    assert reader.read(response(text_output="a")) is not None
    with pytest.raises(GenerationError, match="before its final response"):
        reader.end()
    assert reader.read(response(final=True)) is None
    reader.end()


def test_a_response_that_makes_no_sense_is_an_error() -> None:
    with pytest.raises(GenerationError, match="cannot be read"):
        wire.ResponseReader("id-1").read(response(text_output="a", details="{"))
    reader = wire.ResponseReader("id-1")
    chunks = [reader.read(response(text_output="a")), reader.read(response(text_output="b", final=True))]
    with pytest.raises(GenerationError, match="sent 2"):
        wire.whole_answer([chunk for chunk in chunks if chunk], "id-1")
