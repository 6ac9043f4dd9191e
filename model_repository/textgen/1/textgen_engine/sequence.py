"""`Sequence`: the one mutable record of a running choice.

Who writes what: the scheduler writes status, slot and counts; the BlockManager writes the block table and hashes; the
engine appends tokens and sets the finish reason. Everyone else reads. No tensors here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from textgen_engine.adapters.spec import AdapterHandle
from textgen_engine.request import FinishReason, GenerationRequest


class SequenceStatus(Enum):
    """WAITING holds nothing; RUNNING holds a slot and blocks; FINISHED holds nothing, for good."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of one request, from arrival to its last token.

    token_ids is prompt followed by output. The first `num_computed` of them have their keys and values in the cache:

        token_ids  |---- prompt ----|---- output ----|
        computed   |=====================>           |   num_computed <= len(token_ids)

    Behind them come `num_pending` tokens that a launched step has sampled but the host has not read yet; the device
    has them, so the next step can compute them.

    A sequence can be sampled when the step computes its last known token. Preemption sets num_computed back to 0 and
    gives the blocks away; the tokens stay, so the sequence continues as if nothing had happened.
    """

    request: GenerationRequest
    choice: int = 0
    token_ids: list[int] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed: int = 0
    num_pending: int = 0  # (written by the engine)
    ends_pending: bool = False  # the pending token is the last there will be (written by the engine)
    num_cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the leading full blocks of token_ids
    num_released_blocks: int = 0  # leading entries of the block table that are not owned any more
    num_registered_blocks: int = 0  # leading blocks already offered to the prefix cache
    is_held: bool = False  # not to be scheduled: its next mask is still being made (written by constraints.py)
    adapter: AdapterHandle | None = None  # None: the model as it is
    draft: tuple[int, ...] = ()  # guessed next tokens, to be verified by the next step (written by the engine)
    slot: int | None = None  # row of the sampler's per-sequence state; None unless RUNNING
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    scheduled_s: float | None = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.request.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_sampled(self) -> int:
        """Output tokens, pending ones included."""
        return self.num_output_tokens + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens the next steps must run through the model before a new one can be sampled."""
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """True when one token is left to compute and it is an output token."""
        return self.num_uncomputed == 1 and self.num_sampled > 0

    @property
    def may_run(self) -> bool:
        """False while the next step has to do without it."""
        return not (self.is_held or self.ends_pending)
