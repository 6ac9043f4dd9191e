"""`parallel/small_sums.py`: which way a sum goes, and that all ranks go it, without a GPU: buffers of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from textgen_engine.parallel.small_sums import Capability, SmallSums, Way, capability_of, join_small_sums

KIB = 1 << 10
SWITCH = Capability(operations=True, peers=True, multicast=True)
PEERS = Capability(operations=True, peers=True)


@pytest.mark.parametrize(
    ("capability", "num_bytes", "dtype", "way"),
    [
        (SWITCH, 4 * KIB, torch.bfloat16, Way.MULTIMEM),
        (SWITCH, 4096 * KIB, torch.bfloat16, Way.MULTIMEM),
        (SWITCH, 4096 * KIB + 16, torch.bfloat16, Way.LIBRARY),
        (PEERS, 512 * KIB, torch.float32, Way.ONE_SHOT),
        (PEERS, 512 * KIB + 16, torch.float32, Way.LIBRARY),
        (PEERS, 24, torch.float32, Way.LIBRARY),
        (PEERS, 4 * KIB, torch.float16, Way.LIBRARY),
        (PEERS, 0, torch.float32, Way.LIBRARY),
        (Capability(operations=True), 4 * KIB, torch.float32, Way.LIBRARY),
        (Capability(peers=True, multicast=True), 4 * KIB, torch.float32, Way.LIBRARY),
    ],
)
def test_the_way_is_chosen_by_capability_and_size(
    capability: Capability, num_bytes: int, dtype: torch.dtype, way: Way
) -> None:
    assert capability.way(num_bytes, dtype) is way


def test_ranks_use_what_all_have() -> None:
    assert SWITCH.shared_with(PEERS) == PEERS
    assert PEERS.shared_with(Capability()).most_bytes == 0
    assert capability_of(torch.device("cpu"), ["host"] * 2) == Capability()


class Operations:
    """What torch.ops.symm_mem does, for a group whose other rank has `other` in its buffer."""

    def __init__(self, other: torch.Tensor) -> None:
        self.other = other
        self.called: list[str] = []

    def one_shot_all_reduce(self, shared: torch.Tensor, operation: str, group_name: str) -> torch.Tensor:
        self.called.append(f"one shot {operation} {group_name}")
        return shared + self.other

    def multimem_all_reduce_(self, shared: torch.Tensor, operation: str, group_name: str) -> torch.Tensor:
        self.called.append(f"multimem {operation} {group_name}")
        return shared.add_(self.other)


@pytest.mark.parametrize(("capability", "way"), [(PEERS, "one shot"), (SWITCH, "multimem")])
def test_a_sum_is_its_own_tensor_and_leaves_the_buffer_to_the_next(capability: Capability, way: str) -> None:
    operations = Operations(torch.full((8,), 2.0))
    sums = SmallSums(capability, torch.zeros(capability.most_bytes, dtype=torch.uint8), "group", operations)
    first = sums.all_reduce(torch.ones(2, 4))
    second = sums.all_reduce(torch.zeros(2, 4))
    assert first is not None and first.tolist() == [[3.0] * 4] * 2
    assert second is not None and second.tolist() == [[2.0] * 4] * 2
    assert operations.called == [f"{way} sum group"] * 2
    assert sums.all_reduce(torch.ones(3)) is None, "no multiple of what is added at a time"


@pytest.mark.parametrize("says", [[False], [True, False]])
def test_all_ranks_or_none(says: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the capability on every rank nothing is tried; when a buffer fails on one, none uses its own."""
    answers = iter(says)
    asked: list[bool] = []

    def agree(is_so: bool) -> bool:
        asked.append(is_so)
        return next(answers)

    def no_memory(*_: Any) -> Any:
        raise RuntimeError("no GPU here")

    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p", no_memory)
    assert join_small_sums(HashStore(), 0, 2, torch.device("cpu"), SWITCH, agree) is None
    assert asked == [True, False][: len(says)]
