"""How the ranks of one model come together, and how the loss of one is noticed.

Rank 0, the engine's process, keeps the store in which all ranks meet, and starts the other ranks of its host. Those of
other hosts are started there (scripts/worker.py) and come by themselves, with the group's secret. Each rank loads its
part, says so in the store, and joins the groups when all have. From then on rank 0 watches: a rank that ends, or on
another host falls silent, takes the engine with it, and the engine's supervisor starts everything anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import hmac
import logging
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from textgen_engine.config import EngineConfig, ModelConfig
from textgen_engine.errors import ModelLoadError, RankFailure
from textgen_engine.parallel.group import Collectives, Stop
from textgen_engine.parallel.split import Shard

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_POLL_S = 0.05
_STOP_TIMEOUT_S = 5.0
# The store answers at once or not at all; what takes long is waited for by polling.
_STORE_TIMEOUT_S = 30.0
_DIGEST_DIGITS = 2 * hashlib.sha256().digest_size
_PR_SET_PDEATHSIG = 1


class Ranks(ABC):
    """The other ranks, as rank 0 sees them while it starts and when it ends."""

    @property
    @abstractmethod
    def shard(self) -> Shard:
        """Rank 0 of how many."""

    @property
    @abstractmethod
    def model(self) -> ModelConfig:
        """The model's options on rank 0."""

    @abstractmethod
    def join(self) -> Collectives:
        """Wait until every rank has loaded its part, then form the groups. Raises ModelLoadError with the first
        rank's reason when one cannot, and RankFailure when one is lost."""

    @abstractmethod
    def whose_loss(self) -> str | None:
        """After a RankFailure: which rank is gone, and how; None when all seem to be there."""

    @abstractmethod
    def close(self) -> None:
        """End them. Idempotent."""


@dataclass(frozen=True)
class Meeting:
    """All that a rank has to know: its share of the work, and where the store is.

    nonce and secret, where there is one, make what it says in the store its own.
    """

    model: ModelConfig
    shard: Shard
    store_address: str
    store_port: int
    own_address: str
    timeout_s: float
    has_adapters: bool = False
    nonce: str = ""
    secret: str = field(default="", repr=False)
    log_level: str = "info"
    json_output: bool = False

    def enter(self) -> Guest:
        """Connect to the store. Raises RankFailure when there is none."""
        return Guest(self, _connect(self.store_address, self.store_port))

    def join(self, store: Store) -> Collectives:
        """Form the groups, once all ranks are known to be ready."""
        return Collectives(
            store,
            self.shard.rank,
            self.shard.world_size,
            address=self.own_address,
            timeout_s=self.timeout_s,
            device=torch.device(self.model.device),
        )


@dataclass(frozen=True)
class Invitation:
    """What a rank on another host is started with: where the store is, and how to know it is the right one.

    model_id and num_threads are this host's, None for the same as rank 0's. local_rank: which of this host's devices.
    """

    rank: int
    local_rank: int
    store_address: str
    store_port: int
    own_address: str
    secret: str = field(repr=False)
    model_id: str | None = None
    num_threads: int | None = None
    log_level: str = "info"
    json_output: bool = False

    def accept(self) -> Meeting:
        """Wait for rank 0's instructions. Raises RankFailure when the store is not there, or is somebody else's."""
        store = _connect(self.store_address, self.store_port)
        try:
            sealed = store.get(_meeting_key(self.rank))
        except RuntimeError as error:
            raise RankFailure(f"rank 0 expects no rank {self.rank}") from error
        meeting = _open(sealed, self.secret)
        model = meeting.model
        if model.device != "cpu":
            model = replace(model, device=f"cuda:{self.local_rank}")
        model = replace(
            model, model_id=self.model_id or model.model_id, num_threads=self.num_threads or model.num_threads
        )
        return replace(
            meeting,
            model=model,
            store_address=self.store_address,
            own_address=self.own_address,
            secret=self.secret,
            log_level=self.log_level,
            json_output=self.json_output,
        )


@dataclass
class Guest:
    """A rank other than 0, in the store."""

    meeting: Meeting
    store: Store

    def say_ready(self) -> None:
        """The rank's part is loaded."""
        self._say("ready")

    def say_failed(self, reason: str) -> None:
        """The rank cannot load its part; `reason` is one line for the user."""
        self._say(f"failed {reason}")

    def join(self) -> Collectives:
        """Wait for all ranks to be ready, which takes as long as the slowest needs; then form the groups."""
        try:
            while not self.store.check(["go"]):
                time.sleep(_POLL_S)
        except RuntimeError as error:
            raise RankFailure("rank 0 is gone") from error
        return self.meeting.join(self.store)

    def show_life(self) -> None:
        """From now on, on a thread of its own, until the process or rank 0 ends (which ends the process)."""
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()

    def _pulse(self) -> None:
        try:
            store = _connect(self.meeting.store_address, self.meeting.store_port)
            beat = 0
            while True:
                beat += 1
                store.set(_pulse_key(self.meeting.shard.rank), str(beat))
                time.sleep(min(5.0, self.meeting.timeout_s / 4))
        except (RuntimeError, RankFailure):
            os._exit(1)

    def _say(self, status: str) -> None:
        text = f"{self.meeting.nonce} {self.meeting.shard.rank} {status}"
        self.store.set(_status_key(self.meeting.shard.rank), _sealed(text.encode(), self.meeting.secret))


class RankProcesses(Ranks):
    """The ranks of this host as child processes of this one, and those of other hosts as they come."""

    def __init__(self, config: EngineConfig, on_loss: Callable[[str], None]) -> None:
        """Start them. on_loss is called, from a thread of its own and with a reason, when one ends by itself once all
        have loaded their parts.
        Raises ModelLoadError when the store's address cannot be listened on, or no process can be started."""
        self._on_loss = on_loss
        parallel = config.parallel
        self._join_timeout_s = parallel.join_timeout_s
        self._store, address, port = _open_store(config)
        nonce = secrets.token_hex(8)
        self._meetings = [
            Meeting(
                model=_model_of_rank(config, rank),
                shard=Shard(rank, parallel.world_size),
                store_address=address,
                store_port=port,
                own_address=address,
                timeout_s=parallel.collective_timeout_s,
                has_adapters=config.lora.is_enabled,
                nonce=nonce,
                secret=parallel.secret,
                log_level=config.log_level,
                json_output=config.json_output,
            )
            for rank in range(parallel.world_size)
        ]
        self._children: dict[int, RankProcess] = {}
        self._pulses: dict[int, tuple[bytes, float]] = {}  # of ranks elsewhere: the last one, and since when
        self._collectives: Collectives | None = None
        self._closing = threading.Event()
        try:
            for meeting in self._meetings[1:]:
                rank = meeting.shard.rank
                if rank < parallel.ranks_per_node:
                    self._children[rank] = RankProcess(meeting, rank)
                else:
                    sealed = _sealed(pickle.dumps(replace(meeting, secret="")), parallel.secret)
                    self._store.set(_meeting_key(rank), sealed)
        except OSError as error:
            self.close()
            raise ModelLoadError(f"cannot start the process of another rank: {error}") from error

    @property
    def shard(self) -> Shard:
        return self._meetings[0].shard

    @property
    def model(self) -> ModelConfig:
        return self._meetings[0].model

    @property
    def collectives(self) -> Collectives | None:
        """Rank 0's end of the groups, once they are formed."""
        return self._collectives

    def join(self) -> Collectives:
        deadline_s = time.monotonic() + self._join_timeout_s
        for meeting in self._meetings[1:]:
            self._wait_for(meeting, deadline_s)
        # First: one that is lost while the groups form would else be noticed only when they do not.
        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()
        self._store.set("go", "")
        self._collectives = self._meetings[0].join(self._store)
        return self._collectives

    def whose_loss(self) -> str | None:
        deadline_s = time.monotonic() + 1.0
        while time.monotonic() < deadline_s:
            lost = self._lost()
            if lost is not None:
                return lost
            time.sleep(_POLL_S)
        return None

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        if self._collectives is not None:
            with contextlib.suppress(RankFailure):
                self._collectives.send(Stop())
        for child in self._children.values():
            child.end(_STOP_TIMEOUT_S if self._collectives is not None else 0)

    def _wait_for(self, meeting: Meeting, deadline_s: float) -> None:
        """Until the rank has loaded its part."""
        rank = meeting.shard.rank
        child = self._children.get(rank)
        status: str | None = None
        while status is None:
            if self._store.check([_status_key(rank)]):
                status = self._read_status(meeting)
            elif child is not None and (ended := child.how_it_ended()) is not None:
                raise ModelLoadError(f"the process of {meeting.shard} {ended} while loading")
            elif child is None and time.monotonic() > deadline_s:
                raise ModelLoadError(
                    f"{meeting.shard}, on another host, did not come within {self._join_timeout_s:g} seconds"
                )
            else:
                time.sleep(_POLL_S)
        status, _, reason = status.partition(" ")
        if status == "failed":
            raise ModelLoadError(f"{meeting.shard}: {reason}")

    def _read_status(self, meeting: Meeting) -> str | None:
        """What a rank said, if it was that rank of this group; else it is forgotten."""
        key = _status_key(meeting.shard.rank)
        said = _unsealed(self._store.get(key), meeting.secret)
        prefix = f"{meeting.nonce} {meeting.shard.rank} "
        if said is None or not said.decode().startswith(prefix):
            logger.warning("somebody without the secret wrote to the group's store")
            self._store.delete_key(key)
            return None
        return said.decode().removeprefix(prefix)

    def _watch(self) -> None:
        while not self._closing.wait(_POLL_S):
            lost = self._lost()
            if lost is not None and not self._closing.is_set():
                self._on_loss(lost)
                return

    def _lost(self) -> str | None:
        now_s = time.monotonic()
        for meeting in self._meetings[1:]:
            child = self._children.get(meeting.shard.rank)
            if child is not None:
                ended = child.how_it_ended()
                if ended is not None:
                    return f"{meeting.shard}, which {ended}"
            elif self._is_silent(meeting.shard.rank, now_s):
                return f"{meeting.shard}, which is on another host and has fallen silent"
        return None

    def _is_silent(self, rank: int, now_s: float) -> bool:
        key = _pulse_key(rank)
        pulse, since_s = self._pulses.setdefault(rank, (b"", now_s))
        if now_s - since_s < 1.0:
            return False
        current = self._store.get(key) if self._store.check([key]) else b""
        if current != pulse:
            self._pulses[rank] = (current, now_s)
            return False
        return now_s - since_s > self._meetings[0].timeout_s


class RankProcess:
    """One child: ends with this process, whatever happens to either."""

    def __init__(self, given: Meeting | Invitation, rank: int) -> None:
        """Starts it. Raises OSError."""
        self.rank = rank
        ours, theirs = socket.socketpair()
        self._lifeline = Connection(ours.detach())
        package_folder = str(Path(__file__).resolve().parent.parent.parent)
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_folder, environment.get("PYTHONPATH")]))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "textgen_engine.parallel.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self._lifeline.send(given)

    @property
    def pid(self) -> int:
        return self._process.pid

    def how_it_ended(self) -> str | None:
        """None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def end(self, grace_s: float) -> None:
        """Wait up to grace_s for it to end by itself, then end it."""
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._lifeline.close()


def die_with_parent() -> None:
    """In a child: be killed when the process that started it dies (Linux; elsewhere its lifeline alone ends it)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _open_store(config: EngineConfig) -> tuple[TCPStore, str, int]:
    """The store, its address and its port: on the loopback address alone, at a port nobody else can have, unless other
    hosts have to find it."""
    parallel = config.parallel
    address = parallel.master_address if parallel.num_nodes > 1 else LOOPBACK
    port = parallel.master_port if parallel.num_nodes > 1 else 0
    try:
        address = socket.gethostbyname(address)
        with socket.socket() as listener:
            # As a server does: a port whose last connections are still closing is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(2 * parallel.world_size + 8)
            port = listener.getsockname()[1]
            store = TCPStore(
                address,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=_STORE_TIMEOUT_S),
                master_listen_fd=os.dup(listener.fileno()),
            )
    except OSError as error:
        raise ModelLoadError(f"the ranks cannot meet at {address}:{port}: {error.strerror or error}") from error
    return store, address, port


def _connect(address: str, port: int) -> TCPStore:
    try:
        return TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_STORE_TIMEOUT_S)
        )
    except RuntimeError as error:
        raise RankFailure(f"rank 0 is not at {address}:{port}") from error


def _model_of_rank(config: EngineConfig, rank: int) -> ModelConfig:
    """The model's options on one rank: its own device, or its share of the cores."""
    ranks_per_node = config.parallel.ranks_per_node
    if config.model.device != "cpu":
        return replace(config.model, device=f"cuda:{rank % ranks_per_node}")
    num_threads = config.model.num_threads or max(1, torch.get_num_threads() // ranks_per_node)
    return replace(config.model, num_threads=num_threads)


def _sealed(payload: bytes, secret: str) -> str:
    """The payload behind a digest that only who knows the secret can make (RFC 2104), in hexadecimal."""
    return hmac.digest(secret.encode(), payload, "sha256").hex() + payload.hex()


def _unsealed(sealed: bytes, secret: str) -> bytes | None:
    """The payload, if it was sealed with this secret."""
    try:
        payload = bytes.fromhex(sealed[_DIGEST_DIGITS:].decode())
    except ValueError:
        return None
    return payload if hmac.compare_digest(sealed, _sealed(payload, secret).encode()) else None


def _open(sealed: bytes, secret: str) -> Meeting:
    """Never unpickles what somebody without the secret wrote. Raises RankFailure for that."""
    payload = _unsealed(sealed, secret)
    if payload is None:
        raise RankFailure("rank 0 has another TEXTGEN_GROUP_SECRET")
    meeting = pickle.loads(payload)
    assert isinstance(meeting, Meeting)
    return meeting


def _status_key(rank: int) -> str:
    return f"status {rank}"


def _meeting_key(rank: int) -> str:
    return f"meeting {rank}"


def _pulse_key(rank: int) -> str:
    return f"pulse {rank}"
