"""Faults of the processes around the engine under eight live streams: stubs, tritonserver, an orderly stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .faults import (
    OPTIONS,
    FaultRecord,
    ask_briefly,
    assert_one_final_flag_each,
    endings_of,
    live_streams,
    seconds_until_answered,
)
from .wire import wait_until

if TYPE_CHECKING:
    from .conftest import Connect
    from .wire import Wire

# What gRPC makes of a peer that is gone; which of them is a matter of moments.
GONE = {"gRPC status UNAVAILABLE", "gRPC status CANCELLED", "gRPC status UNKNOWN"}


@pytest.fixture(scope="module")
def mortal_server(lasting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of which anything may be killed."""
    options = OPTIONS | {"MODEL_ID": str(lasting_model), "MAX_SERVER_RESTARTS": "100"}
    running = RunningServer(tmp_path_factory.mktemp("mortal_server"), SERVER_ENVIRONMENT | options)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture
def mortal(mortal_server: RunningServer, connect: Connect) -> Wire:
    return connect(mortal_server.wait_until_ready())


def test_a_stub_of_the_tokenizer_is_killed(mortal: Wire, fault_record: FaultRecord) -> None:
    """Triton would never replace it, and half of all requests with a text would fail for good."""
    server = mortal.server
    streams = live_streams(mortal, max_new_tokens=1000)
    old = server.pids["tokenizer"]
    assert len(old) == 2
    begun_s = time.monotonic()
    os.kill(old[0], signal.SIGKILL)
    errors = set()
    while len(set(server.pids["tokenizer"]) - set(old)) < 2:
        errors |= set(mortal.ask(text_input="Hi", sampling_parameters={"max_new_tokens": 1}).errors)
        assert time.monotonic() - begun_s < 60
    assert errors == set()

    def is_well() -> bool:
        answers = [mortal.ask(text_input="Hi", sampling_parameters={"max_new_tokens": 1}) for _ in range(6)]
        return all(answer.errors == [] for answer in answers)

    wait_until(is_well, "every text is tokenized again")
    recovered_s = time.monotonic() - begun_s
    outcomes = streams.outcomes()
    assert endings_of(outcomes) == {"complete"}
    assert_one_final_flag_each(outcomes)
    assert mortal.ask(model="ensemble", text_input="Hi", sampling_parameters={"max_new_tokens": 1}).errors == []
    fault_record.note(
        "stub of tokenizer killed",
        clients_see="nothing; until then a new request with a text may take a second longer",
        told_after_s=None,
        recovered_after_s=recovered_s,
    )


@pytest.mark.parametrize(
    ("role", "fault"),
    [
        ("textgen", "stub of textgen killed"),
        pytest.param("tritonserver", "tritonserver killed", marks=pytest.mark.faults),
    ],
)
def test_what_cannot_be_replaced_in_place(mortal: Wire, role: str, fault: str, fault_record: FaultRecord) -> None:
    """Without the launcher, clients of a dead stub would wait for ever."""
    server = mortal.server
    streams = live_streams(mortal)
    engine = psutil.Process(server.pid("engine"))
    begun_s = time.monotonic()
    os.kill(server.pid(role), signal.SIGKILL)
    outcomes = streams.outcomes(30)
    told_s = max(outcome.ended_s for outcome in outcomes) - begun_s
    assert endings_of(outcomes) <= GONE
    assert told_s < 15
    wait_until(lambda: not server.ready_file.exists(), "not ready any more")
    engine.wait(10)
    recovered_s = seconds_until_answered(mortal, begun_s, within_s=120)
    server.wait_until_ready()  # the new process ids
    fault_record.note(
        fault, clients_see=" or ".join(sorted(endings_of(outcomes))), told_after_s=told_s, recovered_after_s=recovered_s
    )


def test_a_stop_in_good_order(mortal: Wire, fault_record: FaultRecord) -> None:
    """The last one here: eight streams are answered in full, then nothing is left."""
    server = mortal.server
    assert ask_briefly(mortal).errors == []
    streams = live_streams(mortal, max_new_tokens=400)
    begun_s = time.monotonic()
    assert server.stop() == 0
    ended_s = time.monotonic() - begun_s
    outcomes = streams.outcomes()
    assert endings_of(outcomes) == {"complete"}
    assert_one_final_flag_each(outcomes)
    assert not server.pids
    assert ask_briefly(mortal, within_s=5).broken is not None
    fault_record.note(
        "SIGTERM",
        clients_see="streams end complete; new requests: gRPC status UNAVAILABLE",
        told_after_s=None,
        recovered_after_s=None,
    )
    assert ended_s < float(SERVER_ENVIRONMENT["GRACEFUL_TERMINATION_TIMEOUT"]) + 25
