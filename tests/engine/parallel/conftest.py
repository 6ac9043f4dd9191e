"""Fixtures of the tests over several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..tiny import Harness, make_config
from .threads import NewRanks, RankThreads


@pytest.fixture
def new_ranks() -> Iterator[NewRanks]:
    """Makes an engine over so many ranks, or over one; options are those of tiny.make_config."""
    made: list[Harness] = []

    def make(model: Path, world_size: int, **options: Any) -> Harness:
        config = make_config(model, **options)
        ranks = RankThreads(config, world_size) if world_size > 1 else None
        made.append(Harness(config, ranks))
        return made[-1]

    yield make
    for harness in made:
        harness.close()
