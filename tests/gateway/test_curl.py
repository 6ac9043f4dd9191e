"""curl, as the documentation shows it: a JSON answer, and a stream of server-sent events that is not held back."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from .running_gateway import Gateway

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here: apt-get install curl")
BODY = {"inputs": "the quick brown fox", "parameters": {"max_new_tokens": 5, "ignore_eos_token": True}}


def curl(gateway: Gateway, route: str, body: object, *options: str) -> str:
    command = ["curl", "-sS", "--fail-with-body", "-m", "30", *options, gateway.url + route]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_an_answer_and_its_stream(gateway: Gateway) -> None:
    text = json.loads(curl(gateway, "/generate", BODY))["generated_text"]
    stream = curl(gateway, "/generate_stream", BODY, "-N", "-i")
    head, _, content = stream.partition("\n\n")
    assert "200 OK" in head
    assert "content-type: text/event-stream" in head.lower()
    blocks = content.removesuffix("\n\n").split("\n\n")
    events = [json.loads(block.removeprefix("data:")) for block in blocks]
    assert len(events) == 5
    assert events[-1]["generated_text"] == text


def test_openais_stream_ends_in_done(gateway: Gateway) -> None:
    body = {"model": "tgi", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
    blocks = curl(gateway, "/v1/chat/completions", body, "-N").removesuffix("\n\n").split("\n\n")
    assert blocks[-1] == "data: [DONE]"
    assert all(json.loads(block.removeprefix("data: "))["object"] for block in blocks[:-1])


def test_a_body_from_a_pipe_and_a_refusal(gateway: Gateway) -> None:
    """Chunked, since curl does not know its length; and --fail-with-body sees the status."""
    command = ["curl", "-sS", "-m", "30", "-T", "-", "-X", "POST", gateway.url + "/generate"]
    command += ["-H", "Content-Type: application/json", "-w", "\n%{http_code}"]
    asked = subprocess.run(command, input=json.dumps(BODY), capture_output=True, text=True, check=True, timeout=60)
    answer, _, status = asked.stdout.rpartition("\n")
    assert (status, "generated_text" in json.loads(answer)) == ("200", True)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        curl(gateway, "/generate", {"inputs": ""})
    assert json.loads(refused.value.stdout)["error_type"] == "validation"
