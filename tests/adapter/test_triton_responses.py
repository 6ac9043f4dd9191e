"""Outputs to tensors, errors to codes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from textgen_engine import errors
from textgen_engine.request import FinishReason, Timings, TokenDetail, TokenOutput

from .fake_backend import Sender, TritonError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidParameter("x"), TritonError.INVALID_ARG),
        (errors.PromptTooLong("x"), TritonError.INVALID_ARG),
        (errors.GrammarError("x"), TritonError.INVALID_ARG),
        (errors.TemplateError("x"), TritonError.INVALID_ARG),
        (errors.ToolError("x"), TritonError.INVALID_ARG),
        (errors.Unsupported("x"), TritonError.UNSUPPORTED),
        (errors.Overloaded("x"), TritonError.UNAVAILABLE),
        (errors.NotReady("x"), TritonError.UNAVAILABLE),
        (errors.EngineFailure("x"), TritonError.INTERNAL),
        (errors.DeadlineExceeded("x"), TritonError.CANCELLED),
        (errors.Cancelled("x"), TritonError.CANCELLED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_has_its_code_and_its_prefix(triton_responses: Any, error: errors.EngineError, code: int) -> None:
    failure = triton_responses.error_response(error).error()
    assert failure.code == code
    assert failure.message() == f"{error.prefix}: x"


def _sent(triton_responses: Any, options: Any, outputs: list[TokenOutput | None], **more: Any) -> Any:
    news = [
        triton_responses.ChoiceNews(
            output, 0 if output is None else len(output.token_ids), output and output.finish_reason and "length"
        )
        for output in outputs
    ]
    arguments = {"prompt_prefix": "", "others": [], "validation_s": 0.5} | more
    sender = Sender()
    triton_responses.send(sender, triton_responses.output_response(options, news, **arguments), final=False)
    return sender.sent[0]


def _last(**more: Any) -> TokenOutput:
    timings = Timings(arrival_s=10.0, scheduled_s=11.0, first_token_s=12.0, finished_s=15.0)
    fields = {"text": "ab", "token_ids": [4, 5], "num_prompt_tokens": 3, "finish_reason": FinishReason.LENGTH}
    return TokenOutput("7", **{**fields, "timings": timings, "is_last": True, **more})


def test_only_the_tensors_asked_for(triton_responses: Any) -> None:
    switches = ("finish_reason", "num_input_tokens", "num_output_tokens", "logprobs", "details")
    assert _sent(triton_responses, triton_responses.ResponseOptions(), [_last()]).names == {"text_output"}
    for name in switches:
        options = triton_responses.ResponseOptions(**{name: True})
        assert _sent(triton_responses, options, [_last()]).names == {"text_output", name}


def test_one_element_per_choice_also_for_those_without_news(triton_responses: Any) -> None:
    options = triton_responses.ResponseOptions(
        finish_reason=True, num_input_tokens=True, num_output_tokens=True, logprobs=True, details=True, num_choices=2
    )
    sent = _sent(triton_responses, options, [None, _last()])
    assert sent["text_output"] == ["", "ab"]
    assert sent["finish_reason"] == ["None", "length"]
    assert sent["num_input_tokens"] == [3]
    assert sent["num_output_tokens"] == [0, 2]
    assert sent["logprobs"] == ["[]", "[]"]
    details = json.loads(sent["details"][0])
    assert details["tokens"] == []
    assert [choice.get("generated_tokens") for choice in details["choices"]] == [None, 2]


def test_the_prompt_goes_before_every_choice(triton_responses: Any) -> None:
    options = triton_responses.ResponseOptions(num_choices=2)
    assert _sent(triton_responses, options, [_last(), None], prompt_prefix="P ")["text_output"] == ["P ab", "P "]


def test_details_are_json_whatever_the_numbers(triton_responses: Any) -> None:
    """JSON has no infinities; a token that a mask excluded has one."""
    top = [TokenDetail(5, "b", -0.5, False), TokenDetail(6, "c", float("-inf"), False)]
    tokens = [TokenDetail(4, "🎉", float("-inf"), False), TokenDetail(5, '"', -0.5, True, top=top)]
    options = triton_responses.ResponseOptions(details=True, logprobs=True)
    output = _last(details=tokens, prompt_details=[TokenDetail(1, "p", None, False)], seed=2**64 - 1)
    sent = _sent(triton_responses, options, [output])
    details = json.loads(sent["details"][0], parse_constant=pytest.fail)
    assert details["tokens"][0] == {"id": 4, "text": "🎉", "logprob": None, "special": False}
    assert details["top_tokens"][1][1]["logprob"] is None
    assert details["prefill"] == [{"id": 1, "text": "p", "logprob": None}]
    assert details["seed"] == 2**64 - 1
    first, second = json.loads(sent["logprobs"][0], parse_constant=pytest.fail)
    assert first == {"4": {"logprob": None, "rank": None, "decoded_token": "🎉"}}
    assert second["5"]["rank"] == 1
    assert second["6"] == {"logprob": None, "rank": 2, "decoded_token": "c"}


def test_timings_add_up(triton_responses: Any) -> None:
    sent = _sent(triton_responses, triton_responses.ResponseOptions(details=True), [_last()])
    timings = json.loads(sent["details"][0])["timings"]
    assert timings == {
        "total_time": 5.0,
        "validation_time": 0.5,
        "queue_time": 0.5,
        "inference_time": 4.0,
        "time_per_token": 2.0,
    }


def test_candidates_that_best_of_did_not_pick_are_in_the_details(triton_responses: Any) -> None:
    options = triton_responses.ResponseOptions(details=True)
    sent = _sent(triton_responses, options, [_last()], others=[_last(text="zz", choice=1)])
    [other] = json.loads(sent["details"][0])["best_of_sequences"]
    assert (other["generated_text"], other["generated_tokens"]) == ("zz", 2)
