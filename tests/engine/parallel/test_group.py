"""`parallel/group.py`: a rank that hangs, or never comes, is noticed in time, whatever the ranks were about to do.

One that waits for its next message may do so for long.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from textgen_engine.errors import RankFailure
from textgen_engine.parallel import group
from textgen_engine.parallel.group import Collectives

TIMEOUT_S = 1.0


@pytest.fixture
def ranks() -> Iterator[list[Collectives]]:
    store = HashStore()
    with ThreadPoolExecutor(2) as threads:
        made = [
            threads.submit(Collectives, store, rank, 2, address="127.0.0.1", timeout_s=TIMEOUT_S) for rank in range(2)
        ]
    together = [future.result() for future in made]
    yield together
    for rank in together:
        rank.close()


@pytest.mark.parametrize("between_steps", [True, False])
def test_a_rank_that_hangs_is_noticed_in_time(ranks: list[Collectives], between_steps: bool) -> None:
    # Between steps rank 1 does not wait for a message; in a step it got one, and does not come to the sum.
    message, part = np.arange(4, dtype=np.int32), torch.ones(4)
    act = (lambda: ranks[0].send(message)) if between_steps else (lambda: ranks[0].all_reduce(part))
    begun_s = time.monotonic()
    with pytest.raises(RankFailure, match="another rank of 2 is gone or does not answer"):
        act()
    assert time.monotonic() - begun_s < 30  # idle ranks wait for days


def test_a_rank_waits_for_its_next_message_as_long_as_it_takes(ranks: list[Collectives]) -> None:
    with ThreadPoolExecutor(1) as thread:
        received = thread.submit(ranks[1].receive)
        time.sleep(1.5 * TIMEOUT_S)
        ranks[0].send("after a while")
        assert received.result(30) == "after a while"


def test_a_rank_that_never_comes_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was ready, and is lost before the groups form."""
    monkeypatch.setattr(group, "_FORM_S", 2 * TIMEOUT_S)
    begun_s = time.monotonic()
    with pytest.raises(RankFailure, match="the 2 ranks did not find together"):
        Collectives(HashStore(), 0, 2, address="127.0.0.1", timeout_s=TIMEOUT_S)
    assert 2 * TIMEOUT_S <= time.monotonic() - begun_s < 30
