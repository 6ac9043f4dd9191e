"""TGI's routes against a real server: answers, streams, headers, refusals, and TGI's own client unmodified."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
import text_generation
from triton_metric_names import FAMILIES

from .browser import ChatPage, ink, running_browser
from .running_gateway import Gateway

PROMPT = "the quick brown fox"


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; the whole body must be events."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def generate(http: httpx.Client, **parameters: Any) -> httpx.Response:
    return http.post("/generate", json={"inputs": PROMPT, "parameters": parameters})


def test_1_5_51_an_answer_its_stream_and_its_headers_agree(http: httpx.Client) -> None:
    answer = generate(http, max_new_tokens=8, details=True, ignore_eos_token=True)
    assert answer.status_code == 200
    details = answer.json()["details"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", 8, None)
    assert len(details["tokens"]) == 8
    assert details["prefill"] == []

    headers = {name: value for name, value in answer.headers.items() if name.startswith("x-")}
    assert headers.pop("x-compute-type") == "cpu"
    assert int(headers["x-compute-characters"]) == len(PROMPT)
    assert int(headers["x-generated-tokens"]) == 8
    assert int(headers["x-prompt-tokens"]) == len(http.post("/tokenize", json={"inputs": PROMPT}).json())
    total, queue, inference = (int(headers[f"x-{name}-time"]) for name in ("total", "queue", "inference"))
    assert total >= queue + inference
    assert {"x-compute-time", "x-validation-time", "x-time-per-token", "x-request-id"} <= set(headers)

    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "details": True, "ignore_eos_token": True}}
    stream = http.post("/generate_stream", json=body)
    assert stream.headers["x-accel-buffering"] == "no"
    told = events(stream)
    assert [event["index"] for event in told] == list(range(1, 9))
    assert [event["token"] for event in told] == details["tokens"]
    assert [event["generated_text"] for event in told] == [None] * 7 + [answer.json()["generated_text"]]
    assert told[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": 8,
        "seed": None,
        "input_length": int(headers["x-prompt-tokens"]),
    }


@pytest.mark.parametrize("stream", [False, True])
def test_51_openais_routes_have_tgis_headers(http: httpx.Client, stream: bool) -> None:
    prompts = [PROMPT, "a stream"]
    asked = {"max_tokens": 3, "ignore_eos_token": True, "stream": stream}
    headers = http.post("/v1/completions", json={"prompt": prompts, **asked}).headers
    assert headers["x-compute-characters"] == str(sum(map(len, prompts)))
    assert headers["x-compute-type"] == "cpu"
    chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], **asked}).headers
    assert chat["x-compute-characters"] == "2"
    if stream:
        assert "x-generated-tokens" not in headers
    else:
        assert (headers["x-generated-tokens"], chat["x-generated-tokens"]) == ("6", "3")
        assert int(headers["x-total-time"]) >= int(headers["x-inference-time"]) / 2  # of two that ran side by side


def test_8_the_root_answers_with_a_list_and_the_prompt(http: httpx.Client) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}
    (answer,) = http.post("/", json=body).json()
    assert answer["generated_text"].startswith(PROMPT)
    told = events(http.post("/", json={**body, "stream": True}))
    assert told[-1]["generated_text"] == answer["generated_text"]
    assert "details" not in answer


def test_22_the_stop_string_stays(http: httpx.Client) -> None:
    text = generate(http, max_new_tokens=6).json()["generated_text"]
    stop = text[1:3]
    answer = generate(http, max_new_tokens=6, stop=[stop], details=True).json()
    assert answer["generated_text"] == text[: text.index(stop) + len(stop)]
    assert answer["details"]["finish_reason"] == "stop_sequence"


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0},
        {"temperature": -1.0},
        {"top_p": 0},
        {"top_p": -1},
        {"typical_p": 0},
        {"typical_p": 1.1},
        {"top_k": 0},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"frequency_penalty": 2.1},
        {"max_new_tokens": 0},
        {"max_new_tokens": 100000},
        {"max_new_tokens": "5"},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"top_n_tokens": 6},
        {"truncate": 0},
        {"truncate": 961},
        {"best_of": 2},
        {"best_of": 3, "do_sample": True},
        {"best_of": 2, "do_sample": True, "seed": 1},
        {"grammar": {"type": "regex", "value": "("}},
        {"grammar": {"type": "json", "value": {"type": "nonsense"}}},
        {"grammar": {"type": "json", "value": "{no json"}},
        {"max_new_token": 5},
    ],
    ids=json.dumps,
)
def test_13_to_18_32_what_is_refused(http: httpx.Client, parameters: dict[str, Any]) -> None:
    """With status 422 alone, and as an event of a stream that began with 200, unless the body has a wrong type."""
    answer = generate(http, **parameters)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error_type"] == "validation"
    assert next(iter(parameters)) in answer.json()["error"] or "grammar" in parameters or "stop" in parameters


@pytest.mark.parametrize(
    "parameters",
    [{"decoder_input_details": True}, {"best_of": 2, "do_sample": True}],
    ids=["20: prompt tokens", "13: best_of"],
)
def test_a_stream_carries_its_refusal_as_an_event(http: httpx.Client, parameters: dict[str, Any]) -> None:
    body = {"inputs": PROMPT, "parameters": parameters}
    stream = http.post("/generate_stream", json=body)
    assert stream.status_code == 200
    (told,) = events(stream)
    assert told["error_type"] == "validation"
    assert told["error"].startswith("Input validation error: ")


def test_56_bodies_that_are_none(http: httpx.Client) -> None:
    json_header = {"content-type": "application/json"}

    def post(**content: Any) -> httpx.Response:
        return http.post("/generate", **content)

    assert post(content=b'{"inputs": "' + b"a" * 2_000_001 + b'"}', headers=json_header).status_code == 413
    assert post(content=iter([b'{"inputs": "', b"a" * 2_000_001]), headers=json_header).status_code == 413
    assert post(content=b"{no json", headers=json_header).status_code == 400
    assert post(json={"inputs": 5}).status_code == 422
    assert post(json={}).status_code == 422
    assert post(content=b'{"inputs": "a"}').status_code == 415
    assert http.get("/nothing").status_code == 404
    assert http.get("/generate").status_code == 405
    chunked = post(content=iter([b'{"inputs": "a", "parameters"', b': {"max_new_tokens": 1}}']), headers=json_header)
    assert chunked.status_code == 200


def test_52_tokens_and_their_places(http: httpx.Client) -> None:
    text = "the fox — 狐"
    for token in http.post("/tokenize", json={"inputs": text}).json():
        assert text[token["start"] : token["stop"]] == token["text"]
    chat = {"messages": [{"role": "user", "content": text}]}
    found = http.post("/chat_tokenize", json=chat).json()
    assert found["templated_text"] == f"user: {text}\nassistant: "
    answer = http.post("/v1/chat/completions", json={**chat, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == len(found["tokenize_response"])


def test_60_what_is_served(http: httpx.Client) -> None:
    info = http.get("/info").json()
    assert info["model_id"] == "org/tiny"
    limits = ("max_concurrent_requests", "max_best_of", "max_stop_sequences", "max_input_tokens", "max_total_tokens")
    assert [info[name] for name in limits] == [64, 2, 4, 960, 1024]
    for route in ("/", "/health", "/ping"):
        assert http.get(route).status_code == 200
    model, *_ = http.get("/v1/models").json()["data"]
    assert model["id"] == "org/tiny"
    assert "/generate_stream" in http.get("/api-doc/openapi.json").json()["paths"]
    assert http.get("/docs").status_code == 200


def test_the_chat_page_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/chat")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_the_chat_page_talks_to_a_real_server(gateway: Gateway) -> None:
    with running_browser() as browser:
        page = ChatPage(browser, gateway.url)
        page.fill(max_tokens=12, temperature=0, schema='{"enum": ["first", "second"]}')
        page.send("hi")
        page.wait(lambda: len(page.bubbles("assistant")) == 1 and page.is_idle(), within_s=60)
        assert json.loads(page.bubbles("assistant")[0]) in ("first", "second")
        assert "token" in page["rate"].text
        assert ink(page.picture("talk")) > 0
        assert page.complaints() == []


_COUNTED = (
    "tgi_request_count", "tgi_request_success", "tgi_request_duration_count", "tgi_request_validation_duration_count",
    "tgi_request_queue_duration_count", "tgi_request_inference_duration_count", "tgi_request_input_length_count",
    "tgi_request_mean_time_per_token_duration_count", "tgi_request_generated_tokens_count",
)  # fmt: skip


def _metrics(http: httpx.Client, *names: str) -> list[float]:
    """The sums of the metrics' samples over all labels."""
    lines = http.get("/metrics").text.splitlines()
    return [
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)
        for name in names
    ]


def test_50_metrics_count_requests(http: httpx.Client) -> None:
    names = (*_COUNTED, "tgi_request_generated_tokens_sum", "tgi_request_failure")

    def settled() -> list[float]:
        """They are published once a while, so what was asked before may still be on its way."""
        found, since_s = _metrics(http, *names), time.monotonic()
        while time.monotonic() - since_s < 0.5:
            time.sleep(0.05)
            if (now := _metrics(http, *names)) != found:
                found, since_s = now, time.monotonic()
        return found

    page = http.get("/metrics").text
    assert all(f"# TYPE {name} " in page for name in FAMILIES)
    before = settled()
    answers = [generate(http, max_new_tokens=1 + number % 3, details=True).json() for number in range(10)]
    num_tokens = sum(answer["details"]["generated_tokens"] for answer in answers)
    gained = [after - earlier for after, earlier in zip(settled(), before, strict=True)]
    assert gained == [10] * len(_COUNTED) + [num_tokens, 0]


def test_sagemaker_and_vertex(http: httpx.Client) -> None:
    text = generate(http, max_new_tokens=3).json()["generated_text"]
    parameters = {"max_new_tokens": 3}
    (compat,) = http.post("/invocations", json={"inputs": PROMPT, "parameters": parameters}).json()
    assert compat["generated_text"] == PROMPT + text
    plain = {"max_tokens": 3, "temperature": 0}
    completion = http.post("/invocations", json={"prompt": PROMPT, **plain}).json()
    assert completion["choices"][0]["text"] == text
    messages = [{"role": "user", "content": "hi"}]
    chat = http.post("/invocations", json={"messages": messages, **plain}).json()
    assert chat["object"] == "chat.completion"
    instances = [{"inputs": PROMPT, "parameters": parameters}, {"messages": messages, **plain}]
    predictions = http.post("/vertex", json={"instances": instances}).json()["predictions"]
    assert predictions == [text, chat["choices"][0]["message"]["content"]]
    assert http.post("/invocations", json={"inputs": 5}).status_code == 422
    assert http.post("/vertex", json={"instances": []}).status_code == 422


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tgis_own_client(gateway: Gateway, http: httpx.Client) -> None:
    text = generate(http, max_new_tokens=4).json()["generated_text"]
    client = text_generation.Client(gateway.url)
    answer = client.generate(PROMPT, max_new_tokens=4, decoder_input_details=True)
    assert answer.generated_text == text
    assert answer.details.prefill[0].logprob is None
    streamed = list(client.generate_stream(PROMPT, max_new_tokens=4))
    assert streamed[-1].generated_text == text
    sampled = client.generate(PROMPT, max_new_tokens=4, do_sample=True, best_of=2)
    assert sampled.details.best_of_sequences is not None
    assert len(sampled.details.best_of_sequences) == 1
    chat = client.chat([{"role": "user", "content": "hi"}], max_tokens=2)
    assert chat.choices[0].message.role == "assistant"
    with pytest.raises(text_generation.errors.ValidationError, match="max_new_tokens"):
        client.generate(PROMPT, max_new_tokens=100000)
    with pytest.raises(text_generation.errors.ValidationError, match="max_new_tokens"):
        list(client.generate_stream(PROMPT, max_new_tokens=100000))
