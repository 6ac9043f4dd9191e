"""Faults of a server over two ranks, under eight live streams; that nothing of it is left, however it ends; and that
what keeps a rank from starting reaches the user as one line.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from textgen_serve.shared_memory import clean_abandoned

from ..engine.parallel.test_nodes import SERVER_HOST, OtherHost, free_port
from ..engine.tiny import save_checkpoint
from ..running_server import SERVE, SERVER_ENVIRONMENT, RunningServer
from .faults import (
    OPTIONS,
    FaultRecord,
    assert_one_final_flag_each,
    endings_of,
    live_streams,
    seconds_until_answered,
)
from .leftovers import Holdings, is_alive
from .wire import wait_until, wait_until_idle

if TYPE_CHECKING:
    from ..running_server import StartServer
    from .conftest import Connect

pytestmark = pytest.mark.faults

SILENCE_S = 3.0
FAILED = "Request failed during generation: the engine "
TWO_RANKS = {"NUM_SHARD": "2", "TEXTGEN_COLLECTIVE_TIMEOUT_S": str(SILENCE_S), "TEXTGEN_MAX_ENGINE_RESTARTS": "100"}


@pytest.fixture(scope="module")
def split_server(lasting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    environment = SERVER_ENVIRONMENT | OPTIONS | TWO_RANKS | {"MODEL_ID": str(lasting_model)}
    # In a session of its own, as a shell starts a command: Ctrl-C then reaches all that is in its foreground.
    running = RunningServer(tmp_path_factory.mktemp("split_server"), environment, prefix=("setsid",))
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
    old = [psutil.Process(split_server.pid(role)) for role in ("engine", "rank")]
    begun_s = time.monotonic()
    old[1].send_signal(how)
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
    wait_until(lambda: not any(is_alive(process) for process in old), "the old group is gone")
    fault_record.note(fault, clients_see=ending, told_after_s=told_s, recovered_after_s=recovered_s)


def test_a_killed_stub_leaves_nothing_to_the_server_that_is_started_again(
    split_server: RunningServer, connect: Connect, fault_record: FaultRecord
) -> None:
    """Again and again: whatever the new ranks might wait for, they would sooner or later."""
    told, recovered, sees = 0.0, 0.0, set[str]()
    for num_streams in (8, 0, 8):
        live = live_streams(connect(split_server), num_streams)
        held = Holdings().note(split_server.launcher.pid)
        assert len(held.ports) >= 5, "Triton's three, and those that the ranks meet at"
        ready = ready_file_of(split_server)
        assert ready is not None
        begun_s = time.monotonic()
        os.kill(split_server.pid("textgen"), signal.SIGKILL)
        outcomes = live.outcomes()
        told = max([told, *(outcome.ended_s - begun_s for outcome in outcomes)])
        sees |= endings_of(outcomes)
        wait_until(lambda old=ready: ready_file_of(split_server) not in (None, old), "it is ready again", 120)  # type: ignore[misc]
        recovered = max(recovered, time.monotonic() - begun_s)
        held.ports = {(address, port) for address, port in held.ports if port not in ready.values()}
        held.wait_until_free()
        assert split_server.wait_until_ready().pid("rank")
    seconds_until_answered(connect(split_server), time.monotonic())
    [ending] = sees
    fault_record.note("stub of two ranks killed", clients_see=ending, told_after_s=told, recovered_after_s=recovered)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGINT", "SIGTERM", "launcher killed"])
def test_nothing_is_left_behind(
    split_server: RunningServer, connect: Connect, start_server: StartServer, lasting_model: Path, how: str
) -> None:
    """No process of any rank, no busy port, no shared memory; while streams run."""
    server = split_server
    if how != "Ctrl-C":  # which ends the shared one
        own = {"MODEL_ID": str(lasting_model), "GRACEFUL_TERMINATION_TIMEOUT": "1"}
        server = start_server(**(OPTIONS | TWO_RANKS | own))
    live_streams(connect(server))
    held = Holdings().note(server.launcher.pid)
    assert len(held.ports) >= 5, "Triton's three, and those that the ranks meet at"
    if how == "launcher killed":
        server.launcher.kill()
        wait_until(lambda: not held.living(), "everything below the launcher ended")
        clean_abandoned()  # as the next server does before it starts
    elif how == "Ctrl-C":  # a terminal sends it to everybody
        os.killpg(server.launcher.pid, signal.SIGINT)
        assert server.launcher.wait(60) == 0
    else:
        assert server.stop(signal.Signals[how]) == 0
    held.wait_until_free()


def test_a_part_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """A vocabulary of four, two for each rank: ranks 0 and 1 could hold their parts, for rank 2 none is left."""
    model = save_checkpoint(tmp_path / "model", vocab_size=4)
    line = failed_start(tmp_path, MODEL_ID=str(model), NUM_SHARD="3")
    assert "rank 2 of 3: llama of" in line and "a vocabulary of 4 cannot be split over 3 ranks" in line


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise ImportError('libgomp.so.1: cannot open shared object file')", "ended with exit code 1 while loading"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL while loading"),
    ],
    ids=["import fails", "killed"],
)
def test_a_rank_that_ends_while_it_loads_is_one_line(
    tmp_path: Path, lasting_model: Path, fault: str, reason: str
) -> None:
    """Rank 1 only, when it imports torch."""
    (tmp_path / "sitecustomize.py").write_text(RANK_ONLY.format(fault=fault))
    line = failed_start(tmp_path, MODEL_ID=str(lasting_model), NUM_SHARD="2", PYTHONPATH=str(tmp_path))
    assert f"error: the process of rank 1 of 2 {reason}" in line


def test_what_only_rank_1_finds_damaged_is_one_line(tmp_path: Path, lasting_model: Path) -> None:
    """Its host has a copy of its own, which ends too early. It is told which rank it is as torchrun tells it."""
    copy = shutil.copytree(lasting_model, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    port, secret = free_port(), secrets.token_hex(8)
    by_torchrun = {"NODE_RANK": "", "NUM_SHARD": "", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    other = OtherHost(tmp_path, port, secret, MODEL_ID=str(copy), **by_torchrun)
    try:
        line = failed_start(
            tmp_path,
            MODEL_ID=str(lasting_model),
            NUM_SHARD="2",
            TEXTGEN_NUM_NODES="2",
            MASTER_ADDR=SERVER_HOST,
            MASTER_PORT=str(port),
            TEXTGEN_GROUP_SECRET=secret,
        )
    finally:
        other.close()
    assert f"error: rank 1 of 2: {weights} is damaged: it ends at byte" in line


# A module that every Python imports at its start; what a process was started with tells which it is.
RANK_ONLY = """
import os
import signal
import sys


class Faulty:
    def find_spec(self, name, *_):
        if name == "torch":
            {fault}


if any("textgen_engine.parallel.worker" in word for word in sys.orig_argv):
    sys.meta_path.insert(0, Faulty())
"""


def failed_start(folder: Path, **environment: str) -> str:
    """Start a server that cannot start: exit code 1 and nothing left. Returns the one line of its stderr."""
    command = [sys.executable, str(SERVE), "--no-demo", "--no-gateway", "--log-file", str(folder / "server.log")]
    command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TEXTGEN_")}
    held = Holdings()
    with (folder / "stderr.txt").open("wb") as stderr:
        launcher = subprocess.Popen(
            command, env=inherited | SERVER_ENVIRONMENT | environment, stdout=subprocess.DEVNULL, stderr=stderr
        )
    try:
        deadline_s = time.monotonic() + 120
        while launcher.poll() is None and time.monotonic() < deadline_s:
            held.note(launcher.pid)
            time.sleep(0.1)
        assert launcher.poll() == 1
    finally:
        while launcher.poll() is None:  # the second signal ends everything at once
            launcher.terminate()
            time.sleep(0.2)
    assert len(held.processes) >= 4, "tritonserver, two stubs, an engine"
    held.wait_until_free()
    [line] = (folder / "stderr.txt").read_text().splitlines()
    assert line.startswith("error: ")
    return line


def ready_file_of(server: RunningServer) -> dict[str, Any] | None:
    """What the launcher wrote when requests succeeded; None while they do not."""
    assert server.launcher.poll() is None, server.describe()
    try:
        ready: dict[str, Any] = json.loads(server.ready_file.read_text())
    except FileNotFoundError:
        return None
    return ready
