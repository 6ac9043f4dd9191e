"""Which sequences run in the next step, with how many tokens each.

Owns the waiting and the running list and the token budget. Sees neither tensors nor tokenizers nor Triton.

One step mixes decodes (one token each, always first, so that running streams never wait for a prompt) with chunks of
prompts. Beside a long prompt the chunks are so small that a step takes little longer than without them (step_pace.py).
Prompts that take a few steps together, and crowds of them, get the whole budget: the pause is short, or many would wait
for the few. Blocks are reserved for the tokens of the step only. When they run out, the least urgent sequence is
preempted: it gives its blocks away and is computed again later, from its tokens.

Urgency is one number per request: arrival_s - priority * priority_ageing_s, smaller first. That is first come first
served inside a priority, and a request that has waited `priority_ageing_s` longer equals one of the next priority, so
nobody starves.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from textgen_engine.block_manager import BlockManager
from textgen_engine.config import SchedulerConfig
from textgen_engine.sequence import Sequence, SequenceStatus
from textgen_engine.step_pace import StepPace

# Guessed tokens are verified only while a step has fewer rows than this: beyond it arithmetic, not the reading of the
# weights, sets a step's time, and a wrong guess costs as much as a token.
_MOST_VERIFIED_ROWS = 32
# A prompt is not cut into chunks smaller than this because another prompt waits beside it.
_MIN_SHARED_CHUNK = 64
# How many prompts behind one are looked at for such as are shorter.
_MOST_LOOKED_AT = 64
# How many waiting sequences that do not fit are passed over in one step, to bound the step's search.
_MAX_PASSED_OVER = 16
# More than one prompt is a crowd when there are fewer streams than this for each.
_STREAMS_PER_PROMPT = 4
# Prompts that take no more whole steps than this hold up streams for too short a time to be slowed down for it.
_SHORT_STEPS = 4
# Prompts whose log-probabilities are wanted need one row of logits per token: so many of them fit into one step, so
# that its logits are bounded (128 rows of 128k entries are 64 MiB).
MAX_SCORED_TOKENS = 128

# Why prompts were started beside running sequences, in the words of TGI's metric.
JoinReason = Literal["chunking", "backpressure", "wait_exceeded"]


@dataclass(slots=True)
class ScheduledSequence:
    """`num_tokens` tokens of the sequence, from `start` on; `is_last` when its last known token is among them.

    num_guessed: tokens of `sequence.draft` to be verified behind it, as rows of their own.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    is_last: bool
    num_guessed: int = 0


@dataclass(slots=True)
class ScheduledBatch:
    """One step. `copies` are block copies (source, destination) to be made before anything is written.

    num_started: sequences in their first step; joined_because: why those could join others that run already.
    """

    entries: list[ScheduledSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_started: int = 0
    joined_because: JoinReason | None = None

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens + entry.num_guessed for entry in self.entries)

    @property
    def cuts_a_prompt(self) -> bool:
        """Whether a prompt goes on in the next step."""
        return any(entry.num_tokens > 1 and not entry.is_last for entry in self.entries)

    @property
    def num_scored_tokens(self) -> int:
        """Tokens whose logits are wanted because the log-probabilities of their prompt are."""
        return sum(e.num_tokens for e in self.entries if e.sequence.request.output.prompt_logprobs)


class Scheduler:
    """Owns who waits and who runs. Not thread safe: the engine's loop thread alone calls it."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self._config = config
        self._blocks = blocks
        self.waiting: list[Sequence] = []  # most urgent first
        self.running: list[Sequence] = []  # most urgent first
        self._free_slots = list(range(config.max_num_sequences - 1, -1, -1))
        self.num_preemptions = 0
        self._num_steps_without_start = 0
        self._pace = StepPace(config.max_step_stretch) if config.max_step_stretch > 1 else None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that holds nothing."""
        assert sequence.status is SequenceStatus.WAITING and not sequence.block_table
        bisect.insort(self.waiting, sequence, key=self._urgency)

    def fork(self, parent: Sequence, children: Iterable[Sequence]) -> list[Sequence]:
        """Start children of a sequence whose whole prompt is computed, on the same blocks.

        Returns those that run at once; the others found no slot and wait like new arrivals (the prefix cache spares
        them most of the prompt).
        """
        started = []
        for child in children:
            if self._free_slots:
                self._blocks.fork(parent, child)
                child.num_computed = parent.num_computed
                child.num_cached = parent.num_cached
                child.scheduled_s = parent.scheduled_s
                self._start(child)
                started.append(child)
            else:
                self.add(child)
        return started

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good (finished, cancelled, failed); its slot and blocks are free at once."""
        if sequence.status is SequenceStatus.RUNNING:
            self._stop(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> ScheduledBatch:
        """The next step; empty when nothing can run. Reserves blocks, preempts, admits."""
        batch = ScheduledBatch()
        budget = self._config.max_tokens_per_step
        for sequence in [s for s in self.running if s.is_decoding and s.may_run]:
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted by a more urgent one a moment ago
            if budget > 0 and self._reserve_by_force(sequence, 1, batch):
                self._append(batch, sequence, 1)
                budget -= 1
        budget = self._prompt_budget(budget, num_decodes=len(batch.entries))
        budget = self._schedule_prefills(batch, budget)
        if not batch.preempted and self._may_start_prompts():
            reason, runs_already = self._join_reason(), bool(self.running)
            self._admit(batch, budget)
            if batch.num_started and runs_already:
                batch.joined_because = reason
        if not batch.preempted:
            self._add_guesses(batch)
        self._num_steps_without_start += 1
        return batch

    def advance(self, batch: ScheduledBatch) -> None:
        """Count the step's tokens as computed. Call when its results are in, before new tokens are appended."""
        for entry in batch.entries:
            sequence = entry.sequence
            if sequence.status is SequenceStatus.RUNNING:
                sequence.num_computed = entry.start + entry.num_tokens
                self._blocks.register(sequence)
                self._blocks.release_hidden(sequence)

    def observe(self, batch: ScheduledBatch, step_s: float) -> None:
        """Learn from the time that a step took."""
        if self._pace is not None and batch.entries:
            num_decodes = sum(1 + entry.num_guessed for entry in batch.entries if entry.num_tokens == 1)
            num_tokens = batch.num_tokens - num_decodes
            self._pace.observe(num_decodes, num_tokens, step_s)

    def accept(self, sequence: Sequence, num_tokens: int) -> None:
        """Count the verified guesses among the sequence's tokens as computed, once they are appended."""
        if num_tokens and sequence.status is SequenceStatus.RUNNING:
            sequence.num_computed += num_tokens
            self._blocks.register(sequence)
            self._blocks.release_hidden(sequence)

    def check_integrity(self) -> None:
        """Assert that slots and blocks are all accounted for."""
        slots = [sequence.slot for sequence in self.running]
        assert sorted(self._free_slots + [s for s in slots if s is not None]) == list(
            range(self._config.max_num_sequences)
        )
        assert all(not sequence.block_table and sequence.slot is None for sequence in self.waiting)
        self._blocks.check_integrity(self.running)

    def _urgency(self, sequence: Sequence) -> float:
        request = sequence.request
        return request.arrival_s - request.priority * self._config.priority_ageing_s

    def _prompt_budget(self, budget: int, *, num_decodes: int) -> int:
        """What of the step's budget prompts may use beside its decodes."""
        if self._pace is None or not num_decodes:
            return budget
        prompts = itertools.chain((one for one in self.running if not one.is_decoding), self.waiting)
        num_tokens = 0
        for num_prompts, sequence in enumerate(prompts, start=1):
            num_tokens += len(sequence.token_ids)  # all of it: the end of a long prompt is no short one
            if num_prompts > max(1, num_decodes // _STREAMS_PER_PROMPT):
                return budget
        if num_tokens <= _SHORT_STEPS * self._config.max_tokens_per_step:
            return budget
        limit = self._pace.prompt_tokens(num_decodes)
        return budget if limit is None else min(budget, limit)

    def _schedule_prefills(self, batch: ScheduledBatch, budget: int) -> int:
        """Continue prompts that were begun; returns the budget that is left for new ones."""
        prefills = [s for s in self.running if not s.is_decoding and s.may_run]
        for index, sequence in enumerate(prefills):
            if sequence.status is not SequenceStatus.RUNNING or budget <= 0:
                continue
            behind = itertools.chain(prefills[index + 1 :], self.waiting if self._free_slots else ())
            chunk = _chunk(sequence, sequence.num_uncomputed, budget, behind, batch)
            if chunk <= 0:
                continue
            if self._reserve_by_force(sequence, chunk, batch):
                self._append(batch, sequence, chunk)
                budget -= chunk
        return budget

    def _admit(self, batch: ScheduledBatch, budget: int) -> None:
        """Start waiting sequences, most urgent first, while slots, blocks and budget last.

        A sequence that does not fit is passed over for smaller ones, but only until it has waited as long as one level
        of priority is worth: from then on the blocks that become free are kept for it.
        """
        patience_s = self._config.priority_ageing_s
        num_passed_over = 0
        waiting = list(self.waiting)
        for index, sequence in enumerate(waiting):
            if budget <= 0 or not self._free_slots or num_passed_over >= _MAX_PASSED_OVER:
                return
            if not sequence.may_run:
                continue
            found = [] if sequence.request.output.prompt_logprobs else self._blocks.find_prefix(sequence)
            num_found = len(found) * self._blocks.block_size
            behind = itertools.islice(waiting, index + 1, None) if len(self._free_slots) > 1 else ()
            chunk = _chunk(sequence, len(sequence.token_ids) - num_found, budget, behind, batch)
            if chunk <= 0:
                continue
            # Found blocks that nobody uses count as available now but not once they are taken.
            new_blocks = self._blocks.blocks_for(num_found + chunk) - len(found)
            reused = sum(1 for block in found if self._blocks.is_idle(block))
            # One spare block per running sequence keeps a newcomer from being preempted right away.
            spare = len(self.running) if self.running else 0
            if new_blocks + reused + spare > self._blocks.num_available:
                if time.monotonic() - sequence.request.arrival_s > patience_s:
                    return
                num_passed_over += 1
                continue
            self._num_steps_without_start = 0
            self.waiting.remove(sequence)
            self._blocks.adopt_prefix(sequence, found)
            sequence.num_computed = num_found
            if sequence.scheduled_s is None:
                sequence.scheduled_s = time.monotonic()
                sequence.num_cached = num_found
                batch.num_started += 1
            self._start(sequence)
            copies = self._blocks.reserve(sequence, num_found + chunk)
            assert copies is not None
            batch.copies += copies
            self._append(batch, sequence, chunk)
            budget -= chunk

    def _add_guesses(self, batch: ScheduledBatch) -> None:
        """Let decodes verify their guesses with what is left of the budget and of the free blocks."""
        room = min(self._config.max_tokens_per_step, _MOST_VERIFIED_ROWS) - batch.num_tokens
        for entry in batch.entries:
            sequence = entry.sequence
            num_guessed = min(len(sequence.draft), room) if sequence.is_decoding else 0
            if num_guessed <= 0:
                continue
            copies = self._blocks.reserve(sequence, entry.start + 1 + num_guessed)
            if copies is not None:
                batch.copies += copies
                entry.num_guessed = num_guessed
                room -= num_guessed

    def _may_start_prompts(self) -> bool:
        """TGI's rule for interrupting decodes, carried over to chunks: with a waiting_served_ratio, prompts start only
        when enough of them wait for the sequences that run, or when none has started for max_waiting_steps."""
        return self._enough_wait() or self._num_steps_without_start >= self._config.max_waiting_steps

    def _enough_wait(self) -> bool:
        return len(self.waiting) >= self._config.waiting_served_ratio * len(self.running)

    def _join_reason(self) -> JoinReason:
        if not self._config.waiting_served_ratio:
            return "chunking"
        return "backpressure" if self._enough_wait() else "wait_exceeded"

    def _reserve_by_force(self, sequence: Sequence, num_tokens: int, batch: ScheduledBatch) -> bool:
        """Reserve blocks for the next tokens, preempting less urgent sequences; False if it preempted itself."""
        while True:
            copies = self._blocks.reserve(sequence, sequence.num_computed + num_tokens)
            if copies is not None:
                batch.copies += copies
                return True
            victim = self.running[-1]
            self._preempt(victim, batch)
            if victim is sequence:
                return False

    def _preempt(self, sequence: Sequence, batch: ScheduledBatch) -> None:
        self._stop(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        # It may already be part of this step.
        batch.entries = [entry for entry in batch.entries if entry.sequence is not sequence]
        batch.preempted.append(sequence)
        bisect.insort(self.waiting, sequence, key=self._urgency)

    def _start(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        bisect.insort(self.running, sequence, key=self._urgency)

    def _stop(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        self._blocks.release(sequence)

    def _append(self, batch: ScheduledBatch, sequence: Sequence, num_tokens: int) -> None:
        batch.entries.append(
            ScheduledSequence(
                sequence, sequence.num_computed, num_tokens, is_last=num_tokens == sequence.num_uncomputed
            )
        )


def _chunk(sequence: Sequence, num_tokens: int, budget: int, behind: Iterable[Sequence], batch: ScheduledBatch) -> int:
    """Tokens of a prompt for this step, num_tokens being left of it. One that does not end with this step leaves up to
    half of what there is to prompts behind it that are at most half as long: a short one starts now and not when the
    long one is through, while such as are alike come one after the other, each the sooner for it. What one leaves is
    not for a second one that does not end with the step either. 0 when the step can score no more tokens."""
    if num_tokens > budget:
        lengths = [other.num_uncomputed for other in itertools.islice(behind, _MOST_LOOKED_AT) if other.may_run]
        left = budget - sum(length for length in lengths if 2 * length <= num_tokens)
        least = 0 if batch.cuts_a_prompt else max(budget // 2, min(budget, _MIN_SHARED_CHUNK))
        budget = max(left, least)
    if sequence.request.output.prompt_logprobs:
        budget = min(budget, MAX_SCORED_TOKENS - batch.num_scored_tokens)
    return min(num_tokens, budget)
