"""Which sequences the sampler keeps state for: it is told of each before its first token, and again after a change.

The sampler knows slots, not sequences; a slot's state (history, penalties, randomness) is made from its sequence here.
"""

from __future__ import annotations

from dataclasses import replace

from textgen_engine.sampling.sampler import Sampler
from textgen_engine.sequence import Sequence


class SamplerStates:
    """Called from the engine's loop thread alone."""

    def __init__(self, sampler: Sampler, eos_token_ids: frozenset[int]) -> None:
        self._sampler = sampler
        self._eos_token_ids = eos_token_ids
        self._slots: dict[Sequence, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, sequence: Sequence) -> int:
        """Where the state of a sequence is, which the sampler has been told of."""
        return self._slots[sequence]

    def ensure(self, sequence: Sequence) -> None:
        """Tell the sampler of the sequence and all its tokens, unless it knows it."""
        if sequence in self._slots:
            return
        assert sequence.slot is not None
        request, num_prompt = sequence.request, sequence.num_prompt_tokens
        suppressed: tuple[int, ...] = ()
        if request.stopping.min_new_tokens:
            suppressed = (*sorted(self._eos_token_ids), *request.stopping.stop_token_ids)
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
        self._slots[sequence] = sequence.slot

    def forget(self, sequence: Sequence) -> None:
        """Free what the sampler keeps of the sequence; before it is sampled again, the sampler is told of it anew."""
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._sampler.remove(slot)


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
