"""What the engine tells whoever runs it: the facts of the loaded model, and one report per step."""

from __future__ import annotations

from dataclasses import dataclass, field

from textgen_engine.adapters.spec import AdapterSpec
from textgen_engine.metrics import StepMetrics
from textgen_engine.request import TokenOutput


@dataclass(frozen=True)
class EngineInfo:
    """Facts of the loaded model that requests are validated against. Lengths in tokens."""

    vocab_size: int
    max_input_tokens: int
    max_total_tokens: int
    num_blocks: int
    block_size: int
    eos_token_ids: frozenset[int]


@dataclass(slots=True)
class StepReport:
    """What one turn of the engine's loop tells the outside.

    started: requests that hold blocks from now on (said before the step that first touches them runs, so that after a
    crash they can be told from those that had no part in it). outputs: at most one per choice. time_s: when the step's
    tokens were there (before that: when it began), in seconds of `time.monotonic()`.
    adapters: all that are loaded, where that has changed; an engine in this one's place loads them.
    """

    started: list[str] = field(default_factory=list)
    outputs: list[TokenOutput] = field(default_factory=list)
    metrics: StepMetrics | None = None
    time_s: float = 0.0
    adapters: tuple[AdapterSpec, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineEnd:
    """The engine's last words: why its process is about to end, to be read after "the engine "."""

    reason: str
