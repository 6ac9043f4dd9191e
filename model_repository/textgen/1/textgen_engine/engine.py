"""The engine's loop: take arrivals and cancellations, schedule, launch, collect, emit.

One thread runs the loop; only that thread touches scheduler, blocks, sampler and runner. Others talk to it through
`submit` and `cancel`, which enqueue. Owns the order of a turn, the step in flight, and what becomes of a step that
fails. The rooms come from assembly.py; what a request goes through is live_requests.py's, what a step does
step_runner.py's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from textgen_engine.assembly import assemble
from textgen_engine.config import EngineConfig
from textgen_engine.errors import Cancelled, EngineFailure, RankFailure
from textgen_engine.launched import Launched, can_repeat
from textgen_engine.live_requests import LiveRequests
from textgen_engine.messages import StepReport
from textgen_engine.metrics import StepMetrics
from textgen_engine.parallel.launch import Ranks
from textgen_engine.request import GenerationRequest
from textgen_engine.sampler_states import SamplerStates
from textgen_engine.scheduler import ScheduledBatch
from textgen_engine.speculation import Speculator
from textgen_engine.step_meter import StepMeter
from textgen_engine.step_runner import StepRunner

logger = logging.getLogger(__name__)

# Idle for so long, the engine checks its books once (not at once: the next request should not wait for it).
_IDLE_CHECK_S = 1.0
# Requests exist but none can run (they wait for something outside the loop): look again after so long.
_NOTHING_TO_RUN_S = 0.05
# The same when sequences wait for a mask that another process makes.
_MASK_POLL_S = 0.002


class Engine:
    """Owns every room of the engine. `emit` is called from the loop's thread, at most twice per step: with the requests
    that the step starts, where there are any, and with what came of it."""

    def __init__(self, config: EngineConfig, emit: Callable[[StepReport], None], ranks: Ranks | None = None) -> None:
        """Load the model and allocate everything; with `ranks`, as rank 0 of them. Raises ModelLoadError or
        ConfigError, and RankFailure when a rank is lost meanwhile."""
        self._emit = emit
        self._ranks = ranks
        self._wake = threading.Condition()
        self._arrivals: deque[GenerationRequest] = deque()
        self._cancellations: deque[str] = deque()
        self._stopping = False
        self._rooms = rooms = assemble(config, ranks, self._notify)
        self.info = rooms.info
        self._adapters = rooms.adapters
        self._constraints = rooms.constraints
        self._scheduler = rooms.scheduler
        self._runner = rooms.runner
        speculator = Speculator(config.scheduler.num_guesses)
        self._overlaps = config.scheduler.overlap_steps
        assert not (self._overlaps and (speculator.is_on or ranks is not None))
        self._samplers = SamplerStates(rooms.sampler, rooms.info.eos_token_ids)
        self._requests = LiveRequests(rooms, self._samplers, speculator)
        self._meter = StepMeter(rooms.scheduler, rooms.constraints, rooms.blocks)
        self._steps = StepRunner(rooms, self._requests, self._samplers, speculator, self._meter)
        self._in_flight: Launched | None = None  # launched by the last turn of the loop, not read back yet
        self._any_held = False  # a sequence waits for a mask that another process makes

    # ---- called from any thread --------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> None:
        """Enqueue a request; its outputs come through `emit`."""
        with self._wake:
            self._arrivals.append(request)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """End a request with a Cancelled error; its slot and blocks are free before the next step. Unknown: nothing."""
        with self._wake:
            self._cancellations.append(request_id)
            self._wake.notify()

    def stop(self) -> None:
        """Let `run` return after the current step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until `stop`. Sleeps while there is nothing to do; checks its books once it has been idle a while."""
        checked = True
        while True:
            with self._wake:
                while not (self._arrivals or self._cancellations or self._requests.by_id or self._stopping):
                    if not self._wake.wait(timeout=None if checked else _IDLE_CHECK_S):
                        self.check_integrity()
                        checked = True
                if self._stopping:
                    break
            checked = False
            if not self.step():
                with self._wake:
                    if self._requests.by_id and not (self._arrivals or self._cancellations or self._stopping):
                        self._wake.wait(timeout=_MASK_POLL_S if self._any_held else _NOTHING_TO_RUN_S)
        self._constraints.close()
        self._adapters.close()
        if self._ranks is not None:
            self._ranks.close()

    def step(self) -> bool:
        """One turn of the loop; False when there was nothing to run."""
        now_s = time.monotonic()
        report = StepReport(metrics=StepMetrics(), time_s=now_s)
        self._take_news(now_s, report)
        has_landed = self._land(report) if self._needs_tokens() else False
        self._any_held, completed = self._constraints.hold()
        for sequence in completed:
            self._requests.complete(sequence, report)
        self._steps.guess()
        self._mark_ending()
        batch = self._schedule()
        if batch.entries and self._overlaps:
            has_landed |= self._run_overlapped(batch, report)
        elif batch.entries:
            self._run_batch(batch, report)
        if not batch.entries or not self._requests.by_id:
            has_landed |= self._land(report)
        if batch.entries or report.outputs or has_landed:
            step_s = time.monotonic() - now_s
            self._scheduler.observe(batch, step_s)
            self._meter.measure(batch, report, step_s, self._requests.by_id.values())
            self._emit(report)
        return bool(batch.entries) or has_landed

    def _take_news(self, now_s: float, report: StepReport) -> None:
        """Serve what has come since the last turn: requests, cancellations, deadlines, grammars, adapters."""
        requests = self._requests
        requests.free_adapters()
        with self._wake:
            arrivals, self._arrivals = self._arrivals, deque()
        for request in arrivals:
            requests.admit(request, report)
        with self._wake:
            cancellations, self._cancellations = self._cancellations, deque()
        for request_id in cancellations:
            requests.fail(request_id, Cancelled("ended before it was complete"), report)
        requests.expire(now_s, report)
        requests.take_grammars(report)
        requests.take_checks(report)
        requests.serve_adapter_commands(report)

    def _schedule(self) -> ScheduledBatch:
        """What runs next; says which requests it starts before the step that first touches them runs."""
        batch = self._scheduler.schedule()
        for sequence in batch.preempted:
            self._samplers.forget(sequence)
            sequence.draft = ()
        started = self._requests.start(batch)
        if started:
            self._emit(StepReport(started=started))
        return batch

    def check_integrity(self) -> None:
        """Assert that no block, slot or record outlives its request."""
        self._scheduler.check_integrity()
        if not self._requests.by_id:
            assert not self._requests.choice_of and not self._samplers and not self._scheduler.running
            assert not self._scheduler.waiting

    # ---- a step by itself --------------------------------------------------------------------------------------------

    def _run_batch(self, batch: ScheduledBatch, report: StepReport) -> None:
        """Run the step. One whose forward pass fails is tried again in halves, down to the sequences that fail alone:
        one poisonous request, or more than the memory takes at once, costs the neighbours nothing but time."""
        try:
            self._steps.collect(self._launch(batch, report), report)
            return
        except (torch.AcceleratorError, RankFailure):
            raise  # the device or a rank is lost: no later step can succeed, so the process has to end
        except Exception as error:  # the one broad catch: the requests fail, the engine goes on
            reason = type(error).__name__
            halves = can_repeat(batch) and len(batch.entries) > 1
            if halves:
                logger.warning("a step of %d sequences failed: tried in halves", len(batch.entries), exc_info=True)
            else:
                logger.exception("a step of %d sequences failed", len(batch.entries))
        # Out of the except clause, so that the traceback no longer keeps the failed step's tensors alive.
        self._runner.release_unused_memory()
        if not halves:
            self._fail_batch(batch, reason, report)
            return
        middle = len(batch.entries) // 2
        for entries in (batch.entries[:middle], batch.entries[middle:]):
            # What shares a request with a sequence that has failed is gone.
            half = ScheduledBatch([entry for entry in entries if entry.sequence in self._requests.choice_of])
            if half.entries:
                self._run_batch(half, report)

    def _launch(self, batch: ScheduledBatch, report: StepReport) -> Launched:
        pending = None if self._in_flight is None else self._in_flight.pending
        return self._steps.launch(batch, pending, report.time_s)

    def _fail_batch(self, batch: ScheduledBatch, reason: str, report: StepReport) -> None:
        assert report.metrics is not None
        report.metrics.has_failed = True
        failure = EngineFailure(f"the engine could not run a step ({reason})")
        for request_id in {entry.sequence.request.request_id for entry in batch.entries}:
            self._requests.fail(request_id, failure, report)

    # ---- overlapped steps (see launched.py) --------------------------------------------------------------------------

    def _needs_tokens(self) -> bool:
        """Whether the next step cannot be launched before the one in flight is read."""
        return self._in_flight is not None and any(map(self._constraints.binds, self._in_flight.sampled))

    def _mark_ending(self) -> None:
        """Spare those a row whose pending token is the last they may have; past it they may have no place either."""
        for sequence in [] if self._in_flight is None else self._in_flight.sampled:
            live = self._requests.by_id.get(sequence.request.request_id)
            sequence.ends_pending = live is not None and sequence.num_sampled >= live.max_new_tokens

    def _run_overlapped(self, batch: ScheduledBatch, report: StepReport) -> bool:
        """Launch the step, then read the one in flight, if there is one (which is what it returns)."""
        launched = None
        try:
            launched = self._launch(batch, report)
        except (torch.AcceleratorError, RankFailure):
            raise
        except Exception as error:
            reason = type(error).__name__
            logger.warning("a step of %d sequences failed: tried by itself", len(batch.entries), exc_info=True)
        if launched is None:
            self._runner.release_unused_memory()
        has_landed = self._land(report)
        if launched is not None:
            self._in_flight = launched
            return has_landed
        if not can_repeat(batch):
            self._fail_batch(batch, reason, report)
            return has_landed
        rest = ScheduledBatch([entry for entry in batch.entries if entry.sequence in self._requests.choice_of])
        if rest.entries:
            self._run_batch(rest, report)
        return has_landed

    def _land(self, report: StepReport) -> bool:
        """Read the step in flight; False when there is none."""
        launched, self._in_flight = self._in_flight, None
        if launched is None:
            return False
        try:
            self._steps.collect(launched, report)
        except (torch.AcceleratorError, RankFailure):
            raise
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(launched.batch.entries))
            self._fail_batch(launched.batch, type(error).__name__, report)
        return True
