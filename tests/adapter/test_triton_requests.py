"""What a client sends to the engine's request; the real Triton is in tests/server."""

from __future__ import annotations

from typing import Any

import pytest

from textgen_engine import errors
from textgen_engine.config import GrammarConfig
from textgen_engine.messages import EngineInfo
from textgen_engine.parameters import ParameterLimits

from .fake_backend import request

INFO = EngineInfo(
    vocab_size=100, max_input_tokens=10, max_total_tokens=16, num_blocks=8, block_size=4, eos_token_ids=frozenset({2})
)


@pytest.fixture
def parse(triton_requests: Any) -> Any:
    def parse(**inputs: Any) -> Any:
        return triton_requests.parse_request(
            request(**inputs), limits=ParameterLimits(), vocab_size=100, grammar_config=GrammarConfig()
        )

    return parse


@pytest.fixture
def build(triton_requests: Any, parse: Any) -> Any:
    def build(timeout_s: float | None = None, **inputs: Any) -> Any:
        parsed = parse(**inputs)
        ids = parsed.input_ids if parsed.input_ids is not None else [5, 6, 7]
        return triton_requests.build_request(
            parsed, request_id="7", prompt_ids=ids, info=INFO, arrival_s=100.0, timeout_s=timeout_s
        )

    return build


def test_the_trace_that_a_request_is_part_of(triton_requests: Any, parse: Any) -> None:
    by_header = {"traceparent": "00-a", "tracestate": "v=1"}
    traced = request(text_input="a", parameters=by_header, sampling_parameters={"traceparent": "00-b"})
    assert triton_requests.trace_context(traced) == by_header
    assert triton_requests.trace_context(request(sampling_parameters={"traceparent": "00-b"})) == {
        "traceparent": "00-b"
    }
    assert triton_requests.trace_context(request(parameters=by_header, traced_by_triton={"traceparent": "00-c"})) == {
        "traceparent": "00-c"
    }
    for nonsense in ('{"traceparent": 3}', "no json", "[1]", "[" * 100_000):
        assert triton_requests.trace_context(request(sampling_parameters=nonsense)) == {}
    # Neither is a sampling parameter, and two that differ are no conflict.
    parsed = parse(text_input="a", parameters=by_header, sampling_parameters={"traceparent": "00-b", "n": 1})
    assert parsed.given_parameters == {"n": 1}


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "none was given"),
        ({"text_input": "a", "messages": []}, "text_input and messages were given"),
        ({"text_input": "a", "messages": [], "input_ids": [1]}, "text_input and messages and input_ids were given"),
    ],
)
def test_exactly_one_prompt(parse: Any, inputs: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.InvalidParameter, match=says):
        parse(**inputs)


def test_a_plain_request_asks_for_nothing_more(parse: Any) -> None:
    parsed = parse(text_input="a")
    assert parsed.prompt_form == "text_input"
    options = parsed.options
    assert not any((options.stream, options.return_full_text, options.finish_reason, options.logprobs, options.details))
    assert options.num_choices == 1


def test_parameters_of_three_places_are_one_set(parse: Any) -> None:
    parsed = parse(
        text_input="a", sampling_parameters={"top_k": 5}, parameters={"max_new_tokens": 3, "top_k": 5}, stop=["x", "y"]
    )
    assert parsed.given_parameters == {"top_k": 5, "max_new_tokens": 3, "stop": ["x", "y"]}
    assert parsed.parameters.stopping.stop == ("x", "y")


def test_the_same_name_with_two_values_is_refused(parse: Any) -> None:
    with pytest.raises(errors.InvalidParameter, match=r"`top_k` is given twice with different values: 5 .* 6"):
        parse(text_input="a", sampling_parameters={"top_k": 5}, parameters={"top_k": 6})
    with pytest.raises(errors.InvalidParameter, match="`stop` is given twice"):
        parse(text_input="a", sampling_parameters={"stop": ["x"]}, stop=["y"])
    assert parse(text_input="a", sampling_parameters={"stop": "x"}, stop=["x"]).parameters.stopping.stop == ("x",)


def test_parameters_of_triton_and_its_clients_are_not_ours(parse: Any) -> None:
    foreign = {"sequence_id": 0, "sequence_start": False, "sequence_end": False, "binary_data_output": True}
    assert (
        parse(text_input="a", parameters=foreign | {"triton_enable_empty_final_response": True}).given_parameters == {}
    )
    with pytest.raises(errors.InvalidParameter, match="unknown parameter `sequence`"):
        parse(text_input="a", parameters={"sequence": 0})


@pytest.mark.parametrize("text", ["{", "[]", "3", '"x"', "[" * 100_000, "nul", '{"a": ' + "9" * 5000 + "}"])
def test_sampling_parameters_must_be_a_json_object(parse: Any, text: str) -> None:
    with pytest.raises(errors.InvalidParameter, match="`sampling_parameters`"):
        parse(text_input="a", sampling_parameters=text)


@pytest.mark.parametrize("name", ["sampling_parameters", "prompt_text", "stop"])
def test_broken_utf8_is_named_with_its_place(parse: Any, name: str) -> None:
    with pytest.raises(errors.InvalidParameter, match=f"`{name}` must be UTF-8 text; byte 1 is not"):
        parse(text_input="a", **{name: b"x\xff"})


@pytest.mark.parametrize(
    ("inputs", "full"),
    [
        ({}, False),
        ({"sampling_parameters": {"return_full_text": True}}, True),
        ({"exclude_input_in_output": True}, False),
        ({"exclude_input_in_output": False}, True),
        ({"exclude_input_in_output": False, "sampling_parameters": {"return_full_text": True}}, True),
    ],
)
def test_who_wants_the_prompt_in_front(parse: Any, inputs: dict[str, Any], full: bool) -> None:
    assert parse(text_input="a", **inputs).options.return_full_text is full


def test_contradicting_wishes_about_the_prompt_are_refused(parse: Any) -> None:
    with pytest.raises(errors.InvalidParameter, match="`exclude_input_in_output` and `return_full_text`"):
        parse(text_input="a", exclude_input_in_output=True, sampling_parameters={"return_full_text": True})


def test_return_logprobs_makes_the_engine_report_them(parse: Any) -> None:
    assert not parse(text_input="a").parameters.output.logprobs
    assert parse(text_input="a", return_logprobs=True).parameters.output.logprobs


@pytest.mark.parametrize(
    ("timeout_us", "parameter", "default_s", "expected_s"),
    [
        (0, None, None, None),
        (0, None, 9.0, 9.0),
        (2_000_000, None, 9.0, 2.0),
        (0, 3.0, 9.0, 3.0),
        (0, 30.0, 9.0, 30.0),  # a default, not a bound
        (2_000_000, 3.0, None, 2.0),
        (4_000_000, 3.0, None, 3.0),
    ],
)
def test_the_smaller_deadline_counts(
    triton_requests: Any,
    parse: Any,
    timeout_us: int,
    parameter: float | None,
    default_s: float | None,
    expected_s: float | None,
) -> None:
    given = {} if parameter is None else {"timeout": parameter}
    parsed = parse(text_input="a", sampling_parameters=given)
    found = triton_requests.request_timeout_s(request(timeout_us=timeout_us), parsed.parameters, default_s)
    assert found == expected_s


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_the_engines_request(build: Any) -> None:
    sampling = {"max_new_tokens": 4, "priority": 3, "seed": 1, "temperature": 0.5}
    built = build(timeout_s=2.5, text_input="a", stream=True, sampling_parameters=sampling)
    assert (built.request_id, built.prompt_token_ids, built.stream) == ("7", (5, 6, 7), True)
    assert (built.priority, built.arrival_s, built.deadline_s) == (3, 100.0, 102.5)
    assert build(text_input="a").deadline_s is None


@pytest.mark.parametrize(("ids", "says"), [([1, 100], "100 at position 1"), ([-1], "-1 at position 0")])
def test_ids_outside_the_vocabulary(build: Any, ids: list[int], says: str) -> None:
    with pytest.raises(errors.InvalidParameter, match=f"from 0 to 99; given: {says}"):
        build(input_ids=ids)


def test_length_errors_say_both_numbers(build: Any) -> None:
    with pytest.raises(errors.PromptTooLong, match=r"11 tokens.* 10 "):
        build(input_ids=[1] * 11)
    with pytest.raises(errors.PromptTooLong, match=r"10 tokens .* 7; .* 16 "):
        build(input_ids=[1] * 10, sampling_parameters={"max_new_tokens": 7})
    assert build(input_ids=[1] * 10, sampling_parameters={"max_new_tokens": 6}).stopping.max_new_tokens == 6


def test_given_ids_are_truncated_from_the_left(build: Any) -> None:
    assert build(input_ids=list(range(20)), sampling_parameters={"truncate": 3}).prompt_token_ids == (17, 18, 19)
