"""The server's log has one line per request, and nothing of what was asked or answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .wire import wait_until

if TYPE_CHECKING:
    from ..running_server import RunningServer
    from .wire import Wire


def test_one_line_per_request_and_no_prompt(server: RunningServer, wire: Wire) -> None:
    prompt = "Zanzibar whispers to the pelican"
    outcome = wire.ask(text_input=prompt, request_id="logged-1", stream=True, sampling_parameters={"max_new_tokens": 3})
    assert outcome.errors == []
    assert wire.error_of(text_input=prompt, request_id="logged-2", sampling_parameters={"top_p": 7})

    def lines(request_id: str) -> list[str]:
        return [line for line in server.log.read_text().splitlines() if f"request_id={request_id} " in line]

    wait_until(lambda: bool(lines("logged-1") and lines("logged-2")), "logged")
    (answered,) = lines("logged-1")
    assert "textgen: INFO request " in answered
    for fact in ("output_tokens=3", "finish_reason=length", "stream=true", "queue_s=", "first_token_s=", "total_s="):
        assert fact in answered
    (refused,) = lines("logged-2")
    assert "INFO request failed " in refused and "error_type=validation" in refused
    assert "Zanzibar" not in server.log.read_text()
