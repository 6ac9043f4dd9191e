"""The engine's loop: take arrivals and cancellations, schedule, launch, collect, emit.

One thread runs the loop; only that thread touches scheduler, blocks, sampler and runner. Others talk to it through
`submit` and `cancel`, which enqueue. Every request gets outputs until exactly one last output (`TokenOutput.error`, or
`finish_reason` on each of its choices, or the answer to a `grammar_check` or an `adapter_command`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from textgen_engine.adapters.layers import AdapterLayers
from textgen_engine.adapters.registry import AdapterPlaces, AdapterRegistry
from textgen_engine.adapters.spec import AdapterHandle
from textgen_engine.batch import BatchInputs, build_inputs
from textgen_engine.block_manager import BlockManager
from textgen_engine.config import EngineConfig
from textgen_engine.constraints import Accepted, Constraints, PendingMasks, as_engine_error
from textgen_engine.cuda_graphs import CudaCapturer
from textgen_engine.detokenizer import Detokenizer, TextStream
from textgen_engine.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    EngineFailure,
    GrammarError,
    InvalidParameter,
    PromptTooLong,
    RankFailure,
    Unsupported,
)
from textgen_engine.grammar import CompiledGrammar, GrammarCompiler, grammar_limits
from textgen_engine.grammar.check import GrammarVerdict
from textgen_engine.kv_cache import KVCache, cache_dtype
from textgen_engine.launched import Launched, Round, ScoreReader, can_repeat
from textgen_engine.messages import EngineInfo, StepReport
from textgen_engine.metrics import EngineGauges, StepMetrics
from textgen_engine.model_runner import ModelRunner, num_cache_blocks, rank_memory
from textgen_engine.models.loader import LoadedModel
from textgen_engine.parallel.adapters import AdaptersOfAllRanks
from textgen_engine.parallel.launch import Ranks
from textgen_engine.parallel.worker import ReportMemory, prepare
from textgen_engine.request import FinishReason, GenerationRequest, Timings, TokenDetail, TokenOutput
from textgen_engine.sampling.sampler import PromptLogprobs, Sampler, prompt_logprobs
from textgen_engine.scheduler import ScheduledBatch, ScheduledSequence, Scheduler
from textgen_engine.sequence import Sequence, SequenceStatus
from textgen_engine.speculation import Speculator
from textgen_engine.transfer import HostCopy, to_device
from textgen_engine.warmup import measure_largest_step

logger = logging.getLogger(__name__)

# Idle for so long, the engine checks its books once (not at once: the next request should not wait for it).
_IDLE_CHECK_S = 1.0
# Requests exist but none can run (they wait for something outside the loop): look again after so long.
_NOTHING_TO_RUN_S = 0.05
# The same when sequences wait for a mask that another process makes.
_MASK_POLL_S = 0.002


@dataclass(eq=False, slots=True)
class _Choice:
    """What the engine keeps per sequence beside the sequence itself."""

    sequence: Sequence
    text: TextStream
    last_token_text: str = ""
    last_token_s: float | None = None
    num_guessed: int = 0  # tokens guessed ahead, and how many of them were right
    num_guessed_right: int = 0
    sum_logprob: float = 0.0
    held: TokenOutput | None = None  # best_of: outputs are held back until the best are known


@dataclass(eq=False, slots=True)
class _LiveRequest:
    request: GenerationRequest
    timings: Timings
    max_new_tokens: int
    choices: list[_Choice] = field(default_factory=list)
    num_finished: int = 0
    prompt_details: list[TokenDetail] = field(default_factory=list)
    grammar: CompiledGrammar | None = None
    adapter: AdapterHandle | None = None
    started: bool = False

    @property
    def num_choices(self) -> int:
        return max(self.request.n, self.request.best_of)

    @property
    def ranks_choices(self) -> bool:
        return self.request.best_of > self.request.n


class Engine:
    """Owns every room of the engine. `emit` is called from the loop's thread, at most twice per step."""

    def __init__(self, config: EngineConfig, emit: Callable[[StepReport], None], ranks: Ranks | None = None) -> None:
        """Load the model and allocate everything; with `ranks`, as rank 0 of them. Raises ModelLoadError or
        ConfigError, and RankFailure when a rank is lost meanwhile."""
        self._ranks = ranks
        fused = not config.lora.is_enabled
        if ranks is None:
            loaded, backend = prepare(config.model, None, fused=fused)
        else:
            loaded, backend = prepare(ranks.model, ranks.shard, fused=fused)
        layers = AdapterLayers(loaded.model, loaded.dtype, loaded.device) if config.lora.is_enabled else None
        places: AdapterPlaces | None = layers
        collectives = None
        if ranks is not None:
            collectives = ranks.join()
            loaded.connect(collectives)
            if layers is not None:
                assert loaded.plan is not None
                places = AdaptersOfAllRanks(layers, loaded.plan, collectives)
        self._adapters = AdapterRegistry(config.lora, places, self._notify)
        self._reported_adapters = self._adapters.specs
        num_slots = config.scheduler.max_num_sequences
        longest = config.limits.max_total_tokens or loaded.max_positions
        self._sampler = Sampler(
            vocab_size=loaded.vocab_size,
            num_slots=num_slots,
            device=loaded.device,
            watermark_gamma=config.watermark.gamma,
            watermark_delta=config.watermark.delta,
            cpu_kernels=loaded.kernels,
        )
        num_blocks = config.cache.num_blocks
        if num_blocks is None:
            step_bytes = measure_largest_step(
                loaded,
                backend,
                self._sampler,
                config.cache,
                config.scheduler,
                config.limits.max_top_n_tokens,
                collectives,
            )
            if config.model.graph_sizes:
                step_bytes *= 2  # the graphs' pool holds a decode step of its own, which is no larger
            memory = [rank_memory(config.cache, loaded, step_bytes)]
            if collectives is not None:
                collectives.send(ReportMemory(config.cache, step_bytes))
                memory = collectives.collect(memory[0])
            num_blocks = num_cache_blocks(
                config.cache,
                memory,
                is_cpu=loaded.device.type == "cpu",
                max_useful_tokens=longest * num_slots,
            )
            logger.info("the largest step takes %.0f MiB; %d KV blocks", step_bytes / 2**20, num_blocks)
        self.info = _derive_info(config, loaded, num_blocks)
        cache = KVCache(
            loaded.layers,
            num_blocks=num_blocks,
            block_size=config.cache.block_size,
            dtype=cache_dtype(config.cache, loaded.dtype),
            device=loaded.device,
            has_scratch=bool(config.model.graph_sizes),
        )
        # Nobody needs to wait for it: within seconds after the start all of it is there.
        cache.populate_aside()
        self._blocks = BlockManager(
            num_blocks, config.cache.block_size, prefix_caching=config.cache.prefix_caching, window=loaded.window
        )
        self._scheduler = Scheduler(config.scheduler, self._blocks)
        self._runner = ModelRunner(loaded, backend, cache, layers, collectives)
        if config.model.graph_sizes:
            capturer = CudaCapturer(loaded.device)
            self._runner.capture_graphs(config.model.graph_sizes, self.info.max_total_tokens, capturer)
        assert loaded.tokenizer is not None
        self._tokenizer = loaded.tokenizer
        self._detokenizer = Detokenizer(loaded.tokenizer)
        self._constraints = Constraints(
            GrammarCompiler(
                loaded.tokenizer,
                vocab_size=loaded.vocab_size,
                eos_token_ids=loaded.eos_token_ids,
                limits=grammar_limits(config.grammar),
                backends=config.grammar.backends,
                on_ready=self._notify,
            ),
            jump_forward=config.grammar.jump_forward,
            on_checked=self._notify,
        )
        self._speculator = Speculator(config.scheduler.num_guesses)
        self._overlaps = config.scheduler.overlap_steps
        assert not (self._overlaps and (self._speculator.is_on or ranks is not None))
        self._in_flight: Launched | None = None  # launched by the last turn of the loop, not read back yet
        self._emit = emit
        self._live: dict[str, _LiveRequest] = {}
        self._choice_of: dict[Sequence, _Choice] = {}
        self._sampler_slots: dict[Sequence, int] = {}  # sequences the sampler keeps state for
        self._num_preemptions = 0
        self._num_forced_tokens = 0
        self._any_held = False
        self._wake = threading.Condition()
        self._arrivals: deque[GenerationRequest] = deque()
        self._cancellations: deque[str] = deque()
        self._stopping = False

    # ---- called from any thread ------------------------------------------------------------------------------

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

    # ---- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Step until `stop`. Sleeps while there is nothing to do; checks its books once it has been idle a while."""
        checked = True
        while True:
            with self._wake:
                while not (self._arrivals or self._cancellations or self._live or self._stopping):
                    if not self._wake.wait(timeout=None if checked else _IDLE_CHECK_S):
                        self.check_integrity()
                        checked = True
                if self._stopping:
                    break
            checked = False
            if not self.step():
                with self._wake:
                    if self._live and not (self._arrivals or self._cancellations or self._stopping):
                        self._wake.wait(timeout=_MASK_POLL_S if self._any_held else _NOTHING_TO_RUN_S)
        self._constraints.close()
        self._adapters.close()
        if self._ranks is not None:
            self._ranks.close()

    def step(self) -> bool:
        """One turn of the loop; False when there was nothing to run."""
        now_s = time.monotonic()
        report = StepReport(metrics=StepMetrics(), time_s=now_s)
        self._adapters.free_unused(live.adapter for live in self._live.values())
        self._take_arrivals(report)
        self._take_cancellations(report)
        self._expire(now_s, report)
        self._take_grammars(report)
        self._take_checks(report)
        self._serve_adapter_commands(report)
        has_landed = self._land(report) if self._needs_tokens() else False
        self._any_held, completed = self._constraints.hold()
        for sequence in completed:
            self._complete(sequence, report)
        self._guess()
        self._mark_ending()
        batch = self._scheduler.schedule()
        for sequence in batch.preempted:
            self._forget_sampler_state(sequence)
            sequence.draft = ()
        self._announce_started(batch)
        if batch.entries and self._overlaps:
            has_landed |= self._run_overlapped(batch, report)
        elif batch.entries:
            self._run_batch(batch, report)
        if not batch.entries or not self._live:
            has_landed |= self._land(report)
        if batch.entries or report.outputs or has_landed:
            step_s = time.monotonic() - now_s
            self._scheduler.observe(batch, step_s)
            self._measure(batch, report, step_s)
            self._emit(report)
        return bool(batch.entries) or has_landed

    def _run_batch(self, batch: ScheduledBatch, report: StepReport) -> None:
        """Run the step. One whose forward pass fails is tried again in halves, down to the sequences that fail alone:
        one poisonous request, or more than the memory takes at once, costs the neighbours nothing but time."""
        try:
            self._collect(self._launch(batch, report), report)
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
            half = ScheduledBatch([entry for entry in entries if entry.sequence in self._choice_of])
            if half.entries:
                self._run_batch(half, report)

    def _fail_batch(self, batch: ScheduledBatch, reason: str, report: StepReport) -> None:
        assert report.metrics is not None
        report.metrics.has_failed = True
        failure = EngineFailure(f"the engine could not run a step ({reason})")
        for request_id in {entry.sequence.request.request_id for entry in batch.entries}:
            self._fail(request_id, failure, report)

    # ---- overlapped steps (see launched.py) --------------------------------------------------------------------

    def _needs_tokens(self) -> bool:
        """Whether the next step cannot be launched before the one in flight is read."""
        return self._in_flight is not None and any(map(self._constraints.binds, self._in_flight.sampled))

    def _mark_ending(self) -> None:
        """Spare those a row whose pending token is the last they may have; past it they may have no place either."""
        for sequence in [] if self._in_flight is None else self._in_flight.sampled:
            live = self._live.get(sequence.request.request_id)
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
        rest = ScheduledBatch([entry for entry in batch.entries if entry.sequence in self._choice_of])
        if rest.entries:
            self._run_batch(rest, report)
        return has_landed

    def _land(self, report: StepReport) -> bool:
        """Read the step in flight; False when there is none."""
        launched, self._in_flight = self._in_flight, None
        if launched is None:
            return False
        try:
            self._collect(launched, report)
        except (torch.AcceleratorError, RankFailure):
            raise
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(launched.batch.entries))
            self._fail_batch(launched.batch, type(error).__name__, report)
        return True

    # ---- one step --------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Assert that no block, slot or record outlives its request."""
        self._scheduler.check_integrity()
        if not self._live:
            assert not self._choice_of and not self._sampler_slots and not self._scheduler.running
            assert not self._scheduler.waiting

    def _launch(self, batch: ScheduledBatch, report: StepReport) -> Launched:
        """Put the step on the device: forward pass, then sampling. Reads nothing back."""
        pending = None if self._in_flight is None else self._in_flight.pending
        inputs = build_inputs(batch, self._runner.cache, self._runner.device, pending)
        launched_s = time.monotonic()
        masks = self._constraints.start_masks([entry.sequence for entry in inputs.sampled])
        try:
            logits = self._runner.forward(inputs, batch.copies)
        except Exception:
            if masks is not None:
                masks.settle()
            raise
        self._scheduler.advance(batch)
        errors: dict[Sequence, EngineError] = {} if masks is None else dict(masks.errors())
        rows, sequences = self._rows_to_sample(inputs.sampled, errors)
        first = None
        if sequences:
            origins = [inputs.sampled[row].sequence for row in rows]
            first = self._sample(logits, rows, sequences, origins, masks, errors)
        guesses = {
            entry.sequence: (inputs.guessed_rows[entry.sequence], entry.sequence.draft[: entry.num_guessed])
            for entry in inputs.sampled
            if entry.num_guessed
        }
        scored, prepare_s = self._score_prompts(inputs, logits), launched_s - report.time_s
        return Launched(batch, first, scored, launched_s, prepare_s, logits, guesses)

    def _sample(
        self,
        logits: torch.Tensor,
        rows: list[int],
        sequences: list[Sequence],
        origins: list[Sequence],
        masks: PendingMasks | None,
        errors: dict[Sequence, EngineError],
    ) -> Round:
        """The next token of each sequence, from its row of the logits and under the mask of its origin."""
        for sequence in sequences:
            self._ensure_sampler_state(sequence)
        tokens = self._sampler.sample(
            logits if rows == list(range(len(logits))) else logits[to_device(rows, logits.device)],
            [self._sampler_slots[sequence] for sequence in sequences],
            [sequence.num_sampled for sequence in sequences],
            None if masks is None else masks.rows(origins, logits.device),
        )
        copy = HostCopy(tokens)
        for sequence in sequences:
            sequence.num_pending += 1
        return Round(sequences, tokens, copy, errors)

    def _rows_to_sample(
        self, entries: list[ScheduledSequence], errors: dict[Sequence, EngineError]
    ) -> tuple[list[int], list[Sequence]]:
        """Logits rows and the sequences sampled from them. A prompt with several choices forks here: all of them
        sample their first token from the same row, and share the prompt's blocks. A request that cannot fork is
        noted in errors."""
        rows: list[int] = []
        sequences: list[Sequence] = []
        for row, entry in enumerate(entries):
            rows.append(row)
            sequences.append(entry.sequence)
            live = self._live[entry.sequence.request.request_id]
            if len(live.choices) < live.num_choices:
                children = [self._new_sequence(live, choice) for choice in range(1, live.num_choices)]
                try:
                    for child in children:
                        self._add_choice(live, child)
                except Exception as error:
                    for choice in live.choices[1:]:
                        self._constraints.release(choice.sequence)
                        del self._choice_of[choice.sequence]
                    del live.choices[1:]
                    errors[entry.sequence] = as_engine_error(error)
                    continue
                for child in self._scheduler.fork(entry.sequence, children):
                    rows.append(row)
                    sequences.append(child)
        return rows, sequences

    def _complete(self, sequence: Sequence, report: StepReport) -> None:
        """End a choice whose last token turns out, one step late, to have completed its grammar."""
        choice, request = self._choice_of[sequence], sequence.request
        output = TokenOutput(request.request_id, sequence.choice, text=choice.text.finish())
        output.finish_reason = FinishReason.EOS_TOKEN
        self._deliver(self._live[request.request_id], choice, output, report)

    def _score_prompts(
        self, inputs: BatchInputs, logits: torch.Tensor
    ) -> list[tuple[ScheduledSequence, HostCopy[PromptLogprobs]]]:
        scored = []
        row = len(inputs.sampled)
        for entry in inputs.prompt_scored:
            sequence = entry.sequence
            targets = sequence.request.prompt_token_ids[entry.start + 1 : entry.start + entry.num_tokens + 1]
            if targets:
                scores = prompt_logprobs(
                    logits[row : row + len(targets)],
                    to_device(targets, logits.device),
                    sequence.request.output.top_n_tokens,
                )
                scored.append((entry, HostCopy(scores)))
            row += entry.num_tokens
        return scored

    def _collect(self, launched: Launched, report: StepReport) -> None:
        """Read the step back: append tokens, verify guesses, check stops, free what ended, say what is new."""
        metrics = report.metrics
        assert metrics is not None
        for entry, scores in launched.scored:
            if entry.sequence in self._choice_of:  # else it has ended since the step was launched
                self._note_prompt_scores(entry, scores.read())
        if not metrics.forward_s:  # not a later half of a step that failed as a whole
            metrics.prepare_s = launched.prepare_s
        sampled, outputs = launched.first, dict[Sequence, TokenOutput]()
        token_ids = [] if sampled is None else sampled.copy.read().token_ids.tolist()
        report.time_s = now_s = time.monotonic()
        metrics.forward_s += now_s - launched.launched_s
        while sampled is not None:
            outputs = self._take_tokens(sampled, token_ids, outputs, launched, report)
            sampled = self._sample_behind_guesses(launched, outputs)
            token_ids = [] if sampled is None else sampled.copy.read().token_ids.tolist()
        if launched.first is not None:
            metrics.decode_s += time.monotonic() - now_s

    def _take_tokens(
        self,
        sampled: Round,
        token_ids: list[int],
        outputs: dict[Sequence, TokenOutput],
        launched: Launched,
        report: StepReport,
    ) -> dict[Sequence, TokenOutput]:
        """Append one round's tokens. Reports the outputs that are complete for this step, and returns the others.

        outputs: those of the same sequences that earlier rounds began.
        """
        now_s = report.time_s
        tokens = sampled.copy.read()
        exhausted = None if tokens.exhausted is None else tokens.exhausted.tolist()
        reader = ScoreReader(tokens)
        incomplete: dict[Sequence, TokenOutput] = {}
        for row, (sequence, token_id) in enumerate(zip(sampled.sequences, token_ids, strict=True)):
            sequence.num_pending -= 1
            sequence.ends_pending = False
            choice = self._choice_of.get(sequence)
            if choice is None:
                continue  # it ended with the step before, or its request failed a moment ago, by another choice
            error: EngineError | None = sampled.errors.get(sequence)
            if error is None and exhausted is not None and exhausted[row]:
                error = InvalidParameter("no token is left that bans, allowed tokens and grammar all permit")
            accepted = Accepted(error=error) if error else self._constraints.accept(sequence, token_id)
            if accepted.error is not None:
                self._fail(sequence.request.request_id, accepted.error, report)
                continue
            choice.sum_logprob += reader.logprob(row) or 0.0
            output = outputs.get(sequence) or TokenOutput(sequence.request.request_id, sequence.choice)
            self._append_token(choice, output, token_id, is_complete=accepted.is_complete)
            self._describe_token(choice, output, reader, row)
            if accepted.forced and output.finish_reason is None:
                error = self._append_forced(choice, output, accepted.forced)
                if error is not None:
                    self._fail(sequence.request.request_id, error, report)
                    continue
            if self._is_as_guessed(sequence, output, launched):
                incomplete[sequence] = output
                continue
            if sequence in launched.guesses:
                self._settle_guesses(choice, output, launched.guesses[sequence][1], report)
            live = self._live[sequence.request.request_id]
            self._time_tokens(live, choice, len(output.token_ids), now_s, report)
            is_first = sequence.num_output_tokens == len(output.token_ids)
            if sequence.choice == 0 and is_first and live.request.output.prompt_logprobs:
                output.prompt_details = self._prompt_details(live)
            self._deliver(live, choice, output, report)
        return incomplete

    # ---- guessed tokens ----------------------------------------------------------------------------------------

    def _guess(self) -> None:
        """Give the sequences that decode their guesses, for the scheduler to have verified as it sees fit."""
        if not self._speculator.is_on:
            return
        for sequence in self._scheduler.running:
            sequence.draft = ()
            if sequence.is_decoding and not sequence.is_held:
                # Behind the last guess one more token is sampled; more tokens than that are not wanted.
                left = self._live[sequence.request.request_id].max_new_tokens - sequence.num_output_tokens
                sequence.draft = self._speculator.guess(sequence, left - 1)

    def _is_as_guessed(self, sequence: Sequence, output: TokenOutput, launched: Launched) -> bool:
        """Whether another token can be sampled in this step: all of the step's tokens so far are the guessed ones, and
        the row behind the last of them has seen just these."""
        if sequence not in launched.guesses or output.finish_reason is not None:
            return False
        guessed = launched.guesses[sequence][1]
        is_equal = tuple(output.token_ids) == guessed[: len(output.token_ids)]
        return is_equal and self._constraints.has_mask(sequence)

    def _sample_behind_guesses(self, launched: Launched, outputs: dict[Sequence, TokenOutput]) -> Round | None:
        """The next token of the sequences that said what was guessed; None where there is no such sequence.

        Sampled one round after the other: penalties, grammars and randomness are then what they are without guesses.
        """
        sequences = [sequence for sequence in outputs if sequence in self._choice_of]
        if not sequences:
            return None
        rows = [launched.guesses[sequence][0] + len(outputs[sequence].token_ids) - 1 for sequence in sequences]
        masks = self._constraints.start_masks(sequences)
        errors: dict[Sequence, EngineError] = {} if masks is None else dict(masks.errors())
        return self._sample(launched.logits, rows, sequences, sequences, masks, errors)

    def _settle_guesses(
        self, choice: _Choice, output: TokenOutput, guessed: tuple[int, ...], report: StepReport
    ) -> None:
        """Keep the keys and values of the guesses that were right. Those of wrong ones lie behind the sequence's end,
        where the next step's are written over them."""
        assert report.metrics is not None
        pairs = zip(guessed, output.token_ids, strict=False)
        num_right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        # The last token is computed anew where no row behind it was sampled: a step needs one to go on from.
        num_kept = min(num_right, len(output.token_ids) - 1)
        self._scheduler.accept(choice.sequence, num_kept)
        self._speculator.note(choice.sequence, len(guessed), num_right)
        choice.num_guessed += len(guessed)
        choice.num_guessed_right += num_right
        report.metrics.num_guessed_tokens += len(guessed)
        report.metrics.num_guessed_right += num_right

    def _append_token(self, choice: _Choice, output: TokenOutput, token_id: int, *, is_complete: bool) -> None:
        """Append one token to its choice; the output gets its text, and a finish reason when it was the last.

        is_complete: the grammar allows nothing more (which outranks ignore_eos_token and min_new_tokens).
        """
        sequence, stopping = choice.sequence, choice.sequence.request.stopping
        sequence.token_ids.append(token_id)
        output.token_ids.append(token_id)
        ends_text = token_id in stopping.stop_token_ids or (
            token_id in self.info.eos_token_ids and (is_complete or not stopping.ignore_eos_token)
        )
        if ends_text:
            output.finish_reason = FinishReason.EOS_TOKEN
        else:
            delta = choice.text.push([token_id])
            output.text += delta.text
            choice.last_token_text = delta.token_texts[0] if delta.token_texts else ""
            if delta.stopped:
                output.finish_reason = FinishReason.STOP_SEQUENCE
            elif is_complete:
                output.finish_reason = FinishReason.EOS_TOKEN
            elif sequence.num_output_tokens >= self._live[sequence.request.request_id].max_new_tokens:
                output.finish_reason = FinishReason.LENGTH
        if output.finish_reason in (FinishReason.EOS_TOKEN, FinishReason.LENGTH):
            output.text += choice.text.finish()
        if ends_text:
            choice.last_token_text = self._detokenizer.token_text(token_id)

    def _append_forced(self, choice: _Choice, output: TokenOutput, forced: tuple[int, ...]) -> EngineError | None:
        """Append tokens that the grammar leaves no choice about; the next step computes them all at once."""
        for token_id in forced:
            accepted = self._constraints.accept_forced(choice.sequence, token_id)
            if accepted.error is not None:
                return accepted.error
            self._append_token(choice, output, token_id, is_complete=accepted.is_complete)
            if output.finish_reason is not None:
                break
        # The sampler has not seen these tokens: it is told of the sequence anew, with all of them.
        self._forget_sampler_state(choice.sequence)
        return None

    def _describe_token(self, choice: _Choice, output: TokenOutput, reader: ScoreReader, row: int) -> None:
        wanted = choice.sequence.request.output
        if wanted.token_details or wanted.logprobs or wanted.top_n_tokens:
            token_id = output.token_ids[-1]
            is_special = self._detokenizer.is_special(token_id)
            top = self._top_details(reader.top(row, wanted.top_n_tokens))
            output.details.append(TokenDetail(token_id, choice.last_token_text, reader.logprob(row), is_special, top))

    def _deliver(self, live: _LiveRequest, choice: _Choice, output: TokenOutput, report: StepReport) -> None:
        """Report the output, or hold it back for best_of; take the choice out when it was its last."""
        sequence = choice.sequence
        output.num_prompt_tokens = sequence.num_prompt_tokens
        output.num_cached_tokens = sequence.num_cached
        if output.finish_reason is not None:
            sequence.finish_reason = output.finish_reason
            live.num_finished += 1
            live.timings.finished_s = time.monotonic()
            output.timings = replace(live.timings)
            sampling = live.request.sampling
            output.seed = choice_seed(sampling.seed, sequence.choice) if sampling.do_sample else None
            output.warnings = self._warnings(live, sequence)
            output.num_guessed_tokens, output.num_guessed_right = choice.num_guessed, choice.num_guessed_right
            self._drop_sequence(sequence)
        if not live.ranks_choices:
            report.outputs.append(output)
        elif choice.held is None:
            choice.held = output
        else:
            choice.held.merge(output)
        if live.num_finished == live.num_choices:
            if live.ranks_choices:
                report.outputs += _ranked_outputs(live.choices)
            report.outputs[-1].is_last = True
            del self._live[live.request.request_id]

    def _warnings(self, live: _LiveRequest, sequence: Sequence) -> tuple[str, ...]:
        if live.grammar is None:
            return ()
        warnings = tuple(live.grammar.warnings)
        satisfied = self._constraints.is_satisfied(sequence)
        if not satisfied:
            assert sequence.finish_reason is not None
            perhaps = "perhaps " if satisfied is None else ""
            warnings += (f"the text ended ({sequence.finish_reason.value}) {perhaps}before its grammar was complete",)
        return warnings

    # ---- arrivals and departures -------------------------------------------------------------------------------

    def _take_arrivals(self, report: StepReport) -> None:
        with self._wake:
            arrivals, self._arrivals = self._arrivals, deque()
        for request in arrivals:
            live = _LiveRequest(request, Timings(request.arrival_s), max_new_tokens=0)
            self._live[request.request_id] = live
            try:
                self._admit(live)
            except Exception as error:  # whatever a request makes a library do, it is that request's end alone
                self._fail(request.request_id, as_engine_error(error), report)

    def _admit(self, live: _LiveRequest) -> None:
        request = live.request
        if request.adapter_command is not None:
            self._adapters.submit(request)
            return
        if request.adapter_id is not None:
            live.adapter = self._adapters.find(request.adapter_id)
        room = self.info.max_total_tokens - len(request.prompt_token_ids)
        if room < 1:
            # Whoever submitted it checked, but perhaps with the limits of an engine that had more memory and died.
            raise PromptTooLong(
                f"the prompt has {len(request.prompt_token_ids)} tokens; prompt and new tokens together may have "
                f"{self.info.max_total_tokens}"
            )
        wanted = request.stopping.max_new_tokens
        live.max_new_tokens = room if wanted is None else min(wanted, room)
        if request.bad_words:
            live.request = self._with_bad_word_ids(request)
        if request.grammar is not None:
            self._constraints.submit(request)
        else:
            self._scheduler.add(self._add_choice(live, self._new_sequence(live)))

    def _take_grammars(self, report: StepReport) -> None:
        """Queue the requests whose grammar is compiled; those whose grammar was refused end here."""
        assert report.metrics is not None
        for request_id, result, compile_s in self._constraints.take_ready():
            if compile_s is not None:
                report.metrics.grammar_compile_s.append(compile_s)
            live = self._live[request_id]
            if isinstance(result, EngineError):
                if live.request.grammar_check is not None and isinstance(result, (GrammarError, Unsupported)):
                    self._answer_check(request_id, GrammarVerdict(False, error=result.message), report)
                else:
                    self._fail(request_id, result, report)
                continue
            if live.request.grammar_check is not None:
                self._constraints.check(live.request, result)
                continue
            live.grammar = result
            live.timings.grammar_ready_s = time.monotonic()
            try:
                self._scheduler.add(self._add_choice(live, self._new_sequence(live)))
            except Exception as error:  # every matcher of the backend is in use, or the library failed
                self._fail(request_id, as_engine_error(error), report)

    def _take_checks(self, report: StepReport) -> None:
        """Answer the requests that only asked about their grammar, as far as the answers are known."""
        for request_id, result in self._constraints.take_checked():
            if isinstance(result, EngineError):
                self._fail(request_id, result, report)
            else:
                self._answer_check(request_id, result, report)

    def _answer_check(self, request_id: str, verdict: GrammarVerdict, report: StepReport) -> None:
        del self._live[request_id]
        report.outputs.append(TokenOutput(request_id, text=verdict.to_json(), is_last=True))

    def _serve_adapter_commands(self, report: StepReport) -> None:
        """Answer the requests about adapters that are carried out, or have failed."""
        self._adapters.free_unused(live.adapter for live in self._live.values())
        for request_id, error in self._adapters.take_done():
            if error is not None:
                self._fail(request_id, error, report)
                continue
            del self._live[request_id]
            text = self._adapters.describe(live.adapter for live in self._live.values())
            report.outputs.append(TokenOutput(request_id, text=text, is_last=True))
        if self._adapters.specs != self._reported_adapters:
            report.adapters = self._reported_adapters = self._adapters.specs

    def _with_bad_word_ids(self, request: GenerationRequest) -> GenerationRequest:
        """A word inside a text has other ids than one at its beginning: both forms are banned."""
        forms = [form for word in request.bad_words for form in (word, f" {word.lstrip()}")]
        ids = {tuple(self._tokenizer.encode(form, add_special_tokens=False)) for form in forms}
        words = (*request.sampling.bad_words, *sorted(word for word in ids if word))
        return replace(request, bad_words=(), sampling=replace(request.sampling, bad_words=words))

    def _take_cancellations(self, report: StepReport) -> None:
        with self._wake:
            cancellations, self._cancellations = self._cancellations, deque()
        for request_id in cancellations:
            self._fail(request_id, Cancelled("ended before it was complete"), report)

    def _expire(self, now_s: float, report: StepReport) -> None:
        expired = [
            live
            for live in self._live.values()
            if live.request.deadline_s is not None and live.request.deadline_s <= now_s
        ]
        for live in expired:
            request = live.request
            if request.stream and live.timings.first_token_s is not None:
                for choice in live.choices:
                    if choice.sequence.finish_reason is None:
                        output = TokenOutput(request.request_id, choice.sequence.choice, text=choice.text.finish())
                        output.finish_reason = FinishReason.TIMEOUT
                        self._deliver(live, choice, output, report)
            else:
                assert request.deadline_s is not None
                allowed_s = request.deadline_s - request.arrival_s
                self._fail(request.request_id, DeadlineExceeded(f"not complete within {allowed_s:.3g} seconds"), report)

    def _fail(self, request_id: str, error: EngineError, report: StepReport) -> None:
        """End a request with an error; does nothing when it has ended already."""
        live = self._live.pop(request_id, None)
        if live is None:
            return
        self._constraints.withdraw(request_id)
        self._adapters.withdraw(request_id)
        for choice in live.choices:
            if choice.sequence.status is not SequenceStatus.FINISHED:
                self._drop_sequence(choice.sequence)
        report.outputs.append(TokenOutput(request_id, error=error, timings=live.timings, is_last=True))

    def _new_sequence(self, live: _LiveRequest, choice: int = 0) -> Sequence:
        return Sequence(live.request, choice, adapter=live.adapter)

    def _add_choice(self, live: _LiveRequest, sequence: Sequence) -> Sequence:
        request = live.request
        text = self._detokenizer.stream(
            prompt_ids=request.prompt_token_ids, stopping=request.stopping, output=request.output
        )
        if live.grammar is not None:
            self._constraints.attach(sequence, live.grammar)
        choice = _Choice(sequence, text)
        live.choices.append(choice)
        self._choice_of[sequence] = choice
        return sequence

    def _drop_sequence(self, sequence: Sequence) -> None:
        self._speculator.forget(sequence)
        self._forget_sampler_state(sequence)
        self._constraints.release(sequence)
        self._scheduler.remove(sequence)
        del self._choice_of[sequence]

    def _announce_started(self, batch: ScheduledBatch) -> None:
        started = []
        for entry in batch.entries:
            live = self._live[entry.sequence.request.request_id]
            if not live.started:
                live.started = True
                live.timings.scheduled_s = entry.sequence.scheduled_s
                started.append(live.request.request_id)
        if started:
            self._emit(StepReport(started=started))

    # ---- sampler state -----------------------------------------------------------------------------------------

    def _ensure_sampler_state(self, sequence: Sequence) -> None:
        if sequence in self._sampler_slots:
            return
        assert sequence.slot is not None
        request, num_prompt = sequence.request, sequence.num_prompt_tokens
        suppressed: tuple[int, ...] = ()
        if request.stopping.min_new_tokens:
            suppressed = (*sorted(self.info.eos_token_ids), *request.stopping.stop_token_ids)
        self._sampler.add(
            sequence.slot,
            replace(request.sampling, seed=choice_seed(request.sampling.seed, sequence.choice)),
            choice=0,
            prompt_ids=request.prompt_token_ids,
            output_ids=sequence.token_ids[num_prompt:],
            suppressed_ids=suppressed,
            suppressed_until=request.stopping.min_new_tokens,
            want_logprobs=request.output.logprobs or request.output.token_details or request.best_of > request.n,
            top_n_tokens=request.output.top_n_tokens,
        )
        self._sampler_slots[sequence] = sequence.slot

    def _forget_sampler_state(self, sequence: Sequence) -> None:
        slot = self._sampler_slots.pop(sequence, None)
        if slot is not None:
            self._sampler.remove(slot)

    # ---- details and measurements ------------------------------------------------------------------------------

    def _note_prompt_scores(self, entry: ScheduledSequence, scores: PromptLogprobs) -> None:
        """Keep the scores of a chunk's prompt tokens; a chunk computed again after preemption adds nothing."""
        live = self._live[entry.sequence.request.request_id]
        prompt, wanted = live.request.prompt_token_ids, live.request.output.top_n_tokens
        if not live.prompt_details:
            live.prompt_details.append(self._token_detail(prompt[0], None))
        reader = ScoreReader(scores)
        for row in range(len(scores.logprobs)):
            position = entry.start + 1 + row
            if position == len(live.prompt_details):
                detail = self._token_detail(prompt[position], reader.logprob(row))
                detail.top = self._top_details(reader.top(row, wanted))
                live.prompt_details.append(detail)

    def _prompt_details(self, live: _LiveRequest) -> list[TokenDetail]:
        # A prompt of one token has nothing to score.
        return live.prompt_details or [self._token_detail(live.request.prompt_token_ids[0], None)]

    def _token_detail(self, token_id: int, logprob: float | None) -> TokenDetail:
        text = self._detokenizer.token_text(token_id)
        return TokenDetail(token_id, text, logprob, self._detokenizer.is_special(token_id))

    def _top_details(self, top: list[tuple[int, float]]) -> list[TokenDetail]:
        return [self._token_detail(token_id, logprob) for token_id, logprob in top]

    def _time_tokens(
        self, live: _LiveRequest, choice: _Choice, num_tokens: int, now_s: float, report: StepReport
    ) -> None:
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

    def _measure(self, batch: ScheduledBatch, report: StepReport, step_s: float) -> None:
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
        for live in self._live.values():
            if live.started:
                num_running += 1
                max_tokens += len(live.request.prompt_token_ids) + live.max_new_tokens * live.num_choices
        metrics.gauges = EngineGauges(
            num_running=num_running,
            num_waiting=len(self._live) - num_running,
            max_tokens=max_tokens,
            kv_cache_usage=self._blocks.usage,
        )


def choice_seed(seed: int | None, choice: int) -> int | None:
    """The seed of one of several choices: the request's own for the first, one derived from it for the others.

    It is reported with the choice, and a request for a single choice with that seed repeats it. (splitmix64's
    sequence, Steele et al. 2014.)
    """
    if seed is None or choice == 0:
        return seed
    mixed = (seed + choice * 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


def _ranked_outputs(choices: list[_Choice]) -> list[TokenOutput]:
    """best_of: the held outputs, best mean log-probability first, renumbered by rank (TGI's rule)."""
    ranked = sorted(
        choices, key=lambda choice: choice.sum_logprob / max(choice.sequence.num_output_tokens, 1), reverse=True
    )
    outputs = []
    for rank, choice in enumerate(ranked):
        assert choice.held is not None
        outputs.append(replace(choice.held, choice=rank))
    return outputs


def _derive_info(config: EngineConfig, loaded: LoadedModel, num_blocks: int) -> EngineInfo:
    """The limits of one request, from the options, the architecture and the KV cache. Raises ConfigError."""
    limits, num_cache_tokens = config.limits, num_blocks * config.cache.block_size
    max_total = limits.max_total_tokens
    if max_total is None:
        max_total = min(loaded.max_positions, num_cache_tokens)
        if limits.max_input_tokens is not None and limits.max_input_tokens >= max_total:
            raise ConfigError(
                f"MAX_INPUT_TOKENS ({limits.max_input_tokens}) must be less than the {max_total} tokens that the model "
                f"and the KV cache allow"
            )
    if max_total > loaded.max_positions:
        raise ConfigError(f"MAX_TOTAL_TOKENS ({max_total}) exceeds the model's {loaded.max_positions} positions")
    if max_total > num_cache_tokens:
        raise ConfigError(f"MAX_TOTAL_TOKENS ({max_total}) exceeds the KV cache of {num_cache_tokens} tokens")
    return EngineInfo(
        vocab_size=loaded.vocab_size,
        max_input_tokens=limits.max_input_tokens or max_total - 1,
        max_total_tokens=max_total,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        eos_token_ids=loaded.eos_token_ids,
    )
