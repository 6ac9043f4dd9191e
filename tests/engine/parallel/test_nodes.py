"""Ranks on two hosts: two loopback addresses, the real scripts/worker.py on the second one."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from worker import command

from textgen_engine.config import ParallelConfig
from textgen_engine.errors import ModelLoadError, RankFailure
from textgen_engine.parallel.launch import Invitation, RankProcesses
from textgen_engine.process import EngineClient, EngineState

from ...running_server import REPOSITORY_ROOT
from ..test_process import Mailbox, exists, wait_until
from ..tiny import Harness, make_config, make_request

SERVER_HOST, OTHER_HOST = "127.0.0.2", "127.0.0.3"
PROMPT = list(range(10, 30))
SILENCE_S = 4.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((SERVER_HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def environment_of(port: int, secret: str) -> dict[str, str]:
    """What scripts/worker.py is told on the other host, with one rank of two."""
    return {
        "MASTER_ADDR": SERVER_HOST,
        "MASTER_PORT": str(port),
        "NUM_SHARD": "2",
        "TEXTGEN_NUM_NODES": "2",
        "NODE_RANK": "1",
        "TEXTGEN_GROUP_SECRET": secret,
        "TEXTGEN_NODE_ADDRESS": OTHER_HOST,
        "TEXTGEN_NUM_THREADS": "1",
    }


class OtherHost:
    """scripts/worker.py with one rank of two, and options of its own."""

    def __init__(self, folder: Path, port: int, secret: str, **own: str) -> None:
        self.log = folder / "worker.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(REPOSITORY_ROOT / "scripts" / "worker.py")],
                env=os.environ | environment_of(port, secret) | own,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def ranks(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children()]

    def close(self) -> None:
        """Ctrl-C; nothing of it is left."""
        below = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0, self.log.read_text()
        assert not any(exists(process.pid) for process in below)


@pytest.fixture(scope="module")
def group(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineClient, OtherHost, Mailbox]]:
    port, secret, mailbox = free_port(), secrets.token_hex(8), Mailbox()
    other = OtherHost(tmp_path_factory.mktemp("host"), port, secret)  # first: it waits for the server
    parallel = ParallelConfig(2, 2, SILENCE_S, 120.0, SERVER_HOST, port, secret)
    client = EngineClient(make_config(llama, parallel=parallel), mailbox.on_report)
    try:
        client.start()
        yield client, other, mailbox
    finally:
        client.stop()
        other.close()


def test_two_hosts_answer_as_one(group: tuple[EngineClient, OtherHost, Mailbox], llama: Path) -> None:
    client, other, mailbox = group
    client.submit(make_request("first", PROMPT, 12))
    harness = Harness(make_config(llama))
    assert mailbox.answer("first").ids() == harness.run_alone(make_request("first", PROMPT, 12)).ids()
    harness.close()
    [rank] = other.ranks
    local = {connection.laddr.ip for connection in psutil.Process(rank).net_connections("tcp")}
    assert OTHER_HOST in local, "the ranks talk between the two addresses"


def test_a_rank_lost_on_the_other_host_comes_back(group: tuple[EngineClient, OtherHost, Mailbox]) -> None:
    """Nobody asks meanwhile: its silence is enough."""
    client, other, mailbox = group
    [rank] = other.ranks
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: client.num_restarts == 1 and client.state is EngineState.READY, 200)
    client.submit(make_request("again", PROMPT, 12))
    assert mailbox.answer("again").ids() == mailbox.answers["first"].ids()


def test_without_the_secret_nobody_takes_part(llama: Path) -> None:
    """Neither may a stranger's words make a rank, nor may a stranger's store make a rank believe it."""
    parallel = ParallelConfig(2, 2, 60.0, 1.0, SERVER_HOST, free_port(), "right")
    ranks = RankProcesses(make_config(llama, parallel=parallel), on_loss=lambda reason: None)
    invitation = Invitation(1, 0, SERVER_HOST, parallel.master_port, OTHER_HOST, secret="wrong")
    with pytest.raises(RankFailure, match="TEXTGEN_GROUP_SECRET"):
        invitation.accept()
    stranger = Invitation(1, 0, SERVER_HOST, parallel.master_port, OTHER_HOST, secret="right").accept()
    object.__setattr__(stranger, "secret", "wrong")
    guest = stranger.enter()
    stop = threading.Event()

    def keep_saying() -> None:
        while not stop.wait(0.1):
            guest.say_ready()

    thread = threading.Thread(target=keep_saying)
    thread.start()
    try:
        with pytest.raises(ModelLoadError, match="rank 1 of 2, on another host, did not come within 1 seconds"):
            ranks.join()
    finally:
        stop.set()
        thread.join()
        ranks.close()


def test_what_another_rank_cannot_load_is_said_with_its_own_reason(llama: Path) -> None:
    parallel = ParallelConfig(2, 2, 60.0, 10.0, SERVER_HOST, free_port(), "secret")
    ranks = RankProcesses(make_config(llama, parallel=parallel), on_loss=lambda reason: None)
    guest = Invitation(1, 0, SERVER_HOST, parallel.master_port, OTHER_HOST, secret="secret").accept().enter()
    guest.say_failed("not enough memory: the model needs 3.0 GiB, 1.0 GiB are free")
    with pytest.raises(
        ModelLoadError, match=r"^rank 1 of 2: not enough memory: the model needs 3\.0 GiB, 1\.0 GiB are"
    ):
        ranks.join()
    ranks.close()


def test_a_busy_port_is_one_line(llama: Path) -> None:
    with socket.socket() as listener:
        listener.bind((SERVER_HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        config = make_config(llama, parallel=ParallelConfig(2, 2, 60.0, 1.0, SERVER_HOST, port, "secret"))
        with pytest.raises(ModelLoadError, match=rf"^the ranks cannot meet at {SERVER_HOST}:{port}: Address already"):
            RankProcesses(config, on_loss=lambda reason: None)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"NODE_RANK": "2"}, "ranks 2 to 2 are not among 1 to 1"),
        ({"NUM_SHARD": "3"}, "must be a multiple of TEXTGEN_NUM_NODES"),
    ],
)
def test_wrong_options_are_one_line(environment: dict[str, str], message: str) -> None:
    ended = CliRunner().invoke(command(), env=environment_of(1, "secret") | environment)
    assert ended.exit_code == 1
    [line] = ended.output.splitlines()
    assert message in line
