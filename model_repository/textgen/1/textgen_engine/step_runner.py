"""One step of the engine: launched onto the device, and read back into its sequences.

`launch` and `collect` are separate, so that a step can be launched before the last one is read. Tokens become part of
their sequences here and nowhere else. Which step comes when, and what becomes of one that fails, is the engine's
business.
"""

from __future__ import annotations

import itertools
import time

import torch

from textgen_engine.assembly import Rooms
from textgen_engine.batch import BatchInputs, PendingTokens, build_inputs
from textgen_engine.constraints import Accepted, PendingMasks, as_engine_error
from textgen_engine.errors import EngineError, InvalidParameter
from textgen_engine.launched import Launched, Round, ScoreReader
from textgen_engine.live_requests import Choice, LiveRequests
from textgen_engine.messages import StepReport
from textgen_engine.request import FinishReason, TokenOutput
from textgen_engine.sampler_states import SamplerStates
from textgen_engine.sampling.sampler import PromptLogprobs, prompt_logprobs
from textgen_engine.scheduler import ScheduledBatch, ScheduledSequence
from textgen_engine.sequence import Sequence
from textgen_engine.speculation import Speculator
from textgen_engine.step_meter import StepMeter
from textgen_engine.token_details import TokenDetails
from textgen_engine.transfer import HostCopy, to_device


class StepRunner:
    """Called from the engine's loop thread alone."""

    def __init__(
        self, rooms: Rooms, requests: LiveRequests, samplers: SamplerStates, speculator: Speculator, meter: StepMeter
    ) -> None:
        self._eos_token_ids = rooms.info.eos_token_ids
        self._constraints = rooms.constraints
        self._detokenizer = rooms.detokenizer
        self._details = TokenDetails(rooms.detokenizer)
        self._runner = rooms.runner
        self._sampler = rooms.sampler
        self._scheduler = rooms.scheduler
        self._requests = requests
        self._samplers = samplers
        self._speculator = speculator
        self._meter = meter

    # ---- onto the device ---------------------------------------------------------------------------------------------

    def launch(self, batch: ScheduledBatch, pending: PendingTokens | None, begun_s: float) -> Launched:
        """Put the step on the device: forward pass, then sampling. Reads nothing back.

        pending: tokens of the step in flight, which are on the device alone. begun_s: when the turn of the loop began.
        """
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
        scored, prepare_s = self._score_prompts(inputs, logits), launched_s - begun_s
        return Launched(batch, first, scored, launched_s, prepare_s, logits, guesses)

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
            try:
                children = self._requests.fork(entry.sequence)
            except Exception as error:
                errors[entry.sequence] = as_engine_error(error)
                continue
            if children:
                for child in self._scheduler.fork(entry.sequence, children):
                    rows.append(row)
                    sequences.append(child)
        return rows, sequences

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
            self._samplers.ensure(sequence)
        tokens = self._sampler.sample(
            logits if rows == list(range(len(logits))) else logits[to_device(rows, logits.device)],
            [self._samplers.slot(sequence) for sequence in sequences],
            [sequence.num_sampled for sequence in sequences],
            None if masks is None else masks.rows(origins, logits.device),
        )
        copy = HostCopy(tokens)
        for sequence in sequences:
            sequence.num_pending += 1
        return Round(sequences, tokens, copy, errors)

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

    # ---- back from it ------------------------------------------------------------------------------------------------

    def collect(self, launched: Launched, report: StepReport) -> None:
        """Read the step back: append tokens, verify guesses, check stops, free what ended, say what is new."""
        metrics = report.metrics
        assert metrics is not None
        for entry, scores in launched.scored:
            if entry.sequence in self._requests.choice_of:  # else it has ended since the step was launched
                live = self._requests.by_id[entry.sequence.request.request_id]
                self._details.note_prompt(live, entry, scores.read())
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
            choice = self._requests.choice_of.get(sequence)
            if choice is None:
                continue  # it ended with the step before, or its request failed a moment ago, by another choice
            error: EngineError | None = sampled.errors.get(sequence)
            if error is None and exhausted is not None and exhausted[row]:
                error = InvalidParameter("no token is left that bans, allowed tokens and grammar all permit")
            accepted = Accepted(error=error) if error else self._constraints.accept(sequence, token_id)
            if accepted.error is not None:
                self._requests.fail(sequence.request.request_id, accepted.error, report)
                continue
            choice.sum_logprob += reader.logprob(row) or 0.0
            output = outputs.get(sequence) or TokenOutput(sequence.request.request_id, sequence.choice)
            self._append_token(choice, output, token_id, is_complete=accepted.is_complete)
            self._details.describe(choice, output, reader, row)
            if accepted.forced and output.finish_reason is None:
                error = self._append_forced(choice, output, accepted.forced)
                if error is not None:
                    self._requests.fail(sequence.request.request_id, error, report)
                    continue
            if self._is_as_guessed(sequence, output, launched):
                incomplete[sequence] = output
                continue
            if sequence in launched.guesses:
                self._settle_guesses(choice, output, launched.guesses[sequence][1], report)
            live = self._requests.by_id[sequence.request.request_id]
            self._meter.time_tokens(live, choice, len(output.token_ids), now_s, report)
            is_first = sequence.num_output_tokens == len(output.token_ids)
            if sequence.choice == 0 and is_first and live.request.output.prompt_logprobs:
                output.prompt_details = self._details.of_prompt(live)
            self._requests.deliver(live, choice, output, report)
        return incomplete

    def _append_token(self, choice: Choice, output: TokenOutput, token_id: int, *, is_complete: bool) -> None:
        """Append one token to its choice; the output gets its text, and a finish reason when it was the last.

        is_complete: the grammar allows nothing more (which outranks ignore_eos_token and min_new_tokens).
        """
        sequence, stopping = choice.sequence, choice.sequence.request.stopping
        sequence.token_ids.append(token_id)
        output.token_ids.append(token_id)
        ends_text = token_id in stopping.stop_token_ids or (
            token_id in self._eos_token_ids and (is_complete or not stopping.ignore_eos_token)
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
            elif sequence.num_output_tokens >= self._requests.by_id[sequence.request.request_id].max_new_tokens:
                output.finish_reason = FinishReason.LENGTH
        if output.finish_reason in (FinishReason.EOS_TOKEN, FinishReason.LENGTH):
            output.text += choice.text.finish()
        if ends_text:
            choice.last_token_text = self._detokenizer.token_text(token_id)

    def _append_forced(self, choice: Choice, output: TokenOutput, forced: tuple[int, ...]) -> EngineError | None:
        """Append tokens that the grammar leaves no choice about; the next step computes them all at once."""
        for token_id in forced:
            accepted = self._constraints.accept_forced(choice.sequence, token_id)
            if accepted.error is not None:
                return accepted.error
            self._append_token(choice, output, token_id, is_complete=accepted.is_complete)
            if output.finish_reason is not None:
                break
        # The sampler has not seen these tokens: it is told of the sequence anew, with all of them.
        self._samplers.forget(choice.sequence)
        return None

    # ---- guessed tokens ----------------------------------------------------------------------------------------------

    def guess(self) -> None:
        """Give the sequences that decode their guesses, for the scheduler to have verified as it sees fit."""
        if not self._speculator.is_on:
            return
        for sequence in self._scheduler.running:
            sequence.draft = ()
            if sequence.is_decoding and not sequence.is_held:
                # Behind the last guess one more token is sampled; more tokens than that are not wanted.
                left = self._requests.by_id[sequence.request.request_id].max_new_tokens - sequence.num_output_tokens
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
        sequences = [sequence for sequence in outputs if sequence in self._requests.choice_of]
        if not sequences:
            return None
        rows = [launched.guesses[sequence][0] + len(outputs[sequence].token_ids) - 1 for sequence in sequences]
        masks = self._constraints.start_masks(sequences)
        errors: dict[Sequence, EngineError] = {} if masks is None else dict(masks.errors())
        return self._sample(launched.logits, rows, sequences, sequences, masks, errors)

    def _settle_guesses(
        self, choice: Choice, output: TokenOutput, guessed: tuple[int, ...], report: StepReport
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
