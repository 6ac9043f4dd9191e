"""Full file systems under eight live streams: Triton's shared memory, and the disk of the log.

The server gets both as small file systems of its own, in a mount namespace of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .faults import (
    OPTIONS,
    FaultRecord,
    ask_briefly,
    assert_one_final_flag_each,
    endings_of,
    in_namespace,
    live_streams,
    needs_mounts,
    seconds_until_answered,
)
from .wire import wait_until_idle

if TYPE_CHECKING:
    from .conftest import Connect
    from .wire import Wire

pytestmark = [needs_mounts, pytest.mark.faults]
SHM_MIB = 48


@pytest.fixture(scope="module")
def cramped_server(lasting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with 48 MiB of shared memory and 1 MiB for its log."""
    folder = tmp_path_factory.mktemp("cramped_server")
    disk = folder / "disk"
    disk.mkdir()
    mounts = f"mount -t tmpfs -o size={SHM_MIB}m tmpfs /dev/shm && mount -t tmpfs -o size=1m tmpfs {disk}"
    prefix = ("unshare", "--mount", "--map-root-user", "sh", "-c", f'{mounts} && exec "$@"', "sh")
    options = OPTIONS | {"MODEL_ID": str(lasting_model)}
    arguments = ("--log-file", str(disk / "server.log"))
    running = RunningServer(folder, SERVER_ENVIRONMENT | options, arguments, prefix)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture
def cramped(cramped_server: RunningServer, connect: Connect) -> Wire:
    wait_until_idle(cramped_server)
    return connect(cramped_server)


def _fill(path: Path) -> None:
    """Write until the file system is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            pass


def test_no_shared_memory_is_left(cramped: Wire, fault_record: FaultRecord) -> None:
    streams = live_streams(cramped, max_new_tokens=2000)
    filler = in_namespace(cramped.server, "/dev/shm/filler")
    _fill(filler)
    begun_s = time.monotonic()
    try:
        small = ask_briefly(cramped)
        large = cramped.ask(text_input="word " * 600_000, sampling_parameters={"max_new_tokens": 1})
        outcomes = streams.outcomes()
    finally:
        filler.unlink()
    assert small.errors == []
    assert len(large.errors) == 1
    refusal = large.errors[0].partition(" for key")[0]
    assert_one_final_flag_each(outcomes)
    assert endings_of(outcomes) == {"complete"}
    recovered_s = seconds_until_answered(cramped, time.monotonic())
    fault_record.note(
        "/dev/shm full",
        clients_see=f"streams and small requests: nothing; a request of 3 MB: {refusal} ...",
        told_after_s=large.ended_s - begun_s,
        recovered_after_s=recovered_s,
    )


def test_no_disk_is_left_for_the_log(cramped: Wire, fault_record: FaultRecord) -> None:
    """Lines are lost, requests are not."""
    log = in_namespace(cramped.server, str(cramped.server.log.parent / "disk"))
    streams = live_streams(cramped, max_new_tokens=500)
    _fill(log / "filler")
    before = (log / "server.log").stat().st_size
    for _ in range(50):
        assert ask_briefly(cramped).errors == []
    outcomes = streams.outcomes()
    assert endings_of(outcomes) == {"complete"}
    assert_one_final_flag_each(outcomes)
    assert (log / "server.log").stat().st_size < before + 4096, "the disk was not full"
    (log / "filler").unlink()
    assert ask_briefly(cramped, request_id="after").errors == []
    deadline = time.monotonic() + 10
    while b"request_id=after" not in (log / "server.log").read_bytes():
        assert time.monotonic() < deadline, "logging did not go on"
        time.sleep(0.1)
    fault_record.note(
        "disk full for logs",
        clients_see="nothing; log lines are lost until there is room again",
        told_after_s=None,
        recovered_after_s=None,
    )
