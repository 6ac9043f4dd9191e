"""Real requests to a server that has just started: one token to prove it is ready, and the demonstration chat.

Uses the standard library's HTTP client, so that nothing but a server is needed.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

MODEL = "textgen"
_GENERATE = f"/v2/models/{MODEL}/generate"


class ProbeError(Exception):
    """The server answered a request with an error; the text is the server's."""


def is_ready(host: str, http_port: int) -> bool:
    """Whether every model of the server is loaded. Costs no inference."""
    try:
        return _request(host, http_port, "GET", "/v2/health/ready", timeout_s=2).status == 200
    except (OSError, http.client.HTTPException):
        return False


def answer_one_token(host: str, http_port: int, timeout_s: float) -> None:
    """Generate one token. Raises ProbeError with the server's text when that fails, OSError when nobody answers."""
    body = {"text_input": "Hello", "max_new_tokens": 1}
    response = _request(host, http_port, "POST", _GENERATE, body, timeout_s)
    answer = json.loads(response.read() or b"{}")
    if response.status != 200 or "error" in answer:
        raise ProbeError(answer.get("error", f"HTTP status {response.status}"))


def stream_chat(host: str, http_port: int, message: str, max_new_tokens: int, timeout_s: float) -> Iterator[str]:
    """The pieces of the model's answer to one chat message, as they arrive. Raises ProbeError and OSError."""
    body = {
        "messages": json.dumps([{"role": "user", "content": message}]),
        "stream": True,
        "max_new_tokens": max_new_tokens,
    }
    response = _request(host, http_port, "POST", f"{_GENERATE}_stream", body, timeout_s)
    for line in response:
        if not line.startswith(b"data:"):
            continue
        event = json.loads(line.removeprefix(b"data:"))
        if "error" in event:
            raise ProbeError(event["error"])
        yield event.get("text_output", "")


def _request(
    host: str, port: int, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = 30
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    payload = None if body is None else json.dumps(body).encode()
    connection.request(method, path, payload, {"Content-Type": "application/json", "Connection": "close"})
    return connection.getresponse()
