"""Ways to end a request, at every stage of its life: slot and blocks come back, the counters say why.

The server has one slot, so a second request is queued; its steps are so small that a long prompt takes many.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from .wire import wait_until, wait_until_idle

if TYPE_CHECKING:
    from ..running_server import RunningServer
    from .conftest import Connect
    from .wire import Wire

CANCELLED = "Request cancelled: "
TIMEOUT = "Request timeout: "

# Requests that would take far longer than the tests wait.
LONG_ANSWER: dict[str, Any] = {
    "text_input": "Once upon a time",
    "stream": True,
    "sampling_parameters": {"max_new_tokens": 900, "ignore_eos_token": True},
}


def _long_prompt(opening: str) -> dict[str, Any]:
    """A prompt of many steps; the opening keeps it apart from prompts whose blocks are cached."""
    return {
        "text_input": f"{opening}: " + "word " * 900,
        "stream": True,
        "sampling_parameters": {"max_new_tokens": 20, "ignore_eos_token": True},
    }


@pytest.fixture
def narrow(narrow_server: RunningServer, connect: Connect) -> Iterator[Wire]:
    """A connection to the server with one slot, which is idle before and after."""
    wait_until_idle(narrow_server)
    yield connect(narrow_server)
    wait_until_idle(narrow_server)


@pytest.fixture
def blocked(narrow: Wire) -> Iterator[Wire]:
    """The same with its slot taken, so that whatever comes is queued; what was queued must not have run at the end."""
    blocker = narrow.open(**LONG_ANSWER)
    next(blocker)
    wait_until(_is_running(narrow), "running")  # published after, so with, the blocker's prefill
    num_prefilled = narrow.server.metric("tgi_prefill_tokens")
    yield narrow
    assert narrow.server.metric("tgi_batch_current_size") == 1, "the blocker ended early"
    wait_until(lambda: narrow.server.metric("tgi_queue_size") == 0, "the queue is shown as empty")
    blocker.cancel()
    wait_until_idle(narrow.server)
    assert narrow.server.metric("tgi_prefill_tokens") == num_prefilled


class _Failures:
    """How often requests failed for a reason, since this object was made."""

    def __init__(self, server: RunningServer, reason: str) -> None:
        self._server, self._reason = server, reason
        self._before = self._read()

    def _read(self) -> float:
        return self._server.metric("tgi_request_failure", err=self._reason)

    def wait_for(self, num: int) -> None:
        wait_until(lambda: self._read() - self._before >= num, f"{num} counted as {self._reason}")
        assert self._read() - self._before == num


def _is_queued(wire: Wire) -> Callable[[], bool]:
    return lambda: wire.server.metric("tgi_queue_size") == 1


def _is_running(wire: Wire) -> Callable[[], bool]:
    return lambda: wire.server.metric("tgi_batch_current_size") == 1


def _give_slot_back(wire: Wire) -> None:
    """The slot is free: another request is answered, by the whole cache."""
    wait_until_idle(wire.server)
    assert wire.ask(text_input="Hi", sampling_parameters={"max_new_tokens": 1}).errors == []


# ---- queued ---------------------------------------------------------------------------------------------------------


def test_grpc_cancel_while_queued(blocked: Wire) -> None:
    failures = _Failures(blocked.server, "cancelled")
    call = blocked.open(**_long_prompt("queued, gRPC"))
    wait_until(_is_queued(blocked), "queued")
    call.cancel()
    failures.wait_for(1)
    with pytest.raises(grpc.RpcError):
        next(call)


def test_http_disconnect_while_queued(blocked: Wire) -> None:
    """Before the first byte Triton notices a closed socket only when it writes: keep-alives make it write."""
    failures = _Failures(blocked.server, "cancelled")
    blocked.send_and_leave(
        {"text_input": "queued, HTTP: " + "word " * 900, "stream": True, "max_new_tokens": 20},
        after=lambda: wait_until(_is_queued(blocked), "queued"),
    )
    failures.wait_for(1)


def test_cancel_input_while_queued(blocked: Wire) -> None:
    failures = _Failures(blocked.server, "cancelled")
    waiting = blocked.ask_soon(request_id="queued-1", **_long_prompt("queued, cancel"))
    wait_until(_is_queued(blocked), "queued")
    _assert_acknowledged(blocked, "queued-1")
    _assert_one_error(waiting.result(), CANCELLED)
    failures.wait_for(1)


@pytest.mark.parametrize("whose", ["parameter", "Triton"])
@pytest.mark.parametrize("stream", [True, False])
def test_deadline_while_queued(blocked: Wire, whose: str, stream: bool) -> None:
    failures = _Failures(blocked.server, "timeout")
    request = _long_prompt("queued, deadline") | {"stream": stream}
    if whose == "parameter":
        request["sampling_parameters"] = {"max_new_tokens": 20, "timeout": 0.5}
    else:
        request["parameters"] = {"timeout": 500_000}
    _assert_one_error(blocked.ask(**request), TIMEOUT)
    failures.wait_for(1)


# ---- prefilling -----------------------------------------------------------------------------------------------------


def test_grpc_cancel_while_prefilling(narrow: Wire) -> None:
    failures = _Failures(narrow.server, "cancelled")
    call = narrow.open(**_long_prompt("prefilling, gRPC"))
    wait_until(_is_running(narrow), "running")
    call.cancel()
    failures.wait_for(1)
    with pytest.raises(grpc.RpcError):  # and not a token before it
        next(iter([response for response in call if response.tensors]))
    _give_slot_back(narrow)


def test_http_disconnect_while_prefilling(narrow: Wire) -> None:
    failures = _Failures(narrow.server, "cancelled")
    narrow.send_and_leave(
        {"text_input": "prefilling, HTTP: " + "word " * 900, "stream": True, "max_new_tokens": 60},
        after=lambda: wait_until(_is_running(narrow), "running"),
    )
    failures.wait_for(1)
    _give_slot_back(narrow)


def test_cancel_input_while_prefilling(narrow: Wire) -> None:
    failures = _Failures(narrow.server, "cancelled")
    waiting = narrow.ask_soon(request_id="prefilling-1", **_long_prompt("prefilling, cancel"))
    wait_until(_is_running(narrow), "running")
    _assert_acknowledged(narrow, "prefilling-1")
    _assert_one_error(waiting.result(), CANCELLED)
    failures.wait_for(1)
    _give_slot_back(narrow)


@pytest.mark.parametrize("whose", ["parameter", "Triton"])
def test_deadline_while_prefilling(narrow: Wire, whose: str) -> None:
    """Nothing was generated yet, so a stream gets the error as well."""
    failures = _Failures(narrow.server, "timeout")
    request = _long_prompt(f"prefilling, deadline of {whose}")
    if whose == "parameter":
        request["sampling_parameters"] = {"max_new_tokens": 20, "timeout": 0.3}
    else:
        request["parameters"] = {"timeout": 300_000}
    _assert_one_error(narrow.ask(**request), TIMEOUT)
    failures.wait_for(1)
    _give_slot_back(narrow)


# ---- decoding -------------------------------------------------------------------------------------------------------


def test_grpc_cancel_while_decoding(narrow: Wire) -> None:
    failures = _Failures(narrow.server, "cancelled")
    call = narrow.open(**LONG_ANSWER)
    next(call)
    call.cancel()
    failures.wait_for(1)
    _give_slot_back(narrow)


def test_http_disconnect_while_decoding(narrow: Wire) -> None:
    failures = _Failures(narrow.server, "cancelled")
    body = {"text_input": "Once upon a time", "stream": True, "max_new_tokens": 900, "ignore_eos_token": True}
    events = narrow.open_events(body)
    next(iter(events))
    events.close()
    failures.wait_for(1)
    _give_slot_back(narrow)


@pytest.mark.parametrize("stream", [True, False])
def test_cancel_input_while_decoding(narrow: Wire, stream: bool) -> None:
    failures = _Failures(narrow.server, "cancelled")
    waiting = narrow.ask_soon(request_id="decoding-1", **LONG_ANSWER | {"stream": stream})
    wait_until(_is_running(narrow), "running")
    _assert_acknowledged(narrow, "decoding-1")
    outcome = waiting.result()
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith(CANCELLED)
    assert [response.final for response in outcome.responses].count(True) == 1
    assert outcome.responses[-1].final
    failures.wait_for(1)
    _give_slot_back(narrow)


def test_a_stream_past_its_deadline_ends_with_what_it_has(narrow: Wire) -> None:
    sampling = {"max_new_tokens": 900, "ignore_eos_token": True, "timeout": 3}
    outcome = narrow.ask(**LONG_ANSWER | {"sampling_parameters": sampling}, return_finish_reason=True)
    assert outcome.errors == []
    assert outcome.text
    assert outcome.responses[-1].tensors["finish_reason"] == ["timeout"]
    assert [response.final for response in outcome.responses].count(True) == 1
    _give_slot_back(narrow)


def test_a_whole_answer_past_its_deadline_is_an_error(narrow: Wire) -> None:
    failures = _Failures(narrow.server, "timeout")
    request = LONG_ANSWER | {"stream": False}
    _assert_one_error(narrow.ask(**request, parameters={"timeout": 1_000_000}), TIMEOUT)
    failures.wait_for(1)
    status, answer = narrow.post(
        {"text_input": "Once upon a time", "max_new_tokens": 900, "ignore_eos_token": True, "timeout": 1.0}
    )
    assert status == 400
    assert answer["error"].startswith(TIMEOUT)
    _give_slot_back(narrow)


def test_the_smaller_of_two_deadlines_counts(narrow: Wire) -> None:
    sampling = {"max_new_tokens": 900, "ignore_eos_token": True, "timeout": 600}
    request = LONG_ANSWER | {"stream": False, "sampling_parameters": sampling}
    error = narrow.error_of(**request, parameters={"timeout": 500_000})
    assert error.startswith(TIMEOUT)
    assert "0.5 seconds" in error


def test_the_clients_own_grpc_deadline_frees_the_slot(narrow: Wire) -> None:
    failures = _Failures(narrow.server, "cancelled")
    outcome = narrow.ask(**LONG_ANSWER, within_s=1.5)
    assert outcome.broken is grpc.StatusCode.DEADLINE_EXCEEDED
    failures.wait_for(1)
    _give_slot_back(narrow)


# ---- the ensemble, and ids ------------------------------------------------------------------------------------------


def test_cancel_input_ends_a_request_of_the_ensemble(narrow: Wire) -> None:
    """Triton does not tell a step of an ensemble that its client is gone; a cancel request does."""
    failures = _Failures(narrow.server, "cancelled")
    waiting = narrow.ask_soon(model="ensemble", request_id="through-ensemble", **LONG_ANSWER)
    wait_until(_is_running(narrow), "running")
    _assert_acknowledged(narrow, "through-ensemble")
    [error] = waiting.result().errors
    assert error.startswith("in ensemble 'ensemble', " + CANCELLED)
    failures.wait_for(1)


def test_cancel_of_an_unknown_id(narrow: Wire) -> None:
    error = narrow.error_of(request_id="nobody", cancel=True)
    assert error == "Input validation error: `cancel`: no live request has the id 'nobody'"
    assert "needs the id" in narrow.error_of(cancel=True)


def test_cancel_of_an_ended_request(narrow: Wire) -> None:
    ended = narrow.ask(request_id="ended", text_input="Hi", sampling_parameters={"max_new_tokens": 1})
    assert ended.errors == []
    assert "no live request" in narrow.error_of(request_id="ended", cancel=True)


def test_a_crowd_of_leaving_clients_leaves_nothing(server: RunningServer, wire: Wire) -> None:
    """Requests of the shared server, cancelled at whatever moment; a neighbour goes on undisturbed."""
    steady = {"text_input": "The days of the week are", "sampling_parameters": {"max_new_tokens": 40}, "stream": True}
    alone = wire.ask(**steady).text
    neighbour = wire.ask_soon(**steady)
    callers = []
    for index in range(24):
        call = wire.open(**LONG_ANSWER | {"text_input": f"Story {index}: " + "and then " * index * 4})
        leave = threading.Timer(0.02 * index, call.cancel)
        leave.start()
        callers.append(leave)
    for leave in callers:
        leave.join()
    assert neighbour.result().text == alone
    wait_until_idle(server)


def _assert_acknowledged(wire: Wire, request_id: str) -> None:
    acknowledged = wire.ask(request_id=request_id, cancel=True)
    assert [(r.tensors, r.error, r.final) for r in acknowledged.responses] == [({"text_output": [""]}, None, True)]


def _assert_one_error(outcome: Any, beginning: str) -> None:
    """One response with the error and the final flag; empty keep-alives may have come before it."""
    *earlier, last = outcome.responses
    assert all(not response.tensors and response.error is None and not response.final for response in earlier)
    assert last.error.startswith(beginning)
    assert last.final
    assert outcome.broken is None
