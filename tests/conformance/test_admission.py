"""Cases 45 to 47: more requests than are admitted, and clients that leave while they generate or wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from textgen_client import Client, OverloadedError

from .asking import ALPHABET, error_of, ids_of, long_requests, wait_until, wait_until_idle

if TYPE_CHECKING:
    from textgen_client import Generation

    from ..running_server import RunningServer

LIMIT = 100  # max_concurrent_requests of the plain server
ENDLESS: dict[str, Any] = {"max_new_tokens": 5000, "ignore_eos_token": True}


@pytest.fixture(autouse=True)
def _idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a case counts must not include what the one before it left."""
    yield
    for name in ("server", "plain_server"):
        if name in request.fixturenames:
            wait_until_idle(request.getfixturevalue(name))


def test_case_45_overload(plain_server: RunningServer, plain_client: Client) -> None:
    """With max_concurrent_requests long ones and 5 more, exactly 5 are refused, at once, and nothing else is."""
    failures = plain_server.metric("tgi_request_failure", err="overloaded")
    admitted = [plain_client.stream("a long text", **ENDLESS)]
    try:
        next(admitted[0])  # it runs; the others wait behind it
        admitted += [plain_client.stream("a long text", **ENDLESS) for _ in range(LIMIT - 1)]
        wait_until(lambda: plain_server.metric("tgi_queue_size") == LIMIT - 1, "all the others are queued")
        errors = [error_of(lambda: plain_client.generate("one more", timeout=20, **ENDLESS)) for _ in range(5)]
        assert [type(error) for error in errors] == [OverloadedError] * 5, errors
        assert all(f"{LIMIT} requests are live (max_concurrent_requests)" in str(error) for error in errors)
        # "At once": answered while the one that ran first is still running, and all the others still wait.
        next(admitted[0])
        wait_until(lambda: plain_server.metric("tgi_request_failure", err="overloaded") == failures + 5, "5 counted")
        assert plain_server.metric("tgi_queue_size") == LIMIT - 1
    finally:
        for stream in admitted:
            stream.close()
    wait_until_idle(plain_server)
    assert plain_client.generate("again", max_new_tokens=2).num_output_tokens == 2


def test_case_46_hanging_up(server: RunningServer, client: Client, solo: Generation) -> None:
    """A stream left after three tokens: the gauge falls, `dropped` rises by one, and its place can be used.

    Difference: the label is `cancelled`, which a `cancel` request gives too. (TGI: `dropped`.)
    """
    wait_until_idle(server)
    cancelled = server.metric("tgi_request_failure", err="cancelled")
    generated = server.metric("tgi_generated_tokens")
    with long_requests(client, 2):
        with client.stream(ALPHABET, max_new_tokens=900, ignore_eos_token=True) as stream:
            for _ in range(3):
                next(stream)
            wait_until(lambda: server.metric("tgi_batch_current_size") == 3, "three run")
        left_s = time.monotonic()
        wait_until(lambda: server.metric("tgi_batch_current_size") == 2, "the one that was left is gone")
        fell_s = time.monotonic() - left_s
        wait_until(lambda: server.metric("tgi_request_failure", err="cancelled") == cancelled + 1, "counted")
        assert ids_of(client.generate(ALPHABET, max_new_tokens=4, details=True)) == ids_of(solo)[:4]
    wait_until_idle(server)
    # Its 900 tokens would have taken minutes: it ended for being left, and early.
    assert server.metric("tgi_generated_tokens") - generated < 900, f"gone after {fell_s:.1f} s"


def test_case_47_leaving_the_queue(plain_server: RunningServer, plain_client: Client) -> None:
    """One that waits behind a full batch and is left never runs; the one behind it does."""
    wait_until_idle(plain_server)
    with plain_client.stream("the full batch", **ENDLESS) as running:
        next(running)
        behind = plain_client.stream("never to run", **ENDLESS)
        last = plain_client.stream("runs in the end", max_new_tokens=3, ignore_eos_token=True)
        wait_until(lambda: plain_server.metric("tgi_queue_size") == 2, "two wait")
        queued_prompts = plain_server.metric("tgi_prefill_tokens")
        behind.close()
        wait_until(lambda: plain_server.metric("tgi_queue_size") == 1, "the one that was left has left the queue")
        next(running)
    assert "".join(chunk.text for chunk in last)
    wait_until_idle(plain_server)
    # Prompt tokens computed since: those of the last one alone.
    expected = plain_client.generate("runs in the end", max_new_tokens=1).num_input_tokens
    assert expected is not None
    wait_until(lambda: plain_server.metric("tgi_prefill_tokens") >= queued_prompts + 2 * expected, "both are counted")
    assert plain_server.metric("tgi_prefill_tokens") == queued_prompts + 2 * expected
