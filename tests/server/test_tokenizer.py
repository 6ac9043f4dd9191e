"""The tokenizer model in a real server: each action over HTTP, errors with their codes, requests side by side."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from .conftest import RunningServer

_DATATYPES = {"input_ids": "INT32", "token_ids": "INT32"}


def _post(url: str, body: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def _infer(server: RunningServer, inputs: dict[str, list[Any]], **parameters: Any) -> tuple[int, dict[str, Any]]:
    """POST /infer; returns the status and the outputs by name (or {"error": ...})."""
    tensors = [
        {"name": name, "shape": [len(values)], "datatype": _DATATYPES.get(name, "BYTES"), "data": values}
        for name, values in inputs.items()
    ]
    body = json.dumps({"inputs": tensors, "parameters": parameters}).encode()
    status, answer = _post(f"{server.http_url}/v2/models/tokenizer/infer", body)
    if status != 200:
        return status, answer
    return status, {output["name"]: output["data"] for output in answer["outputs"]}


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


def test_encode(server: RunningServer, tokenizer: Any) -> None:
    for text in ("Hello 😀 world", "العربية\n", "x" * 100_000):
        status, outputs = _infer(server, {"text_input": [text]}, truncate=50)
        assert status == 200
        assert outputs == {"input_ids": tokenizer(text)["input_ids"][-50:], "prompt_text": [text]}


def test_chat(server: RunningServer, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hé"}]
    status, outputs = _infer(server, {"messages": [json.dumps(messages)]})
    assert status == 200
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert outputs == {"input_ids": tokenizer(prompt)["input_ids"], "prompt_text": [prompt]}


def test_generate_route(server: RunningServer) -> None:
    body = json.dumps({"text_input": "Hello world", "truncate": 1}).encode()
    status, answer = _post(f"{server.http_url}/v2/models/tokenizer/generate", body)
    assert (status, answer["input_ids"], answer["prompt_text"]) == (200, 905, "Hello world")


def test_tokenize(server: RunningServer) -> None:
    text = "Hello 😀 wörld"
    status, outputs = _infer(server, {"action": ["tokenize"], "text_input": [text]})
    spans = json.loads(outputs["tokens"][0])
    assert status == 200
    assert [span["id"] for span in spans] == outputs["input_ids"]
    assert all(text[span["start"] : span["stop"]] == span["text"] for span in spans)


def test_decode(server: RunningServer) -> None:
    inputs = {"action": ["decode"], "token_ids": [1, 19556, 905]}
    assert _infer(server, inputs) == (200, {"text": ["Hello world"]})
    assert _infer(server, inputs, skip_special_tokens=False) == (200, {"text": ["<|im_start|>Hello world"]})


@pytest.mark.parametrize(
    ("inputs", "status", "text"),
    [
        ({"text_input": [""]}, 400, "Input validation error: `text_input` must not be empty"),
        ({"text_input": ["a"], "input_ids": [1]}, 400, "given: `text_input` and `input_ids`"),
        ({"input_ids": []}, 400, "`input_ids` must not be empty"),
        ({"input_ids": [50000]}, 400, "(vocabulary size 49152); given: 50000 at position 0"),
        ({"text_input": ["word " * 2000]}, 400, "the prompt has 2001 tokens; allowed are 960 (MAX_INPUT_TOKENS)"),
        ({"messages": ["[{]"]}, 400, "`messages` is not valid JSON: "),
        ({"messages": ['[{"role": "user", "content": [{"type": "image_url"}]}]']}, 501, "takes text only"),
        ({"text_input": ["a"], "sampling_parameters": ['{"tools": 1}']}, 400, "Tool error: `tools` must be a list"),
    ],
)
def test_errors(server: RunningServer, inputs: dict[str, list[Any]], status: int, text: str) -> None:
    answered, answer = _infer(server, inputs)
    assert text in answer["error"]
    assert "Traceback" not in answer["error"]
    assert answered == status


def test_side_by_side(server: RunningServer, tokenizer: Any) -> None:
    """Many requests at once, good and bad: each gets its own answer."""
    texts = [f"prompt number {i} " * (i + 1) if i % 3 else "" for i in range(40)]
    answers: dict[int, tuple[int, dict[str, Any]]] = {}

    def ask(i: int) -> None:
        answers[i] = _infer(server, {"text_input": [texts[i]]})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, text in enumerate(texts):
        if text:
            assert answers[i] == (200, {"input_ids": tokenizer(text)["input_ids"], "prompt_text": [text]})
        else:
            assert answers[i][0] == 400


def test_invalid_utf8(server: RunningServer) -> None:
    grpc = pytest.importorskip("tritonclient.grpc")
    import numpy as np

    tensor = grpc.InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"ab\xff"], dtype=np.object_))
    with (
        grpc.InferenceServerClient(server.grpc_url) as client,
        pytest.raises(grpc.InferenceServerException, match=r"`text_input` is not valid UTF-8: .* at byte 2"),
    ):
        client.infer("tokenizer", [tensor])
