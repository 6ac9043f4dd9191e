"""One final flag on every path, tokens gathered under load, clients that leave: with senders that record everything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from textgen_engine.config import TransportConfig
from textgen_engine.errors import Cancelled, EngineFailure, Overloaded
from textgen_engine.messages import StepReport
from textgen_engine.request import FinishReason, TokenOutput

from .fake_backend import Sender, Sent

# Long enough never to pass within a test.
FOREVER_S = 1000.0


class Desk:
    """A responder, started, and the requests that were given to it."""

    def __init__(self, module: Any, io: Any, config: TransportConfig) -> None:
        self._module, self._io = module, io
        self.left: list[str] = []
        self.responder = module.Responder(config, lambda live: self.left.append(live.key))
        self.responder.start()
        self.senders: dict[str, Sender] = {}

    def add(self, key: str, *, stream: bool = True, submitted: bool = True, **sender: Any) -> Any:
        self.senders[key] = Sender(**sender)
        live = self._module.LiveRequest(key, f"client-{key}", self.senders[key], time.monotonic())
        live.options = self._io.ResponseOptions(stream=stream)
        self.responder.add(live)
        if submitted:
            self.responder.note_submitted(live)
        return live

    def step(self, *outputs: TokenOutput) -> list[str]:
        """Deliver one step's outputs; the keys of the requests it completed."""
        return [live.key for live in self.responder.deliver(StepReport(outputs=list(outputs)))]


@pytest.fixture
def desk(triton_responder: Any, triton_responses: Any) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(**config: Any) -> Desk:
        desks.append(Desk(triton_responder, triton_responses, TransportConfig(**config)))
        return desks[-1]

    yield make
    for made in desks:
        made.responder.stop()
        assert [sender.crimes for sender in made.senders.values()] == [[]] * len(made.senders)


def _token(key: str, text: str, **more: Any) -> TokenOutput:
    return TokenOutput(key, text=text, token_ids=[1], **more)


def _last(key: str, text: str = "!") -> TokenOutput:
    return _token(key, text, finish_reason=FinishReason.LENGTH, is_last=True)


def _failed(key: str) -> TokenOutput:
    return TokenOutput(key, error=EngineFailure("gone"), is_last=True)


def _texts(sent: list[Sent]) -> list[str]:
    return [one["text_output"][0] for one in sent]


# ---- one final flag -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_the_flag_rides_on_the_last_response(desk: Callable[..., Desk], stream: bool) -> None:
    made = desk()
    made.add("a", stream=stream)
    assert made.step(_token("a", "x")) == []
    if stream:
        made.senders["a"].wait_for_number(1)
    assert made.step(_last("a", "y")) == ["a"]
    sent = made.senders["a"].wait_for_end()
    assert _texts(sent) == (["x", "y"] if stream else ["xy"])
    assert [one.final for one in sent] == ([False, True] if stream else [True])
    assert made.responder.num_live == 0


@pytest.mark.parametrize("started", [True, False])
def test_an_error_ends_a_request_once(desk: Callable[..., Desk], started: bool) -> None:
    made = desk()
    live = made.add("a")
    if started:
        made.step(_token("a", "x"))
        made.senders["a"].wait_for_number(1)
    assert made.step(_failed("a")) == ["a"]
    assert made.step(_failed("a"), _last("a")) == []
    assert not made.responder.fail(live, Cancelled("too late"))
    sent = made.senders["a"].wait_for_end()
    assert sent[-1].error == "Request failed during generation: gone"
    assert [one.final for one in sent] == [False] * (len(sent) - 1) + [True]


def test_a_refusal_before_the_engine(desk: Callable[..., Desk]) -> None:
    made = desk()
    live = made.add("a", submitted=False)
    assert made.responder.fail(live, Overloaded("full"))
    assert not made.responder.fail(live, Overloaded("again"))
    [sent] = made.senders["a"].wait_for_end()
    assert (sent.error, sent.final) == ("Model is overloaded: full", True)


def test_what_comes_after_the_end_is_dropped(desk: Callable[..., Desk]) -> None:
    made = desk()
    made.add("a")
    made.step(_last("a"))
    made.senders["a"].wait_for_end()
    assert made.step(_token("a", "late"), _last("a"), _last("never heard of")) == []
    assert len(made.senders["a"].sent) == 1


def test_many_threads_ending_one_request_send_one_flag(desk: Callable[..., Desk]) -> None:
    made = desk()
    for index in range(50):
        key = str(index)
        live = made.add(key)
        begin = threading.Barrier(3)

        def end(act: Callable[[], Any], begin: threading.Barrier = begin) -> None:
            begin.wait()
            act()

        racers = [
            threading.Thread(target=end, args=(act,))
            for act in (
                lambda live=live: made.responder.fail(live, Cancelled("left")),
                lambda key=key: made.step(_last(key)),
                lambda key=key: made.step(_failed(key)),
            )
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        sent = made.senders[key].wait_for_end()
        assert [one.final for one in sent] == [True]


def test_a_response_that_cannot_be_sent_still_ends_the_request(desk: Callable[..., Desk]) -> None:
    def refuse(sent: Sent) -> None:
        if sent.response is not None:
            raise RuntimeError("no shared memory left")

    made = desk()
    made.add("a", before_send=refuse)
    made.add("b")
    made.step(_token("a", "x"), _token("b", "x"))
    [flag] = made.senders["a"].wait_for_end()
    assert flag.response is None
    made.step(_last("b"))
    assert _texts(made.senders["b"].wait_for_end()) == ["x", "!"]


def test_a_response_that_cannot_be_built_is_an_error(desk: Callable[..., Desk]) -> None:
    made = desk()
    made.add("a")
    made.step(TokenOutput("a", text="\ud83c", token_ids=[1]))  # half a surrogate pair has no UTF-8
    [sent] = made.senders["a"].wait_for_end()
    assert sent.error == "Request failed during generation: a response could not be sent"
    assert sent.final


def test_stop_waits_for_live_requests(desk: Callable[..., Desk]) -> None:
    made = desk()
    made.add("a")
    stopper = threading.Thread(target=made.responder.wait_until_idle, args=(30.0,))
    stopper.start()
    made.step(_token("a", "x"))
    made.senders["a"].wait_for_number(1)
    assert stopper.is_alive()
    made.step(_last("a"))
    stopper.join(10)
    assert not stopper.is_alive()
    assert made.senders["a"].is_closed


# ---- gathering ------------------------------------------------------------------------------------------------------


def test_few_streams_send_every_token(desk: Callable[..., Desk]) -> None:
    made = desk(gather_streams=1, gather_tokens=4, gather_s=FOREVER_S)
    made.add("a")
    for number in range(1, 4):
        made.step(_token("a", "x"))
        made.senders["a"].wait_for_number(number)
    made.step(_last("a"))
    assert _texts(made.senders["a"].wait_for_end()) == ["x", "x", "x", "!"]


def test_many_streams_send_the_first_token_at_once_and_then_gather(desk: Callable[..., Desk]) -> None:
    made = desk(gather_streams=0, gather_tokens=4, gather_s=FOREVER_S)
    made.add("a")
    made.step(_token("a", "1"))
    made.senders["a"].wait_for_number(1)
    for text in "2345":
        made.step(_token("a", text))
    made.senders["a"].wait_for_number(2)
    made.step(_token("a", "6"))
    made.step(_last("a"))
    assert _texts(made.senders["a"].wait_for_end()) == ["1", "2345", "6!"]


def test_gathered_tokens_do_not_wait_for_ever(desk: Callable[..., Desk]) -> None:
    made = desk(gather_streams=0, gather_tokens=1000, gather_s=0.01)
    made.add("a")
    made.step(_token("a", "1"))
    made.senders["a"].wait_for_number(1)
    made.step(_token("a", "2"))
    assert _texts(made.senders["a"].wait_for_number(2)) == ["1", "2"]


def test_a_whole_answer_is_one_response_however_long(desk: Callable[..., Desk]) -> None:
    made = desk(gather_streams=0, gather_tokens=2, gather_s=0.0)
    made.add("a", stream=False)
    for _ in range(20):
        made.step(_token("a", "x"))
    made.step(_last("a"))
    [sent] = made.senders["a"].wait_for_end()
    assert _texts([sent]) == ["x" * 20 + "!"]


# ---- clients that leave ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("submitted", [True, False])
def test_a_client_that_left_is_found_once(desk: Callable[..., Desk], submitted: bool) -> None:
    made = desk()
    made.add("stays")
    made.add("leaves", submitted=submitted)
    made.senders["leaves"].cancelled = True
    deadline = time.monotonic() + 10
    while not made.left:
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
    made.step(_failed("leaves"), _token("stays", "x"))
    made.senders["leaves"].wait_for_end()
    made.senders["stays"].wait_for_number(1)
    assert made.left == ["leaves"]


def test_nobody_is_asked_once_the_final_flag_is_sent(desk: Callable[..., Desk]) -> None:
    """Triton frees what `is_cancelled` asks with the final flag; a question that comes later crashes the server.

    `Desk` asserts at the end that no sender was closed before or while it was asked.
    """
    made = desk()
    for index in range(60):
        key = str(index)
        asked = threading.Event()

        def dawdle(asked: threading.Event = asked) -> None:
            asked.set()
            threading.Event().wait(0.002)

        made.add(key, while_asked=dawdle)
        assert asked.wait(10)
        made.step(_last(key))
        made.senders[key].wait_for_end()


def test_requests_are_found_by_the_clients_id(desk: Callable[..., Desk]) -> None:
    made = desk()
    may_send = threading.Event()
    live = made.add("a", before_send=lambda sent: may_send.wait(10))
    assert made.responder.by_client_id("client-a") == [live]
    assert made.responder.by_client_id("client-b") == []
    made.step(_last("a"))
    assert made.responder.by_client_id("client-a") == [], "answered in full, though not yet sent"
    may_send.set()
    made.senders["a"].wait_for_end()


# ---- keep-alive -----------------------------------------------------------------------------------------------------


def test_a_silent_stream_is_kept_alive_with_nobody_else_around(desk: Callable[..., Desk]) -> None:
    made = desk(keep_alive_s=0.01)
    made.add("a")
    sent = made.senders["a"].wait_for_number(3)
    assert all(one.names == set() and one.error is None and not one.final for one in sent)
    made.step(_last("a"))
    assert made.senders["a"].wait_for_end()[-1]["text_output"] == ["!"]


def test_nothing_is_written_before_the_engine_has_the_request(desk: Callable[..., Desk]) -> None:
    """An answer that begins with an error has HTTP status 400; after any other response it is too late for that."""
    made = desk(keep_alive_s=0.01)
    refused = made.add("refused", submitted=False)
    made.add("whole", stream=False)
    made.add("stream")
    made.senders["stream"].wait_for_number(3)
    made.responder.fail(refused, Overloaded("full"))
    [only] = made.senders["refused"].wait_for_end()
    assert only.error == "Model is overloaded: full"
    assert made.senders["whole"].sent == []


def test_without_keep_alive_silence_is_silent(desk: Callable[..., Desk]) -> None:
    made = desk()
    made.add("silent")
    made.add("a")
    made.step(_last("a"))
    made.senders["a"].wait_for_end()
    assert made.senders["silent"].sent == []
