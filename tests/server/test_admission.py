"""Admission: a bound, an immediate answer beyond it, and the order in which what waits is served."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from .wire import wait_until, wait_until_idle

if TYPE_CHECKING:
    from ..running_server import RunningServer
    from .conftest import Connect
    from .wire import Call, Wire

MAX_CONCURRENT_REQUESTS = 6  # of `narrow_server`
OVERLOADED = "Model is overloaded: "

SHORT: dict[str, Any] = {"text_input": "Hi", "stream": True, "sampling_parameters": {"max_new_tokens": 2}}


@pytest.fixture
def narrow(narrow_server: RunningServer, connect: Connect) -> Iterator[Wire]:
    wait_until_idle(narrow_server)
    yield connect(narrow_server)
    wait_until_idle(narrow_server)


@pytest.fixture
def blocker(narrow: Wire) -> Iterator[Call]:
    """A request in the only slot, which stays until it is cancelled."""
    call = narrow.open(
        text_input="Once upon a time",
        stream=True,
        request_id="blocker",
        sampling_parameters={"max_new_tokens": 900, "ignore_eos_token": True},
    )
    next(call)
    yield call
    call.cancel()


def test_beyond_the_bound_the_answer_is_immediate(narrow: Wire, blocker: Call) -> None:
    queued = [narrow.ask_soon(**SHORT) for _ in range(MAX_CONCURRENT_REQUESTS - 1)]
    wait_until(lambda: narrow.server.metric("tgi_queue_size") == len(queued), "all queued")
    before = narrow.server.metric("tgi_request_failure", err="overloaded")
    for request in (SHORT, SHORT | {"stream": False}, SHORT | {"text_input": "long " * 500}, {"text_input": ""}):
        assert narrow.error_of(**request).startswith(OVERLOADED)
    status, answer = narrow.post({"text_input": "Hi"})
    assert (status, answer["error"].startswith(OVERLOADED)) == (400, True)
    assert not any(waiting.done() for waiting in queued), "answered while the slot was taken"
    # Ending a request must stay possible just when there are too many.
    assert narrow.ask(request_id="blocker", cancel=True).errors == []
    outcomes = [waiting.result() for waiting in queued]
    assert all(outcome.errors == [] and outcome.text for outcome in outcomes)
    wait_until(
        lambda: narrow.server.metric("tgi_request_failure", err="overloaded") == before + 5,
        "five counted as overloaded",
    )


def test_of_a_burst_exactly_the_surplus_is_refused(narrow: Wire) -> None:
    long = SHORT | {"sampling_parameters": {"max_new_tokens": 20, "ignore_eos_token": True}}
    burst = [narrow.ask_soon(**long) for _ in range(MAX_CONCURRENT_REQUESTS + 5)]
    outcomes = [waiting.result() for waiting in burst]
    refused = [outcome for outcome in outcomes if outcome.errors]
    assert len(refused) == 5
    assert all(outcome.errors[0].startswith(OVERLOADED) for outcome in refused)
    served = [outcome.text for outcome in outcomes if not outcome.errors]
    assert served == [served[0]] * MAX_CONCURRENT_REQUESTS
    last_refusal = max(outcome.ended_s for outcome in refused)
    assert last_refusal <= min(outcome.ended_s for outcome in outcomes if not outcome.errors)


def test_what_waits_is_served_by_priority_then_by_arrival(narrow: Wire, blocker: Call) -> None:
    waiting = {}
    for index, (name, priority) in enumerate({"low": -5, "first": 0, "second": 0, "urgent": 5}.items(), start=1):
        sampling = {"max_new_tokens": 2, "priority": priority}
        waiting[name] = narrow.ask_soon(**SHORT | {"sampling_parameters": sampling})
        # One after the other, so that the order of arrival is known.
        wait_until(lambda index=index: narrow.server.metric("tgi_queue_size") == index, "queued")  # type: ignore[misc]
    blocker.cancel()
    ended_s = {name: outcome.result().ended_s for name, outcome in waiting.items()}
    assert sorted(ended_s, key=ended_s.__getitem__) == ["urgent", "first", "second", "low"]


def test_a_refused_request_holds_nothing(narrow: Wire) -> None:
    """After many refusals the whole bound is there again."""
    for _ in range(3):
        burst = [narrow.ask_soon(**SHORT) for _ in range(4 * MAX_CONCURRENT_REQUESTS)]
        for waiting in burst:
            assert waiting.result().responses[-1].final
    deadline = time.monotonic() + 30
    outcomes = [narrow.ask_soon(**SHORT) for _ in range(MAX_CONCURRENT_REQUESTS)]
    assert [outcome.result().errors for outcome in outcomes] == [[]] * MAX_CONCURRENT_REQUESTS
    assert time.monotonic() < deadline
