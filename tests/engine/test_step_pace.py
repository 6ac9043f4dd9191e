"""`step_pace.py`: chunks of prompts beside running streams. Times are made up; no clock is read."""

from __future__ import annotations

import pytest

from textgen_engine.block_manager import BlockManager
from textgen_engine.config import SchedulerConfig
from textgen_engine.scheduler import ScheduledBatch, Scheduler
from textgen_engine.sequence import Sequence
from textgen_engine.step_pace import StepPace

from .tiny import make_request

TOKEN_S = 0.002


def _step_s(num_decodes: int, num_prompt_tokens: int) -> float:
    """A machine of which the pace knows nothing."""
    return (0.03 + 0.003 * num_decodes if num_decodes else 0.0) + TOKEN_S * num_prompt_tokens


def test_nothing_is_limited_before_a_decode_was_measured() -> None:
    pace = StepPace(2)
    pace.observe(0, 512, _step_s(0, 512))
    assert pace.prompt_tokens(4) is None


def test_the_first_chunk_is_careful_and_later_ones_fit_the_stretch() -> None:
    pace = StepPace(2)
    pace.observe(8, 0, _step_s(8, 0))
    assert pace.prompt_tokens(8) == 64
    pace.observe(8, 64, _step_s(8, 64))
    tokens = pace.prompt_tokens(8)
    assert tokens is not None
    assert _step_s(8, tokens) <= 2 * _step_s(8, 0) < _step_s(8, tokens + 1)


def test_one_step_that_the_machine_delayed_changes_nothing() -> None:
    pace = StepPace(2)
    for _ in range(3):
        pace.observe(8, 0, _step_s(8, 0))
        pace.observe(8, 64, _step_s(8, 64))
    before = pace.prompt_tokens(8)
    pace.observe(8, 0, 5.0)
    pace.observe(8, 64, 5.0)
    assert pace.prompt_tokens(8) == before


def test_a_prompt_gets_on_however_dear_its_tokens() -> None:
    pace = StepPace(1.1)
    pace.observe(1, 0, 0.001)
    pace.observe(1, 16, 1.0)
    assert pace.prompt_tokens(1) == 16


def test_of_unmeasured_batches_the_nearest_answers() -> None:
    pace = StepPace(2)
    pace.observe(4, 0, _step_s(4, 0))
    pace.observe(4, 50, _step_s(4, 50))
    assert pace.prompt_tokens(16) == pace.prompt_tokens(4)


class _Machine:
    """A scheduler whose steps take the made-up times."""

    def __init__(self, stretch: float) -> None:
        blocks = BlockManager(1000, 16, prefix_caching=False)
        self.scheduler = Scheduler(SchedulerConfig(32, 512, max_step_stretch=stretch), blocks)

    def add(self, name: str, length: int) -> Sequence:
        sequence = Sequence(make_request(name, tuple(range(length))))
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> tuple[ScheduledBatch, float]:
        batch = self.scheduler.schedule()
        num_decodes = sum(entry.num_tokens == 1 for entry in batch.entries)
        step_s = _step_s(num_decodes, batch.num_tokens - num_decodes)
        self.scheduler.advance(batch)
        for entry in batch.entries:
            if entry.is_last:
                entry.sequence.token_ids.append(1)
        self.scheduler.observe(batch, step_s)
        self.scheduler.check_integrity()
        return batch, step_s


@pytest.mark.parametrize("stretch", [1.0, 1.8])
def test_a_long_prompt_beside_streams(stretch: float) -> None:
    machine = _Machine(stretch)
    for number in range(8):
        machine.add(str(number), 10)
    for _ in range(5):
        machine.step()
    long = machine.add("long", 3000)
    times = []
    while not long.is_decoding:
        times.append(machine.step()[1])
    if stretch == 1.0:
        assert max(times) > 10 * _step_s(8, 0)  # the whole budget at once
    else:
        assert max(times[1:]) <= stretch * _step_s(8, 0)
        assert len(times) < 300


def test_a_short_prompt_takes_whole_steps() -> None:
    machine = _Machine(1.8)
    for number in range(8):
        machine.add(str(number), 10)
    for _ in range(5):
        machine.step()
    machine.add("short", 2000)
    batch, _ = machine.step()
    assert batch.num_tokens == 512


def test_a_crowd_of_prompts_gets_the_whole_budget() -> None:
    machine = _Machine(1.8)
    machine.add("stream", 10)
    for _ in range(5):
        machine.step()
    for number in range(10):
        machine.add(f"prompt {number}", 400)
    batch, _ = machine.step()
    assert batch.num_tokens == 512
