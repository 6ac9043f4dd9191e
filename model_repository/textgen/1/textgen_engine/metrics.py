"""What the engine counts and measures, as plain records; the adapter publishes them on Triton's metrics port."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineGauges:
    """The state after one step. num_waiting counts requests that hold nothing yet; kv_cache_usage is 0 to 1.

    max_tokens: prompt and most new tokens of the running requests, all choices.
    """

    num_running: int = 0
    num_waiting: int = 0
    max_tokens: int = 0
    kv_cache_usage: float = 0.0


@dataclass(slots=True)
class StepMetrics:
    """What one step adds: counts, and observations in seconds.

    inter_token_s: one gap per sampled token that was not its choice's first. batch_size: sequences in the step.
    num_forced_tokens: of the generated tokens, those that a grammar left no choice about and that were appended without
    a forward pass of their own (jump-forward). num_guessed_tokens, num_guessed_right: tokens guessed ahead and
    verified, and those of them that came true. skipped_tokens: what a choice got beyond its first token, where it did.

    Of the step itself: is_prefill: it computed tokens of a prompt. num_started: requests in their first step.
    joined_because: why they could join others that ran already (values of the metric tgi_batch_concat), None where none
    did. prepare_s: from the step's begin to its launch; forward_s: from there until the tokens were read back;
    decode_s: what was done with them.
    """

    num_prefill_tokens: int = 0
    num_generated_tokens: int = 0
    num_forced_tokens: int = 0
    num_guessed_tokens: int = 0
    num_guessed_right: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    batch_size: int = 0
    is_prefill: bool = False
    num_started: int = 0
    joined_because: str | None = None
    has_failed: bool = False
    step_s: float = 0.0
    prepare_s: float = 0.0
    forward_s: float = 0.0
    decode_s: float = 0.0
    skipped_tokens: list[int] = field(default_factory=list)
    time_to_first_token_s: list[float] = field(default_factory=list)
    inter_token_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    grammar_compile_s: list[float] = field(default_factory=list)
    gauges: EngineGauges = field(default_factory=EngineGauges)
