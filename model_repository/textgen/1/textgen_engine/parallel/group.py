"""The ranks of one model as torch.distributed process groups: sums and gathers of tensors, and rank 0's messages.

Two groups: one for what layers exchange, one for rank 0's messages. Whatever a rank does in them ends within a bounded
time when another one hangs, but for one thing: the other ranks wait for rank 0's next message however long the server
is idle. The groups are objects of their own, not torch.distributed's global one, so several can live in one process.
"""

from __future__ import annotations

import pickle
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from textgen_engine.errors import RankFailure
from textgen_engine.parallel.small_sums import Capability, SmallSums, capability_of, join_small_sums

# What one message of rank 0 carries in its first broadcast, in 32-bit words; longer ones take a second broadcast.
# 16 KiB hold a decode step of 32 sequences of 1900 tokens each.
_FIRST_WORDS = 4096
_OBJECT, _WORDS = 0, 1
_IDLE = timedelta(days=7)
# Ranks that have loaded their parts find together within a second or two; on a machine that has much else to do, later.
_FORM_S = 60.0


@dataclass
class Traffic:
    """What one rank gave to its group since the last `Collectives.take_traffic`, in calls and bytes of payload. What a
    CUDA graph repeats is counted once, when it is captured."""

    num_all_reduces: int = 0
    all_reduce_bytes: int = 0
    num_gathers: int = 0
    gather_bytes: int = 0
    num_broadcasts: int = 0
    broadcast_bytes: int = 0


@dataclass(frozen=True)
class Stop:
    """Rank 0's last message: the engine ends in good order."""


class Collectives:
    """One rank's end of its group. Every rank calls the same methods in the same order, except `send` and `receive`,
    which pair up. All raise RankFailure when another rank is gone or does not answer in time: the group is of no use
    then."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        address: str,
        timeout_s: float,
        device: torch.device | None = None,
    ) -> None:
        """Join the ranks that meet in `store`; returns when all have come. address: this host's, where the others
        reach it. device: where layers exchange tensors; a CUDA device means NCCL."""
        self.rank, self.world_size = rank, world_size
        self.traffic = Traffic()
        self._timeout = timedelta(seconds=timeout_s)
        self._small_sums: SmallSums | None = None
        try:
            self._control = _gloo(PrefixStore("control", store), rank, world_size, address, timeout_s)
            tensors = PrefixStore("tensors", store)
            if device is not None and device.type == "cuda":
                self._tensors: Any = _nccl(tensors, rank, world_size, timeout_s)
                self._small_sums = self._join_small_sums(store, device)
            else:
                self._tensors = _gloo(tensors, rank, world_size, address, timeout_s)
        except RuntimeError as error:
            raise RankFailure(f"the {world_size} ranks did not find together: {_first_line(error)}") from error

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks; the tensor given may be overwritten with it."""
        tensor = tensor.contiguous()
        self.traffic.num_all_reduces += 1
        self.traffic.all_reduce_bytes += tensor.nbytes
        try:
            if self._small_sums is not None:
                summed = self._small_sums.all_reduce(tensor)
                if summed is not None:
                    return summed
            self._tensors.allreduce([tensor]).wait()
        except RuntimeError as error:
            raise self._failure(error) from error
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """On rank 0 every rank's tensor, by rank; None on the others. All have one shape and type."""
        tensor = tensor.contiguous()
        self.traffic.num_gathers += 1
        self.traffic.gather_bytes += tensor.nbytes if self.rank else 0
        options = dist.GatherOptions()
        options.rootRank = 0
        outputs = [] if self.rank else [[torch.empty_like(tensor) for _ in range(self.world_size)]]
        try:
            self._tensors.gather(outputs, [tensor], options).wait()
        except RuntimeError as error:
            raise self._failure(error) from error
        return None if self.rank else outputs[0]

    def send(self, message: np.ndarray | object) -> None:
        """From rank 0: 32-bit words as they are, anything else pickled; `receive` returns it on the other ranks."""
        if isinstance(message, np.ndarray):
            assert message.dtype == np.int32
            kind, words = _WORDS, message
        else:
            pickled = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
            padded = pickled + bytes(-len(pickled) % 4)
            kind, words = _OBJECT, np.frombuffer(padded, dtype=np.int32)
        first = np.zeros(_FIRST_WORDS, dtype=np.int32)
        first[:2] = kind, len(words)
        first[2 : 2 + len(words)] = words[: _FIRST_WORDS - 2]
        self._broadcast(torch.from_numpy(first))
        if len(words) > _FIRST_WORDS - 2:
            self._broadcast(torch.from_numpy(words[_FIRST_WORDS - 2 :].copy()))

    def receive(self) -> Any:
        """On the other ranks: wait for rank 0's next message."""
        first = torch.empty(_FIRST_WORDS, dtype=torch.int32)
        self._broadcast(first)
        kind, num_words = first[:2].tolist()
        words = first[2 : 2 + num_words]
        if num_words > _FIRST_WORDS - 2:
            rest = torch.empty(num_words - (_FIRST_WORDS - 2), dtype=torch.int32)
            self._broadcast(rest)
            words = torch.cat([words, rest])
        return words.numpy() if kind == _WORDS else pickle.loads(words.numpy().tobytes())

    def collect(self, item: object) -> list[Any]:
        """On rank 0 one object of every rank, by rank; an empty list on the others. Not for every step."""
        pickled = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = len(pickled)
        try:
            self._control.allreduce([lengths]).wait()
            padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
            padded[: len(pickled)] = pickled
            everyone = [torch.empty_like(padded) for _ in range(self.world_size)]
            self._control.allgather([everyone], [padded]).wait()
        except RuntimeError as error:
            raise self._failure(error) from error
        if self.rank:
            return []
        return [pickle.loads(given.numpy().tobytes()) for given in everyone]

    def agree(self, is_so: bool) -> bool:
        """Whether every rank says so. Not for every step."""
        try:
            return all(answer == b"y" for answer in self._gather_bytes(b"y" if is_so else b"n"))
        except RuntimeError as error:
            raise self._failure(error) from error

    def take_traffic(self) -> Traffic:
        """What was counted since the last call."""
        taken, self.traffic = self.traffic, Traffic()
        return taken

    def close(self) -> None:
        """Leave the groups; what others still wait for fails at once."""
        for group in (self._tensors, self._control):
            group.abort()

    def _join_small_sums(self, store: Store, device: torch.device) -> SmallSums | None:
        hosts = [name.decode() for name in self._gather_bytes(socket.gethostname().encode()[:64])]
        own = capability_of(device, hosts)
        flags = self._gather_bytes(bytes((own.operations, own.peers, own.multicast)))
        capability = own
        for given in flags:
            capability = capability.shared_with(Capability(*(bool(flag) for flag in given)))
        return join_small_sums(store, self.rank, self.world_size, device, capability, self.agree)

    def _gather_bytes(self, given: bytes, length: int = 64) -> list[bytes]:
        """On every rank what each gave, by rank: at most `length` bytes."""
        own = torch.frombuffer(bytearray(bytes((len(given),)) + given.ljust(length)), dtype=torch.uint8)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        self._control.allgather([everyone], [own]).wait()
        raw = [tensor.numpy().tobytes() for tensor in everyone]
        return [words[1 : 1 + words[0]] for words in raw]

    def _broadcast(self, tensor: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        # Gloo sends only once the other side waits; one that hangs never will. The others may wait for long: the next
        # request may be a week away.
        options.timeout = self._timeout if self.rank == 0 else _IDLE
        try:
            self._control.broadcast([tensor], options).wait()
        except RuntimeError as error:
            raise self._failure(error) from error
        # Only now: whoever waits for rank 0 has got nothing yet.
        self.traffic.num_broadcasts += 1
        self.traffic.broadcast_bytes += tensor.nbytes

    def _failure(self, error: RuntimeError) -> RankFailure:
        return RankFailure(f"another rank of {self.world_size} is gone or does not answer ({_first_line(error)})")


def _gloo(store: Store, rank: int, world_size: int, address: str, timeout_s: float) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    # For finding together, too: a rank may be lost on its way there, and the others must not wait for it for ever.
    options._timeout = timedelta(seconds=max(timeout_s, _FORM_S))
    group = dist.ProcessGroupGloo(store, rank, world_size, options)
    group.set_timeout(timedelta(seconds=timeout_s))
    return group


def _nccl(store: Store, rank: int, world_size: int, timeout_s: float) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.rpartition("] ")[2][:160]  # gloo begins with the place in its own source
