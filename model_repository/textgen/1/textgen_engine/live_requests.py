"""The engine's live requests, from their arrival to their last output: who is let in, what is reported, what ends one.

A request that is admitted waits for its adapter or grammar, then its sequences are the scheduler's. Every request gets
outputs until exactly one last output (`TokenOutput.error`, or `finish_reason` on each of its choices, or the answer to
a `grammar_check` or an `adapter_command`), and what it held is free by then. Knows nothing of steps or tensors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from textgen_engine.adapters.spec import AdapterHandle
from textgen_engine.assembly import Rooms
from textgen_engine.constraints import as_engine_error
from textgen_engine.detokenizer import TextStream
from textgen_engine.errors import DeadlineExceeded, EngineError, GrammarError, PromptTooLong, Unsupported
from textgen_engine.grammar import CompiledGrammar
from textgen_engine.grammar.check import GrammarVerdict
from textgen_engine.messages import StepReport
from textgen_engine.request import FinishReason, GenerationRequest, Timings, TokenDetail, TokenOutput
from textgen_engine.sampler_states import SamplerStates, choice_seed
from textgen_engine.scheduler import ScheduledBatch
from textgen_engine.sequence import Sequence, SequenceStatus
from textgen_engine.speculation import Speculator


@dataclass(eq=False, slots=True)
class Choice:
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
class LiveRequest:
    """What the engine keeps per request. max_new_tokens: what was asked, as far as the limits leave room. choices: the
    first, and when its prompt is computed the others. grammar, adapter: once they are there."""

    request: GenerationRequest
    timings: Timings
    max_new_tokens: int
    choices: list[Choice] = field(default_factory=list)
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


class LiveRequests:
    """Called from the engine's loop thread alone. by_id: every live request; choice_of: every sequence that is not
    finished. Both are for others to read."""

    def __init__(self, rooms: Rooms, samplers: SamplerStates, speculator: Speculator) -> None:
        self._max_total_tokens = rooms.info.max_total_tokens
        self._tokenizer = rooms.tokenizer
        self._detokenizer = rooms.detokenizer
        self._adapters = rooms.adapters
        self._reported_adapters = rooms.adapters.specs
        self._constraints = rooms.constraints
        self._scheduler = rooms.scheduler
        self._samplers = samplers
        self._speculator = speculator
        self.by_id: dict[str, LiveRequest] = {}
        self.choice_of: dict[Sequence, Choice] = {}

    # ---- arrivals ----------------------------------------------------------------------------------------------------

    def admit(self, request: GenerationRequest, report: StepReport) -> None:
        """Take a request in; one that cannot be served ends here."""
        live = LiveRequest(request, Timings(request.arrival_s), max_new_tokens=0)
        self.by_id[request.request_id] = live
        try:
            self._admit(live)
        except Exception as error:  # whatever a request makes a library do, it is that request's end alone
            self.fail(request.request_id, as_engine_error(error), report)

    def _admit(self, live: LiveRequest) -> None:
        request = live.request
        if request.adapter_command is not None:
            self._adapters.submit(request)
            return
        if request.adapter_id is not None:
            live.adapter = self._adapters.find(request.adapter_id)
        room = self._max_total_tokens - len(request.prompt_token_ids)
        if room < 1:
            # Whoever submitted it checked, but perhaps with the limits of an engine that had more memory and died.
            raise PromptTooLong(
                f"the prompt has {len(request.prompt_token_ids)} tokens; prompt and new tokens together may have "
                f"{self._max_total_tokens}"
            )
        wanted = request.stopping.max_new_tokens
        live.max_new_tokens = room if wanted is None else min(wanted, room)
        if request.bad_words:
            live.request = self._with_bad_word_ids(request)
        if request.grammar is not None:
            self._constraints.submit(request)
        else:
            self._scheduler.add(self._add_choice(live, self._new_sequence(live)))

    def _with_bad_word_ids(self, request: GenerationRequest) -> GenerationRequest:
        """A word inside a text has other ids than one at its beginning: both forms are banned."""
        forms = [form for word in request.bad_words for form in (word, f" {word.lstrip()}")]
        ids = {tuple(self._tokenizer.encode(form, add_special_tokens=False)) for form in forms}
        words = (*request.sampling.bad_words, *sorted(word for word in ids if word))
        return replace(request, bad_words=(), sampling=replace(request.sampling, bad_words=words))

    def take_grammars(self, report: StepReport) -> None:
        """Queue the requests whose grammar is compiled; those whose grammar was refused end here."""
        assert report.metrics is not None
        for request_id, result, compile_s in self._constraints.take_ready():
            if compile_s is not None:
                report.metrics.grammar_compile_s.append(compile_s)
            live = self.by_id[request_id]
            if isinstance(result, EngineError):
                if live.request.grammar_check is not None and isinstance(result, (GrammarError, Unsupported)):
                    self._answer_check(request_id, GrammarVerdict(False, error=result.message), report)
                else:
                    self.fail(request_id, result, report)
                continue
            if live.request.grammar_check is not None:
                self._constraints.check(live.request, result)
                continue
            live.grammar = result
            live.timings.grammar_ready_s = time.monotonic()
            try:
                self._scheduler.add(self._add_choice(live, self._new_sequence(live)))
            except Exception as error:  # every matcher of the backend is in use, or the library failed
                self.fail(request_id, as_engine_error(error), report)

    def take_checks(self, report: StepReport) -> None:
        """Answer the requests that only asked about their grammar, as far as the answers are known."""
        for request_id, result in self._constraints.take_checked():
            if isinstance(result, EngineError):
                self.fail(request_id, result, report)
            else:
                self._answer_check(request_id, result, report)

    def _answer_check(self, request_id: str, verdict: GrammarVerdict, report: StepReport) -> None:
        del self.by_id[request_id]
        report.outputs.append(TokenOutput(request_id, text=verdict.to_json(), is_last=True))

    def serve_adapter_commands(self, report: StepReport) -> None:
        """Answer the requests about adapters that are carried out, or have failed."""
        self.free_adapters()
        for request_id, error in self._adapters.take_done():
            if error is not None:
                self.fail(request_id, error, report)
                continue
            del self.by_id[request_id]
            text = self._adapters.describe(live.adapter for live in self.by_id.values())
            report.outputs.append(TokenOutput(request_id, text=text, is_last=True))
        if self._adapters.specs != self._reported_adapters:
            report.adapters = self._reported_adapters = self._adapters.specs

    def free_adapters(self) -> None:
        """Let go of the unloaded adapters that no live request uses any more."""
        self._adapters.free_unused(live.adapter for live in self.by_id.values())

    # ---- choices -----------------------------------------------------------------------------------------------------

    def start(self, batch: ScheduledBatch) -> list[str]:
        """Note which requests run for the first time, and return their ids."""
        started = []
        for entry in batch.entries:
            live = self.by_id[entry.sequence.request.request_id]
            if not live.started:
                live.started = True
                live.timings.scheduled_s = entry.sequence.scheduled_s
                started.append(live.request.request_id)
        return started

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """The other choices of a request whose prompt is computed, which go on from it and share its blocks; none where
        they are there already. Where one cannot be had, raises what the grammar raised, and adds none."""
        live = self.by_id[sequence.request.request_id]
        if len(live.choices) == live.num_choices:
            return []
        children = [self._new_sequence(live, choice) for choice in range(1, live.num_choices)]
        try:
            for child in children:
                self._add_choice(live, child)
        except Exception:
            for choice in live.choices[1:]:
                self._constraints.release(choice.sequence)
                del self.choice_of[choice.sequence]
            del live.choices[1:]
            raise
        return children

    def _new_sequence(self, live: LiveRequest, choice: int = 0) -> Sequence:
        return Sequence(live.request, choice, adapter=live.adapter)

    def _add_choice(self, live: LiveRequest, sequence: Sequence) -> Sequence:
        request = live.request
        text = self._detokenizer.stream(
            prompt_ids=request.prompt_token_ids, stopping=request.stopping, output=request.output
        )
        if live.grammar is not None:
            self._constraints.attach(sequence, live.grammar)
        choice = Choice(sequence, text)
        live.choices.append(choice)
        self.choice_of[sequence] = choice
        return sequence

    # ---- outputs and ends --------------------------------------------------------------------------------------------

    def deliver(self, live: LiveRequest, choice: Choice, output: TokenOutput, report: StepReport) -> None:
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
            del self.by_id[live.request.request_id]

    def _warnings(self, live: LiveRequest, sequence: Sequence) -> tuple[str, ...]:
        if live.grammar is None:
            return ()
        warnings = tuple(live.grammar.warnings)
        satisfied = self._constraints.is_satisfied(sequence)
        if not satisfied:
            assert sequence.finish_reason is not None
            perhaps = "perhaps " if satisfied is None else ""
            warnings += (f"the text ended ({sequence.finish_reason.value}) {perhaps}before its grammar was complete",)
        return warnings

    def complete(self, sequence: Sequence, report: StepReport) -> None:
        """End a choice whose last token turns out, one step late, to have completed its grammar."""
        choice, request = self.choice_of[sequence], sequence.request
        output = TokenOutput(request.request_id, sequence.choice, text=choice.text.finish())
        output.finish_reason = FinishReason.EOS_TOKEN
        self.deliver(self.by_id[request.request_id], choice, output, report)

    def expire(self, now_s: float, report: StepReport) -> None:
        """End the requests whose deadline is over: a stream with what it has, another with DeadlineExceeded."""
        expired = [
            live
            for live in self.by_id.values()
            if live.request.deadline_s is not None and live.request.deadline_s <= now_s
        ]
        for live in expired:
            request = live.request
            if request.stream and live.timings.first_token_s is not None:
                for choice in live.choices:
                    if choice.sequence.finish_reason is None:
                        output = TokenOutput(request.request_id, choice.sequence.choice, text=choice.text.finish())
                        output.finish_reason = FinishReason.TIMEOUT
                        self.deliver(live, choice, output, report)
            else:
                assert request.deadline_s is not None
                allowed_s = request.deadline_s - request.arrival_s
                self.fail(request.request_id, DeadlineExceeded(f"not complete within {allowed_s:.3g} seconds"), report)

    def fail(self, request_id: str, error: EngineError, report: StepReport) -> None:
        """End a request with an error; does nothing when it has ended already."""
        live = self.by_id.pop(request_id, None)
        if live is None:
            return
        self._constraints.withdraw(request_id)
        self._adapters.withdraw(request_id)
        for choice in live.choices:
            if choice.sequence.status is not SequenceStatus.FINISHED:
                self._drop_sequence(choice.sequence)
        report.outputs.append(TokenOutput(request_id, error=error, timings=live.timings, is_last=True))

    def _drop_sequence(self, sequence: Sequence) -> None:
        self._speculator.forget(sequence)
        self._samplers.forget(sequence)
        self._constraints.release(sequence)
        self._scheduler.remove(sequence)
        del self.choice_of[sequence]


def _ranked_outputs(choices: list[Choice]) -> list[TokenOutput]:
    """best_of: the held outputs, best mean log-probability first, renumbered by rank (TGI's rule)."""
    ranked = sorted(
        choices, key=lambda choice: choice.sum_logprob / max(choice.sequence.num_output_tokens, 1), reverse=True
    )
    outputs = []
    for rank, choice in enumerate(ranked):
        assert choice.held is not None
        outputs.append(replace(choice.held, choice=rank))
    return outputs
