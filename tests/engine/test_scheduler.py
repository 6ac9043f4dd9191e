"""`scheduler.py`: what runs next. No model: a loop that appends tokens stands in for the engine."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen_engine.block_manager import BlockManager
from textgen_engine.config import SchedulerConfig
from textgen_engine.request import GenerationRequest, OutputParams
from textgen_engine.scheduler import _MAX_PASSED_OVER, ScheduledBatch, Scheduler
from textgen_engine.sequence import Sequence, SequenceStatus

from .tiny import make_request

NOW_S = 1e6  # arrivals are spread from here on, so that nobody has waited yet unless the test says so


class Loop:
    """Does with batches what the engine does, without a model."""

    def __init__(
        self,
        *,
        num_blocks: int = 100,
        block_size: int = 4,
        max_sequences: int = 16,
        budget: int = 512,
        ageing_s: float = 10.0,
        prefix_caching: bool = True,
        served_ratio: float = 0.0,
        max_waiting_steps: int = 20,
    ) -> None:
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching=prefix_caching)
        config = SchedulerConfig(max_sequences, budget, served_ratio, max_waiting_steps, ageing_s)
        self.scheduler = Scheduler(config, self.blocks)
        self.budget = budget
        self.to_go: dict[Sequence, int] = {}  # tokens each has still to produce

    def add(self, request: GenerationRequest, num_tokens: int = 10) -> Sequence:
        sequence = Sequence(request)
        self.to_go[sequence] = num_tokens
        self.scheduler.add(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self.to_go[sequence]

    def step(self) -> ScheduledBatch:
        batch = self.scheduler.schedule()
        self._check(batch)
        self.scheduler.check_integrity()
        self.scheduler.advance(batch)
        for entry in batch.entries:
            if entry.is_last:
                sequence = entry.sequence
                sequence.token_ids.append(len(sequence.token_ids) % 7)
                self.to_go[sequence] -= 1
                if not self.to_go[sequence]:
                    self.remove(sequence)
        self.scheduler.check_integrity()
        return batch

    def _check(self, batch: ScheduledBatch) -> None:
        assert batch.num_tokens <= self.budget
        sequences = [entry.sequence for entry in batch.entries]
        assert len(set(sequences)) == len(sequences)
        assert not set(sequences) & set(batch.preempted)
        for entry in batch.entries:
            sequence = entry.sequence
            assert sequence.status is SequenceStatus.RUNNING and entry.num_tokens > 0
            assert entry.start == sequence.num_computed
            assert entry.is_last == (entry.start + entry.num_tokens == len(sequence.token_ids))
            assert len(sequence.block_table) * self.blocks.block_size >= entry.start + entry.num_tokens

    def until_idle(self, limit: int = 5000) -> int:
        for step in range(limit):
            if not self.to_go:
                assert self.blocks.num_used == 0 and not self.scheduler.running and not self.scheduler.waiting
                return step
            assert self.step().entries, "requests are there, and none runs"
        raise AssertionError(f"not idle after {limit} steps")


def request(
    name: str = "r", num_tokens: int = 8, *, arrival_s: float = 0.0, first: int | None = None, **fields: object
) -> GenerationRequest:
    """A prompt of its own (names differ, so prefixes do), unless `first` gives it the first token of another."""
    start = (sum(map(ord, name)) * 131) % 100_000 if first is None else first
    prompt: Seq[int] = range(start, start + num_tokens)
    return make_request(name, prompt, arrival_s=NOW_S + arrival_s, **fields)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The scheduler's clock, set by the test."""
    now = [NOW_S]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def of(batch: ScheduledBatch) -> list[tuple[str, int]]:
    return [(entry.sequence.request.request_id, entry.num_tokens) for entry in batch.entries]


def test_a_prompt_that_fits_runs_whole_then_decodes() -> None:
    loop = Loop()
    loop.add(request("a", 8), num_tokens=3)
    assert [of(loop.step()) for _ in range(4)] == [[("a", 8)], [("a", 1)], [("a", 1)], []]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    loop = Loop(budget=16)
    loop.add(request("a", 40), num_tokens=2)
    assert [of(loop.step()) for _ in range(4)] == [[("a", 16)], [("a", 16)], [("a", 8)], [("a", 1)]]


def test_decodes_come_first_and_prompts_get_the_rest() -> None:
    loop = Loop(budget=16)
    loop.add(request("a", 4), num_tokens=50)
    loop.add(request("b", 4, arrival_s=1), num_tokens=50)
    loop.step()
    loop.add(request("long", 100, arrival_s=2))
    for _ in range(3):
        assert of(loop.step()) == [("a", 1), ("b", 1), ("long", 14)]


def test_a_short_prompt_behind_a_long_one_starts_at_once() -> None:
    loop = Loop(budget=256, num_blocks=1000)
    loop.add(request("long", 2000))
    loop.add(request("short", 10, arrival_s=1))
    assert of(loop.step()) == [("long", 246), ("short", 10)]
    assert of(loop.step()) == [("short", 1), ("long", 255)]


def test_shorter_prompts_get_at_most_half_of_a_step() -> None:
    loop = Loop(budget=256, num_blocks=1000)
    loop.add(request("long", 2000))
    loop.add(request("b", 100, arrival_s=1))
    loop.add(request("c", 100, arrival_s=2))
    assert of(loop.step()) == [("long", 128), ("b", 100), ("c", 28)]


def test_what_one_long_prompt_leaves_is_not_for_another() -> None:
    loop = Loop(budget=512, num_blocks=4000)
    for index, (name, length) in enumerate((("a", 4000), ("b", 3500), ("c", 60))):
        loop.add(request(name, length, arrival_s=index))
    assert of(loop.step()) == [("a", 452), ("c", 60)]
    assert of(loop.step()) == [("c", 1), ("a", 511)]


def test_prompts_of_like_length_come_one_after_the_other() -> None:
    loop = Loop(budget=256, num_blocks=1000)
    loop.add(request("a", 600))
    loop.add(request("b", 500, arrival_s=1))
    assert [of(loop.step()) for _ in range(3)] == [[("a", 256)], [("a", 256)], [("a", 88), ("b", 168)]]


def test_a_prompt_that_ends_with_the_step_is_not_cut_for_another() -> None:
    loop = Loop(budget=256, num_blocks=1000)
    loop.add(request("a", 250))
    loop.add(request("b", 10, arrival_s=1))
    assert of(loop.step()) == [("a", 250), ("b", 6)]


def test_a_short_prompt_starts_beside_a_long_one_that_is_under_way() -> None:
    loop = Loop(budget=256, num_blocks=1000)
    loop.add(request("long", 2000))
    assert of(loop.step()) == [("long", 256)]
    loop.add(request("short", 10, arrival_s=1))
    assert of(loop.step()) == [("long", 246), ("short", 10)]


def test_slots_bound_what_runs() -> None:
    loop = Loop(max_sequences=2)
    for index in range(5):
        loop.add(request(f"r{index}", arrival_s=index), num_tokens=3)
    assert len(of(loop.step())) == 2
    assert {name for name, _ in of(loop.step())} == {"r0", "r1"}
    loop.until_idle()


def test_a_finished_or_cancelled_sequence_makes_room_in_the_next_step() -> None:
    loop = Loop(max_sequences=1)
    first = loop.add(request("a"), num_tokens=100)
    loop.add(request("b", arrival_s=1), num_tokens=1)
    waiting = loop.add(request("c", arrival_s=2), num_tokens=1)
    loop.step()
    loop.remove(waiting)
    loop.remove(first)
    assert of(loop.step()) == [("b", 8)]
    loop.until_idle()


def test_higher_priority_first_then_first_come() -> None:
    loop = Loop(max_sequences=1, ageing_s=10)
    loop.add(request("early", arrival_s=0), num_tokens=1)
    loop.add(request("urgent", arrival_s=3, priority=1), num_tokens=1)
    loop.add(request("late", arrival_s=2), num_tokens=1)
    assert [of(loop.step())[0][0] for _ in range(3)] == ["urgent", "early", "late"]


def test_waiting_makes_up_for_priority() -> None:
    loop = Loop(max_sequences=1, ageing_s=10)
    loop.add(request("urgent", arrival_s=11, priority=1), num_tokens=1)
    loop.add(request("patient", arrival_s=0), num_tokens=1)
    assert of(loop.step()) == [("patient", 8)]


def test_a_steady_stream_of_urgent_requests_starves_nobody(clock: list[float]) -> None:
    loop = Loop(max_sequences=1, ageing_s=10)
    loop.add(request("patient"), num_tokens=1)
    for second in range(100):
        clock[0] = NOW_S + second
        loop.add(request(f"urgent {second}", arrival_s=second, priority=2), num_tokens=1)
        if of(loop.step())[0][0] == "patient":
            assert second >= 20
            return
    raise AssertionError("starved")


def test_the_least_urgent_is_preempted_first() -> None:
    loop = Loop(num_blocks=6, block_size=4, prefix_caching=False)
    a = loop.add(request("a", 4, arrival_s=0), num_tokens=20)
    b = loop.add(request("b", 4, arrival_s=5), num_tokens=20)
    loop.step()
    c = loop.add(request("c", 4, arrival_s=7, priority=1), num_tokens=20)  # the most urgent although the last
    while not b.num_preemptions and not a.num_preemptions:
        loop.step()
    assert (a.num_preemptions, b.num_preemptions, c.num_preemptions) == (0, 1, 0)
    assert b.status is SequenceStatus.WAITING and b.num_computed == 0 and not b.block_table
    kept = list(b.token_ids)
    loop.until_idle()
    assert b.token_ids[: len(kept)] == kept and b.num_output_tokens == 20


def test_one_that_is_preempted_goes_on_before_later_arrivals() -> None:
    loop = Loop(num_blocks=6, block_size=4, max_sequences=2, prefix_caching=False)
    loop.add(request("a", 8, arrival_s=0), num_tokens=10)
    b = loop.add(request("b", 8, arrival_s=1), num_tokens=10)
    while not b.num_preemptions:
        loop.step()
    loop.add(request("c", 8, arrival_s=2), num_tokens=1)
    started: list[str] = []
    while loop.to_go:
        started += [name for name, count in of(loop.step()) if count > 1]
    assert started == ["b", "c"]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    loop = Loop(num_blocks=7, block_size=4)
    loop.add(request("a", 8), num_tokens=13)
    b = loop.add(request("b", 8, arrival_s=1), num_tokens=9)
    while not b.num_preemptions:
        loop.step()
    chunks = []
    while loop.to_go:
        chunks += [count for name, count in of(loop.step()) if name == "b" and count > 1]
    assert b.num_preemptions == 1 and 0 < sum(chunks) < len(b.token_ids)


def test_a_newcomer_does_not_preempt_who_runs() -> None:
    loop = Loop(num_blocks=4, block_size=4)
    a = loop.add(request("a", 8), num_tokens=4)
    loop.step()
    loop.add(request("b", 8, arrival_s=1), num_tokens=1)
    loop.until_idle()
    assert a.num_preemptions == 0


def test_one_that_does_not_fit_holds_up_nobody() -> None:
    loop = Loop(num_blocks=10, block_size=4)
    loop.add(request("a", 16), num_tokens=4)
    loop.step()
    loop.add(request("big", 32, arrival_s=1), num_tokens=1)
    loop.add(request("small", 4, arrival_s=2), num_tokens=1)
    assert of(loop.step()) == [("a", 1), ("small", 4)]


def test_one_that_has_waited_long_gets_the_next_blocks(clock: list[float]) -> None:
    """Else a stream of small ones could keep a big one out for ever."""
    loop = Loop(num_blocks=10, block_size=4, ageing_s=10)
    loop.add(request("a", 16), num_tokens=12)
    loop.step()
    loop.add(request("big", 32, arrival_s=0), num_tokens=1)
    clock[0] = NOW_S + 11
    loop.add(request("small", 4, arrival_s=11), num_tokens=1)
    started = []
    while loop.to_go:
        started += [name for name, count in of(loop.step()) if count > 1]
    assert started == ["big", "small"]


def test_the_search_for_one_that_fits_is_bounded() -> None:
    loop = Loop(num_blocks=12, block_size=4, max_sequences=64)
    loop.add(request("a", 16), num_tokens=4)
    loop.step()
    for index in range(_MAX_PASSED_OVER):
        loop.add(request(f"big {index}", 44, arrival_s=1), num_tokens=1)
    loop.add(request("small", 4, arrival_s=2), num_tokens=1)
    assert of(loop.step()) == [("a", 1)], "it is behind as many as may be passed over"
    loop.until_idle()


def test_a_common_prefix_is_computed_once() -> None:
    loop = Loop()
    loop.add(request("a", 16, first=5), num_tokens=5)
    loop.step()
    b = loop.add(request("b", 18, first=5), num_tokens=1)
    assert of(loop.step()) == [("a", 1), ("b", 2)]
    assert b.num_cached == 16


def test_scored_prompts_use_no_cache_and_small_chunks() -> None:
    loop = Loop(num_blocks=1000)
    loop.add(request("a", 300, first=5), num_tokens=1)
    loop.step()
    b = loop.add(request("b", 300, first=5, output=OutputParams(prompt_logprobs=True)), num_tokens=1)
    assert [of(loop.step()) for _ in range(3)] == [[("b", 128)], [("b", 128)], [("b", 44)]]
    assert b.num_cached == 0


def test_forked_choices_share_the_prompt_and_end_apart() -> None:
    loop = Loop(max_sequences=3)
    parent = loop.add(request("a", 10), num_tokens=4)
    batch = loop.scheduler.schedule()
    loop.scheduler.advance(batch)
    children = [Sequence(parent.request, choice) for choice in range(1, 4)]
    started = loop.scheduler.fork(parent, children)
    assert started == children[:2], "the third finds no slot and waits"
    assert loop.blocks.num_used == 3
    for sequence in [parent, *started]:
        sequence.token_ids.append(sequence.choice)
    loop.to_go.update(dict.fromkeys(children, 4))
    batch = loop.step()
    assert len(batch.copies) == 2, "the half-full block is copied for all owners but the last"
    loop.until_idle()


def test_who_is_held_waits_alone() -> None:
    """Its mask is not there yet: nothing of it may be sampled, neither from a prompt nor from a running text."""
    loop = Loop()
    held = loop.add(request("held", 8), num_tokens=3)
    loop.add(request("free", 8, arrival_s=1), num_tokens=10)
    held.is_held = True
    assert of(loop.step()) == [("free", 8)]
    held.is_held = False
    assert of(loop.step()) == [("free", 1), ("held", 8)]
    held.is_held = True
    assert of(loop.step()) == [("free", 1)]
    held.is_held = False
    loop.until_idle()


def test_prompts_interrupt_only_when_enough_of_them_wait() -> None:
    loop = Loop(served_ratio=1.0, max_waiting_steps=5)
    for index in range(3):
        loop.add(request(f"r{index}", 8), num_tokens=50)
    assert len(of(loop.step())) == 3, "nothing ran that could be interrupted"
    loop.add(request("late 0", 8, arrival_s=1), num_tokens=50)
    loop.add(request("late 1", 8, arrival_s=1), num_tokens=50)
    assert len(of(loop.step())) == 3, "two for three"
    loop.add(request("late 2", 8, arrival_s=1), num_tokens=50)
    assert len(of(loop.step())) == 6, "three for three"
    loop.add(request("later", 8, arrival_s=2), num_tokens=50)
    assert [len(of(loop.step())) for _ in range(5)] == [6, 6, 6, 6, 7], "the fifth step after the last start"


def test_more_decodes_than_the_budget_take_turns_by_urgency() -> None:
    loop = Loop(budget=16, max_sequences=64, num_blocks=400)
    for index in range(40):
        loop.add(request(f"r{index}", 1, arrival_s=index), num_tokens=5)
    loop.until_idle()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_schedule_ends(data: st.DataObject) -> None:
    """Prompts and caches of any size that the limits allow: nobody is stuck, nothing leaks."""
    num_blocks = data.draw(st.integers(2, 20))
    block_size = data.draw(st.sampled_from([1, 2, 4, 16]))
    capacity = num_blocks * block_size
    loop = Loop(
        num_blocks=num_blocks,
        block_size=block_size,
        max_sequences=data.draw(st.integers(1, 6)),
        budget=data.draw(st.integers(1, 40)),
        ageing_s=data.draw(st.sampled_from([0.001, 10.0])),
        prefix_caching=data.draw(st.booleans()),
    )
    for index in range(data.draw(st.integers(1, 8))):
        prompt = data.draw(st.integers(1, capacity - 1))
        # The last token produced is never computed, so prompt + new - 1 tokens are cached at most.
        loop.add(
            request(f"r{index}", prompt, arrival_s=data.draw(st.integers(-100, 0)), first=data.draw(st.integers(0, 1))),
            num_tokens=data.draw(st.integers(1, min(capacity - prompt, 12))),
        )
    loop.until_idle()


@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_arrivals_cancels_and_finishes_leak_nothing(seed: int, clock: list[float]) -> None:
    rng = random.Random(seed)
    loop = Loop(num_blocks=rng.choice([20, 40]), max_sequences=8, budget=rng.choice([16, 64]), ageing_s=5.0)
    num_preempted = num_added = 0
    while num_added < 1500 or loop.to_go:
        clock[0] += 0.05
        for _ in range(rng.choice([0, 0, 1, 2]) if num_added < 1500 and len(loop.to_go) < 40 else 0):
            num_added += 1
            loop.add(
                request(
                    f"r{num_added}",
                    rng.randint(1, 60),
                    arrival_s=clock[0] - NOW_S,
                    first=rng.randint(0, 3),
                    priority=rng.choice([0, 0, 0, 1, -1]),
                ),
                num_tokens=rng.randint(1, 20),
            )
        if loop.to_go and rng.random() < 0.1:
            loop.remove(rng.choice(list(loop.to_go)))
        batch = loop.step()
        assert batch.entries or not loop.to_go
        num_preempted += len(batch.preempted)
    assert num_preempted > 10, "the cache was meant to be too small"
    assert loop.blocks.num_used == 0
    loop.scheduler.check_integrity()
