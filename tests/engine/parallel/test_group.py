"""`parallel/group.py`: a group whose other rank hangs is noticed in time, whatever the ranks were about to do."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from textgen_engine.errors import RankFailure
from textgen_engine.parallel.group import Collectives


@pytest.mark.parametrize("between_steps", [True, False])
def test_a_rank_that_hangs_is_noticed_in_time(between_steps: bool) -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(Collectives, store, rank, 2, address="127.0.0.1", timeout_s=1.0) for rank in range(2)]
        ranks = [future.result() for future in made]
    # Between steps rank 1 does not wait for a message; in a step it got one, and does not come to the sum.
    message, part = np.arange(4, dtype=np.int32), torch.ones(4)
    act = (lambda: ranks[0].send(message)) if between_steps else (lambda: ranks[0].all_reduce(part))
    begun_s = time.monotonic()
    with pytest.raises(RankFailure, match="another rank of 2 is gone or does not answer"):
        act()
    assert time.monotonic() - begun_s < 30  # idle ranks wait for days
    for rank in ranks:
        rank.close()
