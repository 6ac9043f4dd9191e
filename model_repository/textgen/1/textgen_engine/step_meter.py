"""What the engine's reports say of a step's work and time: counts, latencies of tokens, and how full the engine is."""

from __future__ import annotations

from collections.abc import Collection

from textgen_engine.block_manager import BlockManager
from textgen_engine.constraints import Constraints
from textgen_engine.live_requests import Choice, LiveRequest
from textgen_engine.messages import StepReport
from textgen_engine.metrics import EngineGauges
from textgen_engine.scheduler import ScheduledBatch, Scheduler


class StepMeter:
    """Reads the rooms' counters, and remembers where they stood at the last step."""

    def __init__(self, scheduler: Scheduler, constraints: Constraints, blocks: BlockManager) -> None:
        self._scheduler = scheduler
        self._constraints = constraints
        self._blocks = blocks
        self._num_preemptions = 0
        self._num_forced_tokens = 0

    def time_tokens(self, live: LiveRequest, choice: Choice, num_tokens: int, now_s: float, report: StepReport) -> None:
        """Note one sampled token and the forced ones behind it, which came at the same moment."""
        assert report.metrics is not None
        if live.timings.first_token_s is None:
            live.timings.first_token_s = now_s
            report.metrics.time_to_first_token_s.append(now_s - live.request.arrival_s)
            if live.timings.scheduled_s is not None:
                report.metrics.queue_s.append(live.timings.scheduled_s - live.request.arrival_s)
            report.metrics.num_cached_tokens += choice.sequence.num_cached
        if choice.last_token_s is not None:
            report.metrics.inter_token_s.append(now_s - choice.last_token_s)
        choice.last_token_s = now_s
        report.metrics.num_generated_tokens += num_tokens
        if num_tokens > 1:
            report.metrics.skipped_tokens.append(num_tokens - 1)

    def measure(
        self, batch: ScheduledBatch, report: StepReport, step_s: float, requests: Collection[LiveRequest]
    ) -> None:
        """Fill the report's metrics with what the step was and what is live after it."""
        metrics = report.metrics
        assert metrics is not None
        metrics.batch_size = len(batch.entries)
        prefills = [entry.num_tokens for entry in batch.entries if entry.start < entry.sequence.num_prompt_tokens]
        metrics.is_prefill = bool(prefills)
        metrics.num_prefill_tokens = sum(prefills)
        metrics.num_preemptions = self._scheduler.num_preemptions - self._num_preemptions
        self._num_preemptions = self._scheduler.num_preemptions
        metrics.num_forced_tokens = self._constraints.num_forced_tokens - self._num_forced_tokens
        self._num_forced_tokens = self._constraints.num_forced_tokens
        metrics.num_started = batch.num_started
        metrics.joined_because = batch.joined_because
        metrics.step_s = step_s
        num_running, max_tokens = 0, 0
        for live in requests:
            if live.started:
                num_running += 1
                max_tokens += len(live.request.prompt_token_ids) + live.max_new_tokens * live.num_choices
        metrics.gauges = EngineGauges(
            num_running=num_running,
            num_waiting=len(requests) - num_running,
            max_tokens=max_tokens,
            kv_cache_usage=self._blocks.usage,
        )
