"""Faults of a server over two ranks, under eight live streams.

That nothing is left of one that ends is looked for in tests/server/test_parallel.py.
"""

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
    assert_one_final_flag_each,
    endings_of,
    live_streams,
    seconds_until_answered,
)
from .wire import wait_until, wait_until_idle

if TYPE_CHECKING:
    from .conftest import Connect

pytestmark = pytest.mark.faults

SILENCE_S = 3.0
FAILED = "Request failed during generation: the engine "
TWO_RANKS = {"NUM_SHARD": "2", "TEXTGEN_COLLECTIVE_TIMEOUT_S": str(SILENCE_S), "TEXTGEN_MAX_ENGINE_RESTARTS": "100"}


@pytest.fixture(scope="module")
def split_server(lasting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    environment = SERVER_ENVIRONMENT | OPTIONS | TWO_RANKS | {"MODEL_ID": str(lasting_model)}
    running = RunningServer(tmp_path_factory.mktemp("split_server"), environment)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_is_killed_or_stopped(
    split_server: RunningServer, connect: Connect, how: signal.Signals, fault_record: FaultRecord
) -> None:
    wait_until_idle(split_server)
    split = connect(split_server)
    streams = live_streams(split)
    old = [split_server.pid("engine"), split_server.pid("rank")]
    begun_s = time.monotonic()
    os.kill(old[1], how)
    outcomes = streams.outcomes()
    told_s = max(outcome.ended_s for outcome in outcomes) - begun_s
    recovered_s = seconds_until_answered(split, begun_s)
    [ending] = endings_of(outcomes)
    assert_one_final_flag_each(outcomes)
    if how is signal.SIGKILL:
        fault = "rank killed"
        assert ending == f"{FAILED}lost rank 1 of 2, which was killed by SIGKILL"
        assert told_s < 2.0
    else:
        fault = "rank hangs"
        assert ending.startswith(FAILED) and "gone or does not answer" in ending
        assert told_s < SILENCE_S + 4.0
    wait_until(lambda: not any(is_alive(pid) for pid in old), "the old group is gone")
    fault_record.note(fault, clients_see=ending, told_after_s=told_s, recovered_after_s=recovered_s)


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
