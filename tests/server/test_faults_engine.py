"""Faults of the engine under eight live streams: what clients see, and how soon there is an answer again.

The model is a tiny one with modelling code of its own, which fails at certain token ids. What a killed engine means for
requests that wait is in tests/server/test_supervision.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .faults import (
    ALLOCATES_TOO_MUCH,
    CRASHES,
    LASTING,
    LOOPS,
    NUM_STREAMS,
    OPTIONS,
    RAISES_MEMORY_ERROR,
    FaultRecord,
    ask_briefly,
    assert_one_final_flag_each,
    endings_of,
    live_streams,
    save_faulty_checkpoint,
    seconds_until_answered,
)
from .wire import wait_until, wait_until_idle

if TYPE_CHECKING:
    from .conftest import Connect
    from .wire import Wire

HEARTBEAT_S = 3.0
HANG_S = 4.0
FAILED = "Request failed during generation: the engine "


@pytest.fixture(scope="module")
def faulty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose engine fails when it is asked to, and may do so any number of times."""
    options = OPTIONS | {
        "MODEL_ID": str(save_faulty_checkpoint(tmp_path_factory.mktemp("faulty"))),
        "TRUST_REMOTE_CODE": "true",
        "TEXTGEN_MAX_ENGINE_RESTARTS": "100",
        "TEXTGEN_ENGINE_HEARTBEAT_TIMEOUT_S": str(HEARTBEAT_S),
        "TEXTGEN_ENGINE_HANG_TIMEOUT_S": str(HANG_S),
    }
    running = RunningServer(tmp_path_factory.mktemp("faulty_server"), SERVER_ENVIRONMENT | options)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture
def faulty(faulty_server: RunningServer, connect: Connect) -> Wire:
    """A connection to it, while nothing runs there."""
    wait_until_idle(faulty_server)
    return connect(faulty_server)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_engine_is_killed_or_stopped(faulty: Wire, how: signal.Signals, fault_record: FaultRecord) -> None:
    """A stopped process answers nothing and ends nothing; its missing heartbeat tells."""
    streams = live_streams(faulty)
    begun_s = time.monotonic()
    os.kill(faulty.server.pid("engine"), how)
    outcomes = streams.outcomes()
    told_s = max(outcome.ended_s for outcome in outcomes) - begun_s
    recovered_s = seconds_until_answered(faulty, begun_s)
    if how is signal.SIGKILL:
        expected, fault = f"{FAILED}was killed", "engine killed"
        assert told_s < 2.0
    else:
        expected, fault = f"{FAILED}showed no sign of life for {HEARTBEAT_S:g} seconds", "engine hangs"
        assert HEARTBEAT_S - 1 < told_s < HEARTBEAT_S + 4.0
    assert endings_of(outcomes) == {expected}
    assert_one_final_flag_each(outcomes)
    fault_record.note(fault, clients_see=expected, told_after_s=told_s, recovered_after_s=recovered_s)


@pytest.mark.faults
def test_an_idle_engine_that_is_stopped_is_found_before_anybody_asks(faulty: Wire) -> None:
    old = faulty.server.pid("engine")
    os.kill(old, signal.SIGSTOP)
    wait_until(lambda: faulty.server.pids.get("engine", [old]) != [old], "a new engine")
    assert seconds_until_answered(faulty, time.monotonic()) < 60


@pytest.mark.faults
def test_a_step_that_never_ends(faulty: Wire, fault_record: FaultRecord) -> None:
    streams = live_streams(faulty)
    begun_s = time.monotonic()
    looping = faulty.ask_soon(input_ids=[LOOPS, 5, 6], sampling_parameters={"max_new_tokens": 4})
    outcomes = [*streams.outcomes(), looping.result()]
    told_s = max(outcome.ended_s for outcome in outcomes) - begun_s
    expected = f"{FAILED}did not answer for {HANG_S:g} seconds"
    assert endings_of(outcomes) == {expected}
    assert_one_final_flag_each(outcomes)
    recovered_s = seconds_until_answered(faulty, begun_s)
    fault_record.note("a step never ends", clients_see=expected, told_after_s=told_s, recovered_after_s=recovered_s)


@pytest.mark.parametrize(
    ("token", "error"), [(RAISES_MEMORY_ERROR, "MemoryError"), (ALLOCATES_TOO_MUCH, "RuntimeError")]
)
def test_a_request_for_which_memory_runs_out_fails_alone(
    faulty: Wire, token: int, error: str, fault_record: FaultRecord
) -> None:
    engine = faulty.server.pid("engine")
    streams = live_streams(faulty, max_new_tokens=300)
    begun_s = time.monotonic()
    failed = faulty.ask(input_ids=[5, token, 6], sampling_parameters={"max_new_tokens": 4})
    assert failed.errors == [f"{FAILED}could not run a step ({error})"]
    assert_one_final_flag_each([failed])
    recovered_s = seconds_until_answered(faulty, begun_s)
    outcomes = streams.outcomes()
    assert endings_of(outcomes) == {"complete"}
    assert_one_final_flag_each(outcomes)
    assert faulty.server.pid("engine") == engine
    fault_record.note(
        "out of memory in a step",
        clients_see=f"the request for which it runs out: {failed.errors[0]}; the others: nothing",
        told_after_s=failed.ended_s - begun_s,
        recovered_after_s=recovered_s,
    )


def test_a_poisonous_request_is_found_out(faulty: Wire, fault_record: FaultRecord) -> None:
    """All clients send again what failed, as clients do. The engine dies three times, the third time alone with the
    guilty request and whoever is new; then it is refused, and nobody else ever is."""
    begun_s = time.monotonic()
    innocent = LASTING | {"max_new_tokens": 2000}
    poison = {"input_ids": [5, CRASHES, 6], "sampling_parameters": {"max_new_tokens": 4}}
    restarts = faulty.server.metric("tgi_engine_restarts")
    for death in range(2):
        streams = [
            faulty.open(input_ids=[20 + i, 62, 63], stream=True, sampling_parameters=innocent)
            for i in range(NUM_STREAMS)
        ]
        for stream in streams:
            next(stream)
        endings = [faulty.rest_soon(stream) for stream in streams]
        poisoned = faulty.ask(**poison)
        outcomes = [poisoned, *(ending.result() for ending in endings)]
        assert endings_of(outcomes) == {f"{FAILED}crashed (SIGSEGV)"}, death
        assert_one_final_flag_each(outcomes)
    # From now on those that were there twice run one at a time.
    again = [
        faulty.ask_soon(input_ids=[20 + i, 62, 63], stream=True, sampling_parameters=innocent)
        for i in range(NUM_STREAMS)
    ]
    poisoned = faulty.ask(**poison)
    assert poisoned.errors == [f"{FAILED}crashed (SIGSEGV)"]
    endings = [endings_of([call.result()]) for call in again]
    assert endings.count({"complete"}) >= NUM_STREAMS - 1, "at most one had its turn when it came"
    refusal = "Input validation error: the engine died each of the 3 times that this request was running; "
    assert faulty.error_of(**poison).startswith(refusal)
    # More, if the gauge lagged behind the test before.
    wait_until(lambda: faulty.server.metric("tgi_engine_restarts") >= restarts + 3, "three restarts are counted")
    told_s = time.monotonic() - begun_s
    fault_record.note(
        "a request crashes the engine",
        clients_see=f"{FAILED}crashed (SIGSEGV); sent again and again, the guilty one is refused at the fourth time",
        told_after_s=None,
        recovered_after_s=told_s,
    )
    assert ask_briefly(faulty).errors == []
