"""Many at once, many in a row, and one who does not read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil

from .wire import wait_until_idle

if TYPE_CHECKING:
    from ..running_server import RunningServer
    from .wire import Wire

# MAX_CONCURRENT_REQUESTS of the shared server.
NUM_STREAMS = 64

# Growth allowed over 500 requests, per process. A leak of one response or one request object (a few KiB) would show
# as megabytes; allocators and caches that are filled before the measurement move by less.
RSS_TOLERANCE_BYTES = 6 << 20


def _request(index: int) -> dict[str, Any]:
    """Eight kinds of requests, of different lengths, half of them sampled."""
    sampling: dict[str, Any] = {"max_new_tokens": 8 + index, "ignore_eos_token": True}
    if index % 2:
        sampling |= {"temperature": 0.8, "seed": index}
    return {"text_input": f"Chapter {index}. " + "It rained. " * index * 3, "sampling_parameters": sampling}


def test_64_concurrent_streams_finish_with_their_own_texts(server: RunningServer, wire: Wire) -> None:
    alone = [wire.ask(**_request(index)).text for index in range(8)]
    assert len(set(alone)) == 8
    waiting = [wire.ask_soon(**_request(index % 8), stream=True) for index in range(NUM_STREAMS)]
    outcomes = [outcome.result() for outcome in waiting]
    assert [outcome.errors for outcome in outcomes] == [[]] * NUM_STREAMS
    assert [outcome.text for outcome in outcomes] == [alone[index % 8] for index in range(NUM_STREAMS)]
    finals = [[response.final for response in outcome.responses].count(True) for outcome in outcomes]
    assert finals == [1] * NUM_STREAMS
    wait_until_idle(server)


def test_500_short_requests_in_a_row_leave_memory_flat(server: RunningServer, wire: Wire) -> None:
    processes = {role: psutil.Process(server.pid(role)) for role in ("textgen", "engine")}

    def resident() -> dict[str, int]:
        return {role: process.memory_info().rss for role, process in processes.items()}

    def ask(num: int) -> None:
        """So many requests in a row, in four rows."""

        def row(first: int) -> None:
            for index in range(first, num, 4):
                request: dict[str, Any] = {"text_input": "Hi", "stream": index % 3 == 0}
                sampling = {"max_new_tokens": 1, "details": index % 5 == 0}
                assert wire.ask(**request, sampling_parameters=sampling).errors == []

        with ThreadPoolExecutor(4) as rows:
            list(rows.map(row, range(4)))

    ask(100)  # fills caches and allocators
    before = resident()
    ask(500)
    grown = {role: resident()[role] - before[role] for role in processes}
    assert all(growth < RSS_TOLERANCE_BYTES for growth in grown.values()), grown


def test_a_reader_that_does_not_read_holds_nobody(wire: Wire) -> None:
    """Neither the others nor its own slot: its text waits for it in the server, bounded by max_new_tokens."""
    sampling = {"max_new_tokens": 32, "ignore_eos_token": True}
    slow: dict[str, Any] = {"text_input": "A slow story:", "stream": True, "sampling_parameters": sampling}
    expected = wire.ask(**slow).text
    over_grpc = wire.open(**slow)
    over_http = wire.open_events(
        {"text_input": "A slow story:", "stream": True, "max_new_tokens": 32, "ignore_eos_token": True}
    )
    others = [waiting.result() for waiting in [wire.ask_soon(**slow) for _ in range(3)]]
    assert [other.text for other in others] == [expected] * 3
    wait_until_idle(wire.server)  # the slow ones, too, have given their slots back
    assert "".join(event["text_output"] for event in over_http) == expected
    assert wire.rest_soon(over_grpc).result().text == expected
