"""What a client asked (`GenerationRequest`, frozen) and what the engine answers per step (`TokenOutput`).

These records cross the process boundary, so they hold plain Python values only. Neither knows tensors or Triton.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from textgen_engine.adapters.spec import AdapterCommand
from textgen_engine.errors import EngineError
from textgen_engine.grammar.base import GrammarSpec
from textgen_engine.sampling.params import SamplingParams


class FinishReason(str, Enum):
    """Why a choice ended. The first three are TGI's names; TIMEOUT is ours (a stream past its deadline)."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a choice ends. All lengths are tokens.

    max_new_tokens: None means "as many as max_total_tokens leaves".
    stop: strings; the text ends before the first of them (after it, when include_stop_str_in_output).
    stop_token_ids: extra ids that end the text as an end-of-sequence token does.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos_token: bool = False
    include_stop_str_in_output: bool = False


@dataclass(frozen=True, slots=True)
class OutputParams:
    """What to report beside the text.

    logprobs: report the log-probability of each chosen token; top_n_tokens: and of the n most likely ones.
    prompt_logprobs: report the log-probability of each prompt token (TGI's decoder_input_details).
    token_details: report each token with its own text (TGI's details.tokens).
    """

    logprobs: bool = False
    top_n_tokens: int = 0
    prompt_logprobs: bool = False
    token_details: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class GrammarCheck:
    """Say whether the request's grammar is supported, and whether `text` obeys it (None: no text to check)."""

    text: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One validated request, as the engine receives it.

    request_id: unique within the server's life (the client's own id is the adapter's business).
    arrival_s, deadline_s: `time.monotonic()` seconds, which Linux shares between processes.
    bad_words: strings that must not come up; the engine adds their ids to those of sampling.bad_words.
    priority: larger is sooner; 0 is the default.
    grammar: what every choice's text must obey; None leaves it free.
    grammar_check: nothing is generated, and the prompt is empty: the one output's text is the JSON of a GrammarVerdict.
    adapter_id: the LoRA adapter to generate with; None: the model as it is.
    adapter_command: nothing is generated, and the prompt is empty: the one output's text is the JSON of the adapters.
    n: number of choices that share one prefill. best_of: candidates generated, of which the best `n` are reported.
    stream: past its deadline a streaming request ends with what it has, another fails.
    cache_salt: part of every prefix-cache key; requests with different salts never share blocks.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    output: OutputParams = field(default_factory=OutputParams)
    n: int = 1
    best_of: int = 1
    bad_words: tuple[str, ...] = ()
    grammar: GrammarSpec | None = None
    grammar_check: GrammarCheck | None = None
    adapter_id: str | None = None
    adapter_command: AdapterCommand | None = None
    stream: bool = False
    priority: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None
    cache_salt: str = ""


@dataclass(slots=True)
class TokenDetail:
    """One generated (or prompt) token as `details` reports it; logprob None where none was asked or none exists."""

    id: int
    text: str
    logprob: float | None
    special: bool
    top: list[TokenDetail] = field(default_factory=list)


@dataclass(slots=True)
class Timings:
    """Seconds of `time.monotonic()` at which a request reached each stage; None where it never did.

    grammar_ready_s: when its grammar was compiled, or found compiled.
    """

    arrival_s: float
    grammar_ready_s: float | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True)
class TokenOutput:
    """What one step adds to one choice of one request.

    text: the new text that is safe to show (no half character, nothing that may become a stop string).
    token_ids: the new tokens; text of theirs may arrive in a later output.
    details: one entry per new token when the request asked for token details or logprobs.
    prompt_details: on the first output only, when the request asked for them.
    finish_reason: set on the last output of the choice. seed: set on the last output when the choice was sampled.
    num_guessed_tokens, num_guessed_right: on the last output of the choice, tokens guessed ahead (SPECULATE), and how
    many of them came true.
    warnings: on the last output of the choice, what the client should know (say, a grammar cut short).
    error: set instead of text when the request failed (timings: as far as it came).
    is_last: no output of this request follows, of any choice.
    """

    request_id: str
    choice: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    details: list[TokenDetail] = field(default_factory=list)
    prompt_details: list[TokenDetail] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    seed: int | None = None
    num_guessed_tokens: int = 0
    num_guessed_right: int = 0
    warnings: tuple[str, ...] = ()
    timings: Timings | None = None
    error: EngineError | None = None
    is_last: bool = False

    def merge(self, later: TokenOutput) -> None:
        """Append the next output of the same choice, so that both travel as one response."""
        assert (self.request_id, self.choice) == (later.request_id, later.choice) and self.finish_reason is None
        self.text += later.text
        self.token_ids += later.token_ids
        self.details += later.details
        if later.prompt_details is not None:
            self.prompt_details = later.prompt_details
        self.num_prompt_tokens = later.num_prompt_tokens
        self.num_cached_tokens = later.num_cached_tokens
        self.finish_reason = later.finish_reason
        self.seed = later.seed
        self.num_guessed_tokens = later.num_guessed_tokens
        self.num_guessed_right = later.num_guessed_right
        self.warnings = later.warnings
        self.timings = later.timings
        self.error = later.error
        self.is_last = later.is_last
