"""Sums of small tensors over GPUs that read each other's memory: one kernel instead of NCCL's several messages.

Decoding sums a few hundred kilobytes after every attention and MLP, where NCCL spends most of the time on meeting. In
symmetric memory (torch.distributed._symmetric_memory) every rank has a buffer that all can reach: a rank adds up all
buffers by itself ("one shot"), or has NVSwitch do so ("multimem"). Which way a sum goes is chosen from what the machine
can do and from the sum's size alone, so that all ranks choose alike and CUDA graphs can hold either.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

_KIB = 1 << 10
# Each rank reads every other's tensor in one shot, where a ring sends 2 (N-1)/N of one: that pays while the time is
# that of meeting. NVSwitch adds on the way, so that a rank reads and writes one tensor.
_MOST_ONE_SHOT_BYTES = 512 * _KIB
_MOST_MULTIMEM_BYTES = 4096 * _KIB
# What multimem adds at a time.
_ALIGNMENT_BYTES = 16
_DTYPES = (torch.float32, torch.bfloat16)
_numbers = itertools.count()


class Way(Enum):
    """How one sum is made."""

    MULTIMEM = "multimem"
    ONE_SHOT = "one shot"
    LIBRARY = "library"


@dataclass(frozen=True)
class Capability:
    """What a group of ranks has. operations: this PyTorch has symmetric memory. peers: all ranks are on one host, and
    each GPU reaches every other's memory. multicast: the switch between them adds."""

    operations: bool = False
    peers: bool = False
    multicast: bool = False

    @property
    def most_bytes(self) -> int:
        """The largest tensor that is not left to the library; 0: all are."""
        if not (self.operations and self.peers):
            return 0
        return _MOST_MULTIMEM_BYTES if self.multicast else _MOST_ONE_SHOT_BYTES

    def way(self, num_bytes: int, dtype: torch.dtype) -> Way:
        """How to sum a tensor of this size and type."""
        if not 0 < num_bytes <= self.most_bytes or num_bytes % _ALIGNMENT_BYTES or dtype not in _DTYPES:
            return Way.LIBRARY
        return Way.MULTIMEM if self.multicast else Way.ONE_SHOT

    def shared_with(self, other: Capability) -> Capability:
        """What both have."""
        return Capability(
            self.operations and other.operations, self.peers and other.peers, self.multicast and other.multicast
        )


def capability_of(device: torch.device, hosts: list[str]) -> Capability:
    """What this rank's device has, given the names of all ranks' hosts; rank r of a host has its GPU r."""
    if device.type != "cuda":
        return Capability()
    try:
        from torch._C._distributed_c10d import _SymmetricMemory

        operations = all(hasattr(torch.ops.symm_mem, name) for name in ("one_shot_all_reduce", "multimem_all_reduce_"))
        others = [index for index in range(len(hosts)) if index != device.index]
        peers = len(set(hosts)) == 1 and all(torch.cuda.can_device_access_peer(device.index, index) for index in others)
        multicast = peers and _SymmetricMemory.has_multicast_support(torch._C._autograd.DeviceType.CUDA, device.index)
    except (ImportError, AttributeError, RuntimeError, AssertionError) as error:
        logger.info("no symmetric memory: %s", error)
        return Capability()
    return Capability(operations, peers, bool(multicast))


class SmallSums:
    """Sums in one rank's end of the symmetric buffers. Every rank calls it in the same order, with the same sizes.

    buffer: this rank's, of bytes. operations: torch.ops.symm_mem, which meet before they read the others' buffers and
    after, so that the next sum may overwrite them.
    """

    def __init__(self, capability: Capability, buffer: torch.Tensor, group_name: str, operations: Any) -> None:
        self._capability, self._buffer = capability, buffer
        self._group_name, self._operations = group_name, operations

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The sum over all ranks of a contiguous tensor, in memory of its own; None: the library's to do."""
        way = self._capability.way(tensor.nbytes, tensor.dtype)
        if way is Way.LIBRARY:
            return None
        shared = self._buffer[: tensor.nbytes].view(tensor.dtype)
        shared.copy_(tensor.view(-1))
        if way is Way.ONE_SHOT:
            summed: torch.Tensor = self._operations.one_shot_all_reduce(shared, "sum", self._group_name)
        else:
            summed = self._operations.multimem_all_reduce_(shared, "sum", self._group_name).clone()
        return summed.view(tensor.shape)


def join_small_sums(
    store: Store,
    rank: int,
    world_size: int,
    device: torch.device,
    capability: Capability,
    agree: Callable[[bool], bool],
) -> SmallSums | None:
    """Every rank's buffer, made known to the others, and tried; None where sums stay with the library.

    capability: what all ranks have. agree: whether every rank says so. A machine may promise what it does not keep (a
    container without the right to share memory), so a sum of known numbers has to be right on every rank.
    """
    if not agree(capability.most_bytes > 0):
        return None
    group_name = f"textgen small sums {next(_numbers)}"
    sums: SmallSums | None = None
    try:
        from torch._C._distributed_c10d import _SymmetricMemory

        _SymmetricMemory.set_group_info(group_name, rank, world_size, PrefixStore("small sums", store))
        buffer = _SymmetricMemory.empty_strided_p2p((capability.most_bytes,), (1,), torch.uint8, device, group_name)
        _SymmetricMemory.rendezvous(buffer)
        sums = SmallSums(capability, buffer, group_name, torch.ops.symm_mem)
    except (ImportError, AttributeError, RuntimeError) as error:
        logger.warning("sums stay with NCCL, symmetric memory cannot be used: %s", error)
    if not agree(sums is not None):
        return None
    assert sums is not None
    if not agree(_is_right(sums, rank, world_size, device)):
        logger.warning("sums stay with NCCL: those in symmetric memory were wrong")
        return None
    logger.info("sums of up to %d KiB in symmetric memory", capability.most_bytes // _KIB)
    return sums


def _is_right(sums: SmallSums, rank: int, world_size: int, device: torch.device) -> bool:
    numbers = torch.arange(1024, device=device, dtype=torch.float32)
    try:
        found = sums.all_reduce(numbers + rank)
    except RuntimeError as error:
        logger.warning("%s", error)
        return False
    expected = numbers * world_size + world_size * (world_size - 1) // 2
    return found is not None and torch.equal(found, expected)
