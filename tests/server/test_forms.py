"""One prompt, every way to send it: the same text. And what a response carries: tensors, flag, whole characters."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .wire import Outcome, Wire

MESSAGES = [{"role": "user", "content": "Name three colours of the rainbow."}]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 1234}
COUNTING = "One, two, three, four,"


def _over_grpc(wire: Wire, stream: bool, **request: Any) -> str:
    return wire.ask(stream=stream, **request).text


def _over_http(wire: Wire, stream: bool, model: str, sampling_parameters: dict[str, Any], **prompt: Any) -> str:
    body = {"sampling_parameters": json.dumps(sampling_parameters), "stream": stream}
    body |= {name: json.dumps(value) if name == "messages" else value for name, value in prompt.items()}
    if stream:
        return "".join(event["text_output"] for event in wire.open_events(body, model=model))
    status, answer = wire.post(body, model=model)
    assert status == 200, answer
    text: str = answer["text_output"]
    return text


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
def test_every_form_and_transport_gives_the_same_text(wire: Wire, sampling: dict[str, Any]) -> None:
    parameters = {"max_new_tokens": 12, **sampling}
    encoded = wire.ask(model="tokenizer", messages=MESSAGES).responses[0].tensors
    forms: list[dict[str, Any]] = [
        {"messages": MESSAGES},
        {"text_input": encoded["prompt_text"][0]},
        {"input_ids": encoded["input_ids"]},
    ]
    ways = list(itertools.product(("textgen", "ensemble"), forms, (_over_grpc, _over_http), (False, True)))
    with ThreadPoolExecutor(len(ways)) as threads:
        waiting = [
            threads.submit(ask, wire, stream, model=model, sampling_parameters=parameters, **form)
            for model, form, ask, stream in ways
        ]
    texts = [answer.result() for answer in waiting]
    assert len(texts) == 24
    assert texts == [texts[0]] * len(texts), [way for way, text in zip(ways, texts, strict=True) if text != texts[0]]
    assert len(texts[0]) > 15


def test_parameters_count_the_same_wherever_they_stand(wire: Wire) -> None:
    as_json = wire.ask(text_input=COUNTING, sampling_parameters={"max_new_tokens": 6, "stop": ["x"]})
    as_scalars = wire.ask(text_input=COUNTING, parameters={"max_new_tokens": 6}, stop=["x"])
    as_both = wire.ask(
        text_input=COUNTING, parameters={"max_new_tokens": 6}, sampling_parameters={"max_new_tokens": 6}, stop=["x"]
    )
    _, over_http = wire.post({"text_input": COUNTING, "max_new_tokens": 6, "stop": ["x"]})
    assert as_json.text == as_scalars.text == as_both.text == over_http["text_output"] != ""


# ---- the final flag -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wants_empty_final", [True, False])
@pytest.mark.parametrize("model", ["textgen", "ensemble"])
@pytest.mark.parametrize(
    "parameters",
    [{"max_new_tokens": 6}, {"max_new_tokens": 1}, {"max_new_tokens": 40, "stop": ["seven"]}],
    ids=["length", "one token", "stop"],
)
def test_the_final_flag_rides_on_the_last_response_with_text(
    wire: Wire, parameters: dict[str, Any], model: str, wants_empty_final: bool
) -> None:
    for stream in (True, False):
        responses = wire.ask(
            model=model,
            text_input=COUNTING,
            stream=stream,
            sampling_parameters=parameters,
            wants_empty_final=wants_empty_final,
        ).responses
        assert [response.final for response in responses] == [False] * (len(responses) - 1) + [True]
        assert all(response.tensors.keys() == {"text_output"} for response in responses)
        assert stream or len(responses) == 1


def test_streams_under_load_carry_one_final_flag_each(wire: Wire) -> None:
    """More streams than TEXTGEN_GATHER_STREAMS: several tokens may share a response."""
    request = {"text_input": COUNTING, "stream": True, "sampling_parameters": {"max_new_tokens": 12}}
    alone = wire.ask(**request)
    together = [waiting.result() for waiting in [wire.ask_soon(**request) for _ in range(12)]]
    assert {outcome.text for outcome in together} == {alone.text}
    for outcome in together:
        finals = [response.final for response in outcome.responses]
        assert finals == [False] * (len(finals) - 1) + [True]


# ---- which tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["textgen", "ensemble"])
def test_only_what_is_asked_for_is_sent(wire: Wire, model: str, stream: bool) -> None:
    switches: dict[str, dict[str, Any]] = {
        "finish_reason": {"return_finish_reason": True},
        "num_input_tokens": {"return_num_input_tokens": True},
        "num_output_tokens": {"return_num_output_tokens": True},
        "logprobs": {"return_logprobs": True},
        "details": {"parameters": {"details": True}},
    }
    request = {"model": model, "text_input": COUNTING, "stream": stream, "sampling_parameters": {"max_new_tokens": 3}}
    for name, switch in switches.items():
        for response in wire.ask(**request, **switch).responses:
            assert response.tensors.keys() == {"text_output", name}
    everything = {key: value for switch in switches.values() for key, value in switch.items()}
    for response in wire.ask(**request, **everything).responses:
        assert response.tensors.keys() == {"text_output", *switches}
    nothing = dict.fromkeys((key for key in everything if key != "parameters"), False)
    for response in wire.ask(**request, **nothing).responses:
        assert response.tensors.keys() == {"text_output"}


def test_counts_and_finish_reason(wire: Wire) -> None:
    ids = wire.ask(model="tokenizer", text_input=COUNTING).responses[0].tensors["input_ids"]
    flags = {"return_finish_reason": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
    request = {"text_input": COUNTING, "sampling_parameters": {"max_new_tokens": 5}, **flags}
    [whole] = wire.ask(**request).responses
    assert whole.tensors["finish_reason"] == ["length"]
    assert whole.tensors["num_input_tokens"] == [len(ids)]
    assert whole.tensors["num_output_tokens"] == [5]
    streamed = wire.ask(**request, stream=True).responses
    assert [response.tensors["finish_reason"] for response in streamed[:-1]] == [["None"]] * (len(streamed) - 1)
    assert streamed[-1].tensors["finish_reason"] == ["length"]
    assert {response.tensors["num_input_tokens"][0] for response in streamed} == {len(ids)}
    assert sum(response.tensors["num_output_tokens"][0] for response in streamed) == 5


def test_every_finish_reason(wire: Wire) -> None:
    def reason(**sampling: Any) -> tuple[str, str]:
        outcome = wire.ask(text_input=COUNTING, sampling_parameters=sampling, return_finish_reason=True)
        return outcome.responses[0].tensors["finish_reason"][0], outcome.text

    assert reason(max_new_tokens=2)[0] == "length"
    kind, text = reason(max_new_tokens=40, stop=["seven"])
    assert (kind, "six" in text, "sev" in text) == ("stop_sequence", True, False)
    end_of_text = wire.ask(
        messages=[{"role": "user", "content": "Say hi."}],
        sampling_parameters={"max_new_tokens": 200},
        return_finish_reason=True,
    )
    assert end_of_text.responses[0].tensors["finish_reason"] == ["eos_token"]
    assert "<|im_end|>" not in end_of_text.text


# ---- choices --------------------------------------------------------------------------------------------------------


def test_choices_are_elements(wire: Wire) -> None:
    request: dict[str, Any] = {
        "text_input": "My favourite animal is",
        "sampling_parameters": {"n": 2, "seed": 5, "temperature": 1.5, "max_new_tokens": 8, "details": True},
        "return_finish_reason": True,
        "return_num_output_tokens": True,
    }
    [whole] = wire.ask(**request).responses
    texts = whole.tensors["text_output"]
    assert len(texts) == 2
    assert texts[0] != texts[1]
    assert whole.tensors["finish_reason"] == ["length", "length"]
    assert whole.tensors["num_output_tokens"] == [8, 8]
    assert len(whole.details["choices"]) == 2
    streamed = wire.ask(**request, stream=True).responses
    assert all(len(response.tensors["text_output"]) == 2 for response in streamed)
    assert [response.final for response in streamed].count(True) == 1
    for choice in range(2):
        assert "".join(response.tensors["text_output"][choice] for response in streamed) == texts[choice]
        assert sum(response.tensors["num_output_tokens"][choice] for response in streamed) == 8
        assert streamed[-1].tensors["finish_reason"][choice] == "length"


def test_best_of_reports_the_best_and_the_others(wire: Wire) -> None:
    parameters = {"best_of": 2, "temperature": 1.5, "max_new_tokens": 6, "details": True}
    [response] = wire.ask(text_input="My favourite animal is", sampling_parameters=parameters).responses
    assert len(response.tensors["text_output"]) == 1
    [other] = response.details["best_of_sequences"]
    ours = sum(token["logprob"] for token in response.details["tokens"]) / 6
    assert ours >= sum(token["logprob"] for token in other["tokens"]) / 6


# ---- the prompt in front --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["textgen", "ensemble"])
def test_the_prompt_comes_back_when_asked_for(wire: Wire, model: str) -> None:
    def text(outcome: Outcome) -> str:
        assert outcome.errors == []
        return outcome.text

    request: dict[str, Any] = {"model": model, "text_input": COUNTING}
    sampling = {"max_new_tokens": 4}
    bare = text(wire.ask(**request, sampling_parameters=sampling))
    full = {**sampling, "return_full_text": True}
    assert text(wire.ask(**request, sampling_parameters=full)) == COUNTING + bare
    assert text(wire.ask(**request, sampling_parameters=full, stream=True)) == COUNTING + bare
    assert text(wire.ask(**request, sampling_parameters=sampling, exclude_input_in_output=False)) == COUNTING + bare
    assert text(wire.ask(**request, sampling_parameters=sampling, exclude_input_in_output=True)) == bare
    encoded = wire.ask(model="tokenizer", messages=MESSAGES).responses[0].tensors
    for form in ({"messages": MESSAGES}, {"input_ids": encoded["input_ids"]}):
        answer = text(wire.ask(model=model, sampling_parameters=full, **form))
        assert answer.startswith(encoded["prompt_text"][0])


# ---- details --------------------------------------------------------------------------------------------------------


def test_details_of_a_whole_answer(wire: Wire) -> None:
    sampling = {"max_new_tokens": 5, "decoder_input_details": True, "top_n_tokens": 3, **SAMPLED}
    [response] = wire.ask(text_input=COUNTING, sampling_parameters=sampling).responses
    details = response.details
    ids = wire.ask(model="tokenizer", text_input=COUNTING).responses[0].tensors["input_ids"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 5
    assert details["seed"] == 1234
    assert details["input_length"] == len(ids)
    assert [token["id"] for token in details["prefill"]] == ids
    assert details["prefill"][0]["logprob"] is None
    assert all(token["logprob"] <= 0 for token in details["prefill"][1:])
    assert len(details["tokens"]) == 5
    assert all(token.keys() == {"id", "text", "logprob", "special"} for token in details["tokens"])
    assert "".join(token["text"] for token in details["tokens"]) == response.text
    for top in details["top_tokens"]:
        logprobs = [token["logprob"] for token in top]
        assert len(top) == 3
        assert logprobs == sorted(logprobs, reverse=True)
    timings = details["timings"]
    assert timings.keys() == {"total_time", "validation_time", "queue_time", "inference_time", "time_per_token"}
    assert timings["total_time"] >= timings["inference_time"] > 0


def test_details_of_a_stream_add_up_to_those_of_the_whole_answer(wire: Wire) -> None:
    request = {"text_input": COUNTING, "sampling_parameters": {"max_new_tokens": 6, "details": True, "top_n_tokens": 2}}
    [whole] = wire.ask(**request).responses
    streamed = wire.ask(**request, stream=True).responses
    parts = [response.details for response in streamed]
    assert [token for part in parts for token in part["tokens"]] == whole.details["tokens"]
    assert [top for part in parts for top in part["top_tokens"]] == whole.details["top_tokens"]
    assert all("finish_reason" not in part for part in parts[:-1])
    for name in ("finish_reason", "generated_tokens", "seed", "input_length", "prefill"):
        assert parts[-1][name] == whole.details[name]
    assert whole.details["prefill"] == []
    assert whole.details["seed"] is None


def test_a_drawn_seed_is_reported_and_repeats_the_text(wire: Wire) -> None:
    sampling: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.2, "details": True}
    [first] = wire.ask(text_input=COUNTING, sampling_parameters=sampling).responses
    sampling["seed"] = first.details["seed"]
    assert wire.ask(text_input=COUNTING, sampling_parameters=sampling).text == first.text


def test_logprobs_have_the_form_of_the_vllm_backend(wire: Wire) -> None:
    request = {"text_input": COUNTING, "sampling_parameters": {"max_new_tokens": 4, "details": True}}
    [whole] = wire.ask(**request, return_logprobs=True).responses
    entries = json.loads(whole.tensors["logprobs"][0])
    tokens = whole.details["tokens"]
    assert [[*entry] for entry in entries] == [[str(token["id"])] for token in tokens]
    for entry, token in zip(entries, tokens, strict=True):
        [value] = entry.values()
        assert (value["logprob"], value["decoded_token"]) == (token["logprob"], token["text"])
    streamed = wire.ask(**request, return_logprobs=True, stream=True).responses
    assert [entry for r in streamed for entry in json.loads(r.tensors["logprobs"][0])] == entries


# ---- text that is safe to show --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["textgen", "ensemble"])
def test_no_delta_ends_in_half_a_character(wire: Wire, model: str) -> None:
    request: dict[str, Any] = {
        "model": model,
        "text_input": "🎉🚀🙂🌍🎉🚀🙂🌍🎉🚀🙂🌍🎉🚀🙂🌍",
        "sampling_parameters": {"max_new_tokens": 20, "details": True},
    }
    whole = wire.ask(**request).text
    streamed = wire.ask(**request, stream=True)
    deltas = [response.text for response in streamed.responses]
    assert "".join(deltas) == whole
    assert "🎉" in whole
    # Where max_new_tokens cuts a character, the last delta ends in a replacement character, as the whole decode does.
    assert "\ufffd" not in "".join(deltas[:-1])
    assert len([delta for delta in deltas if delta]) < len(streamed.token_ids), "no token held half a character"


@pytest.mark.parametrize("keeps_stop", [False, True])
def test_no_delta_shows_part_of_a_stop_string(wire: Wire, keeps_stop: bool) -> None:
    unstopped = wire.ask(text_input=COUNTING, sampling_parameters={"max_new_tokens": 24}).text
    stop = unstopped[15:24]  # begins and ends inside tokens
    sampling = {"max_new_tokens": 24, "stop": [stop], "include_stop_str_in_output": keeps_stop}
    streamed = wire.ask(text_input=COUNTING, sampling_parameters=sampling, stream=True)
    end = unstopped.index(stop) + (len(stop) if keeps_stop else 0)
    assert streamed.text == unstopped[:end]
    so_far = ""
    for response in streamed.responses[:-1]:
        so_far += response.text
        assert unstopped.startswith(so_far)
        assert len(so_far) <= unstopped.index(stop)
