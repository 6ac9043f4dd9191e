"""TGI's black-box cases over HTTP, by number, as far as the other files here do not have them.

The properties themselves are proved against the server in tests/conformance; here it is that the routes let them
through: parameters in, texts, tokens, seeds, reasons and errors out. Where TGI's own behaviour is a defect, the
property is ours (docs/differences.md).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import jsonschema
import pytest

from ..running_server import RunningServer
from ..server.wire import wait_until, wait_until_idle
from .conftest import ADAPTERS
from .test_tgi_routes import PROMPT, events

LONG = {"max_new_tokens": 10, "ignore_eos_token": True}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 4, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        "note": {"type": "string", "maxLength": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
Result = TypeVar("Result")


def generate(http: httpx.Client, prompt: str = PROMPT, **parameters: Any) -> dict[str, Any]:
    """The answer with its details."""
    asked = {"details": True, **parameters}
    answer = http.post("/generate", json={"inputs": prompt, "parameters": asked})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ids_of(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


def stream(http: httpx.Client, prompt: str = PROMPT, **parameters: Any) -> list[dict[str, Any]]:
    return events(http.post("/generate_stream", json={"inputs": prompt, "parameters": parameters}))


def together(*calls: Callable[[], Result]) -> list[Result]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def test_2_3_4_greedy_is_greedy_alone_and_in_company(http: httpx.Client) -> None:
    alone = generate(http, **LONG)
    assert generate(http, **LONG)["details"]["tokens"] == alone["details"]["tokens"]
    others = [lambda n=n: generate(http, f"note {n}", max_new_tokens=30, temperature=1.0, seed=n) for n in range(4)]
    same = together(*[lambda: generate(http, **LONG)] * 4, *others)[:4]
    assert {answer["generated_text"] for answer in same} == {alone["generated_text"]}


def test_6_half_characters_never_show(http: httpx.Client) -> None:
    grammar = {"type": "regex", "value": "[狐犬😀é]{5}"}
    told = stream(http, max_new_tokens=60, temperature=1.0, seed=1, grammar=grammar)
    text = "".join(event["token"]["text"] for event in told if not event["token"]["special"])
    assert text == told[-1]["generated_text"]
    assert len(text) == 5
    assert "\ufffd" not in text


def test_7_full_text(http: httpx.Client) -> None:
    plain = generate(http, max_new_tokens=3)["generated_text"]
    assert generate(http, max_new_tokens=3, return_full_text=True)["generated_text"] == PROMPT + plain


def test_9_10_11_seeds(http: httpx.Client) -> None:
    sampled = {"temperature": 0.7, "max_new_tokens": 12, "ignore_eos_token": True}
    alone = generate(http, seed=42, **sampled)
    assert alone["details"]["seed"] == 42
    others = [lambda n=n: generate(http, f"note {n}", max_new_tokens=3 + n, temperature=1.0) for n in range(6)]
    again = together(lambda: generate(http, seed=42, **sampled), *others)[0]
    assert again["generated_text"] == alone["generated_text"]
    for found, expected in zip(again["details"]["tokens"], alone["details"]["tokens"], strict=True):
        assert found == expected | {"logprob": pytest.approx(expected["logprob"], abs=1e-4)}
    drawn = generate(http, **sampled)
    assert 0 <= drawn["details"]["seed"] < 2**64
    assert generate(http, seed=drawn["details"]["seed"], **sampled)["generated_text"] == drawn["generated_text"]


def test_12_best_of(http: httpx.Client) -> None:
    details = generate(http, best_of=2, do_sample=True, **LONG)["details"]
    (other,) = details["best_of_sequences"]
    assert other["seed"] != details["seed"]

    def mean(sequence: dict[str, Any]) -> float:
        logprobs = [token["logprob"] for token in sequence["tokens"]]
        return sum(logprobs) / len(logprobs)

    assert mean(details) >= mean(other)


@pytest.mark.parametrize("prompt", ["", "word " * 1000], ids=["17: an empty prompt", "18: more than max_input_tokens"])
def test_17_18_prompts(http: httpx.Client, prompt: str) -> None:
    refused = http.post("/generate", json={"inputs": prompt, "parameters": {"max_new_tokens": 2}})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    assert "960" in refused.json()["error"] or not prompt


def test_19_20_prompt_tokens(http: httpx.Client) -> None:
    ids = [token["id"] for token in http.post("/tokenize", json={"inputs": PROMPT}).json()]
    whole = generate(http, max_new_tokens=1, decoder_input_details=True)["details"]["prefill"]
    assert [token["id"] for token in whole] == ids
    assert [token["logprob"] is None for token in whole] == [True] + [False] * (len(ids) - 1)
    cut = generate(http, max_new_tokens=1, decoder_input_details=True, truncate=2)["details"]["prefill"]
    assert [token["id"] for token in cut] == ids[-2:]


def test_21_top_tokens(http: httpx.Client) -> None:
    details = generate(http, top_n_tokens=3, **LONG)["details"]
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) == 3
        assert top[0]["id"] == token["id"]
        assert all(a["logprob"] >= b["logprob"] for a, b in itertools.pairwise(top))
    told = stream(http, top_n_tokens=3, **LONG)
    assert [event["top_tokens"] for event in told] == details["top_tokens"]


def test_23_24_stop_strings(http: httpx.Client) -> None:
    """Across tokens, inside of one, and taken literally."""
    text = generate(http, **LONG)["generated_text"]
    middle = len(text) // 2
    for size in (1, 2, 5):
        stop = text[middle : middle + size]
        answer = generate(http, stop=[stop], **LONG)
        assert answer["generated_text"] == text[: text.index(stop) + size]
        assert answer["details"]["finish_reason"] == "stop_sequence"
    forced: dict[str, Any] = {"max_new_tokens": 30, "grammar": {"type": "choice", "value": ["xay x.*y(z"]}}
    assert generate(http, stop=["x.*y(", "x.y"], **forced)["generated_text"] == "xay x.*y("
    assert generate(http, stop=["x.y"], **forced)["details"]["finish_reason"] == "eos_token"


def test_25_an_early_end(http: httpx.Client) -> None:
    answer = generate(http, max_new_tokens=5, logit_bias={"0": 100})
    assert answer["generated_text"] == ""
    assert answer["details"]["finish_reason"] == "eos_token"
    assert [token["special"] for token in answer["details"]["tokens"]] == [True]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "logit_bias": {"0": 100}}
    choice = http.post("/v1/chat/completions", json=chat).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.8}, {"frequency_penalty": 1.5}], ids=str)
def test_26_27_penalties_leave_neighbours_alone(http: httpx.Client, penalty: dict[str, float]) -> None:
    long = {"max_new_tokens": 40, "ignore_eos_token": True}
    alone = generate(http, **long)
    punished, beside = together(lambda: generate(http, **penalty, **long), lambda: generate(http, **long))
    assert ids_of(beside) == ids_of(alone) != ids_of(punished)


def test_28_to_31_grammars_in_company(http: httpx.Client) -> None:
    alone = generate(http, **LONG)["generated_text"]
    byte = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
    sampled = {"max_new_tokens": 150, "temperature": 1.0, "grammar_whitespace": "none"}

    def constrained(number: int) -> dict[str, Any]:
        forms = [{"type": "json", "value": PERSON}, {"type": "regex", "value": rf"{byte}(\.{byte}){{3}}"}]
        return generate(http, seed=number, grammar=forms[number % 2], **sampled)

    calls = [lambda n=n: constrained(n) for n in range(6)]
    answers = together(*calls, *[lambda: generate(http, **LONG)] * 4)
    assert {answer["generated_text"] for answer in answers[6:]} == {alone}
    for number, answer in enumerate(answers[:6]):
        assert answer["details"]["finish_reason"] == "eos_token", answer
        if number % 2:
            assert re.fullmatch(r"(\d{1,3}\.){3}\d{1,3}", answer["generated_text"])
        else:
            jsonschema.validate(json.loads(answer["generated_text"]), PERSON)


def test_32_33_bad_and_new_grammars_disturb_nobody(http: httpx.Client) -> None:
    long = {"max_new_tokens": 60, "ignore_eos_token": True}
    alone = stream(http, **long)

    def ask(number: int) -> int:
        fields = {f"field_{number}": {"enum": [number, "x" if number % 2 else None]}}
        schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
        if number % 4 == 3:
            schema["type"] = "nonsense"
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 30, "grammar": {"type": "json", "value": schema}}}
        return http.post("/generate", json=body).status_code

    beside, *statuses = together(lambda: stream(http, **long), *[lambda n=n: ask(n) for n in range(8)])  # type: ignore[misc]
    assert statuses == [200, 200, 200, 422] * 2
    # Log-probabilities may differ in the last bit: the rows beside change the order of a sum.
    assert [event["token"]["id"] for event in beside] == [event["token"]["id"] for event in alone]
    assert beside[-1]["generated_text"] == alone[-1]["generated_text"]
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("route", ["/generate_stream", "/v1/completions"])
def test_46_who_hangs_up_is_gone(http: httpx.Client, tiny_triton: RunningServer, route: str) -> None:
    """After three tokens of very many: the slot is free again, and the end is counted as a cancellation. Three times,
    since the tiny model needs a second for all of them, which a machine may well look away."""
    endless = {"max_new_tokens": 900, "ignore_eos_token": True}
    asked = {"inputs": PROMPT, "parameters": endless}
    if route != "/generate_stream":
        asked = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos_token": True, "stream": True}
    wait_until_idle(tiny_triton)
    cancelled = tiny_triton.metric("tgi_request_failure", err="cancelled")
    generated = tiny_triton.metric("tgi_generated_tokens")
    for _ in range(3):
        with http.stream("POST", route, json=asked) as response:
            lines = (line for line in response.iter_lines() if line)
            assert len([next(lines) for _ in range(3)]) == 3
    wait_until(
        lambda: tiny_triton.metric("tgi_request_failure", err="cancelled") > cancelled, "a cancellation is counted"
    )
    wait_until_idle(tiny_triton)
    assert tiny_triton.metric("tgi_generated_tokens") - generated < 3 * 900


def test_44_adapters(http: httpx.Client) -> None:
    """By TGI's parameter and by OpenAI's model; three different, stable texts, also at the same time."""
    names = (None, *ADAPTERS)

    def native(name: str | None) -> str:
        return str(generate(http, adapter_id=name, **LONG)["generated_text"])

    def by_model(name: str | None) -> tuple[str, str]:
        body = {"model": name, "prompt": PROMPT, "max_tokens": 10, "ignore_eos_token": True, "temperature": 0}
        answer = http.post("/v1/completions", json=body).json()
        return answer["model"], answer["choices"][0]["text"]

    texts = [native(name) for name in names]
    assert len(set(texts)) == 3
    assert together(*[lambda name=name: native(name) for name in names * 2]) == texts * 2
    told = together(*[lambda name=name: by_model(name) for name in names])
    assert told == list(zip(("org/tiny", *ADAPTERS), texts, strict=True))
    listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert listed == ["org/tiny", *ADAPTERS]
    refused = http.post("/generate", json={"inputs": PROMPT, "parameters": {"adapter_id": "third"}})
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    unknown = http.post("/v1/completions", json={"model": "third", "prompt": PROMPT})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    chat = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 6}
    answers = {
        http.post("/v1/chat/completions", json={**chat, "model": name}).json()["choices"][0]["message"]["content"]
        for name in ("tgi", *ADAPTERS)
    }
    assert len(answers) == 3
