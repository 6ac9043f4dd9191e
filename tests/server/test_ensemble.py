"""The ensemble in a real server: the same answers as `textgen` for each prompt form, inputs passed on, errors named."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import RunningServer


def _generate(server: RunningServer, model: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{server.http_url}/v2/models/{model}/generate", data=json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    "body",
    [
        {"text_input": "One, two, three,"},
        {"messages": '[{"role": "user", "content": "Count to five."}]'},
        {"input_ids": [3725, 28, 827, 28]},
        {"text_input": "One, two, three,", "sampling_parameters": '{"return_full_text": true, "truncate": 3}'},
        {"text_input": "One, two, three,", "stop": ["six", "seven"], "return_finish_reason": True},
        {"text_input": "One, two, three,", "return_num_input_tokens": True, "return_num_output_tokens": True},
    ],
)
def test_answers_as_textgen_does(server: RunningServer, body: dict[str, Any]) -> None:
    body = {**body, "max_new_tokens": 12}
    status, ours = _generate(server, "ensemble", body)
    assert status == 200, ours
    status, theirs = _generate(server, "textgen", body)
    assert status == 200, theirs
    noise = {"model_name", "sequence_id", "sequence_start", "sequence_end"}
    assert {k: v for k, v in ours.items() if k not in noise} == {k: v for k, v in theirs.items() if k not in noise}
    assert ours["text_output"]


def test_errors_of_both_steps(server: RunningServer) -> None:
    prefix = "in ensemble 'ensemble', Input validation error: "
    status, answer = _generate(server, "ensemble", {"text_input": "a", "input_ids": [1]})
    assert (status, answer["error"].startswith(prefix)) == (400, True), answer
    status, answer = _generate(server, "ensemble", {"text_input": "a", "temperature": -1.0})
    assert (status, answer["error"].startswith(prefix)) == (400, True), answer
    assert "temperature" in answer["error"]
