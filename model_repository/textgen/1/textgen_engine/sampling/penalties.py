"""Everything that changes logits before they are filtered: bias, bans, watermark, penalties; and its state per slot.

Owns what must be remembered about a sequence to do so: which ids it has seen, how often it produced each, its last
few tokens. Knows no temperature, no randomness and no grammar.

Order, each step on the result of the one before:

1. logit_bias, allowed_token_ids, bad_words and suppressed ids. First, because OpenAI adds a bias to what the model
   said; TGI has none of these.
2. watermark, repetition_penalty, frequency_penalty and presence_penalty: TGI's order.

What is forbidden is -inf and stays -inf through every later step.

Where a plain torch function would select by booleans (`where`, `masked_fill_`), arithmetic or bit operations do the
same here: torch vectorizes those on a CPU, and they are thirty times faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgen_engine.sampling import randomness
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.rows import RowSet, SlotRows, valid_ids
from textgen_engine.sampling.watermark import green_threshold
from textgen_engine.transfer import to_device

_ALWAYS = np.iinfo(np.int64).max
_NO_TOKEN = -1  # in a tail: before the first token of the sequence
_ANY_TOKEN = -2  # in a phrase: this place may hold anything


@dataclass(frozen=True, slots=True)
class _SlotOptions:
    """What one slot asked for, in the form the plan needs. Ids outside the vocabulary are already dropped.

    addition_ids, addition_values, addition_ends: [n], what to add to which logit, and the position from which that no
    longer holds. phrases: bad words of two or more ids.
    """

    params: SamplingParams
    addition_ids: NDArray[np.int64]
    addition_values: NDArray[np.float32]
    addition_ends: NDArray[np.int64]
    phrases: tuple[tuple[int, ...], ...]

    @property
    def penalizes_repetition(self) -> bool:
        return self.params.repetition_penalty != 1.0

    @property
    def counts_output(self) -> bool:
        return self.params.frequency_penalty != 0.0 or self.params.presence_penalty != 0.0

    @property
    def tail_length(self) -> int:
        return max([int(self.params.watermark), *(len(phrase) - 1 for phrase in self.phrases)])

    @property
    def restricts(self) -> bool:
        return self.params.allowed_token_ids is not None

    @property
    def edits(self) -> bool:
        """Whether any step of this file concerns the slot."""
        return bool(
            len(self.addition_ids)
            or self.restricts
            or self.tail_length
            or self.penalizes_repetition
            or self.counts_output
        )


@dataclass(frozen=True, slots=True)
class _Additions:
    """Sparse additions to logits, all rows together. rows, ids: [n] int64; values: [n] float32.

    end_positions and row_numbers are host copies, by which `values_at` drops what no longer holds.
    """

    rows: Tensor
    ids: Tensor
    values: Tensor
    row_numbers: NDArray[np.int64]
    end_positions: NDArray[np.int64]
    last_end: int

    def values_at(self, positions: NDArray[np.int64]) -> Tensor:
        """The additions that hold at these positions [num_rows]; the others are zero."""
        if self.last_end <= 0 or positions.size == 0:
            return self.values
        ended = positions[self.row_numbers] >= self.end_positions
        if not ended.any():
            return self.values
        return self.values.masked_fill(to_device(torch.from_numpy(ended), self.values.device), 0.0)


@dataclass(frozen=True, slots=True)
class _Phrases:
    """Bad words of several ids. rows, last_ids: [n] int64; state: [n] rows of the tails; prefixes: [n, width] int64."""

    rows: Tensor
    state: Tensor
    prefixes: Tensor
    last_ids: Tensor


@dataclass(frozen=True, slots=True)
class _Repetition:
    """Rows whose penalty lies on one side of 1. penalty: [n, 1] float32; choose: minimum above 1, maximum below."""

    rows: RowSet
    state: Tensor
    penalty: Tensor
    choose: Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class PenaltyPlan:
    """Which rows of one batch use what; valid until a slot is added or removed. `state` tensors index SlotRows."""

    edited: RowSet
    additions: _Additions | None
    phrases: _Phrases | None
    restricted: RowSet
    restricted_state: Tensor
    watermarked: RowSet
    watermarked_state: Tensor
    repetition: tuple[_Repetition, ...]
    seen: RowSet
    seen_state: Tensor
    counted: RowSet
    counted_state: Tensor
    frequency: Tensor  # [n, 1] float32
    presence: Tensor  # [n, 1] float32
    tailed: RowSet
    tailed_state: Tensor


class Penalties:
    """The per-slot memory and the edits. One writer: the sampler, on the engine's thread."""

    def __init__(
        self,
        *,
        vocab_size: int,
        device: torch.device,
        watermark_gamma: float,
        watermark_delta: float,
        id_hashes: Tensor,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._green_threshold = green_threshold(watermark_gamma)
        self._delta_bits = torch.tensor(watermark_delta, dtype=torch.float32).view(torch.int32).item()
        self._one_bits = torch.tensor(1.0, dtype=torch.float32).view(torch.int32).item()
        self._id_hashes = id_hashes
        self._options: dict[int, _SlotOptions] = {}
        self._seen = SlotRows(vocab_size, torch.int32, device)  # -1 (all bits) where prompt or output has the id
        self._counts = SlotRows(vocab_size, torch.float32, device)  # how often the output has the id; exact to 2**24
        self._allowed = SlotRows(vocab_size, torch.float32, device, fill=-torch.inf)  # 0 where allowed, -inf elsewhere
        self._tails = SlotRows(1, torch.int64, device, fill=_NO_TOKEN)  # the last tokens of prompt + output

    def add(
        self,
        slot: int,
        params: SamplingParams,
        *,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        suppressed_ids: Sequence[int],
        suppressed_until: int,
    ) -> None:
        """Start remembering for `slot`, as if `output_ids` had been produced under it. All or nothing on an error."""
        options = self._read_options(params, suppressed_ids, suppressed_until)
        self._options[slot] = options
        if not options.edits:
            return
        try:
            self._start_history(slot, options, prompt_ids, output_ids)
        except Exception:  # most likely out of memory: the slot must not stay half taken
            self.remove(slot)
            raise

    def remove(self, slot: int) -> None:
        """Forget the slot."""
        del self._options[slot]
        for state in (self._seen, self._counts, self._allowed, self._tails):
            state.release(slot)

    def plan(self, slots: Sequence[int]) -> PenaltyPlan:
        """Gather the tensors for a batch whose row i belongs to `slots[i]`."""
        options = [self._options[slot] for slot in slots]

        def rows_where(choose: Callable[[_SlotOptions], object]) -> RowSet:
            return RowSet([row for row, option in enumerate(options) if choose(option)], len(slots), self._device)

        def state_of(state: SlotRows, rows: RowSet) -> Tensor:
            return state.index_of([slots[row] for row in rows.rows])

        def column(rows: RowSet, read: Callable[[SamplingParams], float]) -> Tensor:
            values = [read(options[row].params) for row in rows.rows]
            return to_device(values, self._device, torch.float32)[:, None]

        restricted = rows_where(lambda option: option.restricts)
        watermarked = rows_where(lambda option: option.params.watermark)
        seen = rows_where(lambda option: option.penalizes_repetition)
        counted = rows_where(lambda option: option.counts_output)
        tailed = rows_where(lambda option: option.tail_length)
        repetition = []
        for rows, choose in (
            (rows_where(lambda option: option.params.repetition_penalty > 1.0), torch.minimum),
            (rows_where(lambda option: option.params.repetition_penalty < 1.0), torch.maximum),
        ):
            if rows:
                penalty = column(rows, lambda params: params.repetition_penalty)
                repetition.append(_Repetition(rows, state_of(self._seen, rows), penalty, choose))
        return PenaltyPlan(
            edited=rows_where(lambda option: option.edits),
            additions=self._plan_additions(options),
            phrases=self._plan_phrases(slots, options),
            restricted=restricted,
            restricted_state=state_of(self._allowed, restricted),
            watermarked=watermarked,
            watermarked_state=state_of(self._tails, watermarked),
            repetition=tuple(repetition),
            seen=seen,
            seen_state=state_of(self._seen, seen),
            counted=counted,
            counted_state=state_of(self._counts, counted),
            frequency=column(counted, lambda params: params.frequency_penalty),
            presence=column(counted, lambda params: params.presence_penalty),
            tailed=tailed,
            tailed_state=state_of(self._tails, tailed),
        )

    def apply(self, logits: Tensor, plan: PenaltyPlan, positions: NDArray[np.int64]) -> None:
        """Edit logits [num_rows, vocab_size] float32 in place. positions [num_rows] int64: index of the new token."""
        if plan.additions is not None:
            additions = plan.additions
            logits.index_put_((additions.rows, additions.ids), additions.values_at(positions), accumulate=True)
        if plan.phrases is not None:
            self._forbid_phrases(logits, plan.phrases)
        if plan.restricted:
            part = plan.restricted.take(logits)
            part += self._allowed.tensor.index_select(0, plan.restricted_state)
            plan.restricted.put(logits, part)
        if plan.watermarked:
            previous_ids = self._tails.tensor[plan.watermarked_state, -1]
            green = randomness.green_bits(self._id_hashes, previous_ids, self._green_threshold)
            part = plan.watermarked.take(logits)
            part += green.bitwise_and_(self._delta_bits).view(torch.float32)
            plan.watermarked.put(logits, part)
        for repetition in plan.repetition:
            part = repetition.rows.take(logits)
            self._penalize_repetition(part, repetition)
            repetition.rows.put(logits, part)
        if plan.counted:
            part = plan.counted.take(logits)
            self._penalize_counts(part, plan)
            plan.counted.put(logits, part)

    def count(self, plan: PenaltyPlan, token_ids: Tensor) -> None:
        """Remember the tokens just chosen, [num_rows] int64."""
        if plan.seen:
            self._seen.tensor[plan.seen_state, plan.seen.take(token_ids)] = -1
        if plan.counted:
            one = torch.ones((), device=self._device)
            self._counts.tensor.index_put_((plan.counted_state, plan.counted.take(token_ids)), one, accumulate=True)
        if plan.tailed:
            tails = self._tails.tensor.index_select(0, plan.tailed_state)
            tails = torch.cat((tails[:, 1:], plan.tailed.take(token_ids)[:, None]), dim=1)
            self._tails.tensor.index_copy_(0, plan.tailed_state, tails)

    def _start_history(
        self, slot: int, options: _SlotOptions, prompt_ids: Sequence[int], output_ids: Sequence[int]
    ) -> None:
        if options.penalizes_repetition:
            seen = self._seen.claim(slot)
            for ids in (prompt_ids, output_ids):
                seen[valid_ids(ids, self._vocab_size, self._device)] = -1
        if options.counts_output:
            produced = valid_ids(output_ids, self._vocab_size, self._device)
            self._counts.claim(slot).index_add_(0, produced, torch.ones(len(produced), device=self._device))
        if options.params.allowed_token_ids is not None:
            allowed = valid_ids(options.params.allowed_token_ids, self._vocab_size, self._device)
            self._allowed.claim(slot)[allowed] = 0.0
        if options.tail_length:
            self._tails.widen(options.tail_length)
            tail = self._tails.claim(slot)
            last = [*prompt_ids[-len(tail) :], *output_ids[-len(tail) :]][-len(tail) :]
            if last:
                tail[len(tail) - len(last) :] = to_device(last, self._device, torch.int64)

    def _read_options(
        self, params: SamplingParams, suppressed_ids: Sequence[int], suppressed_until: int
    ) -> _SlotOptions:
        additions = [(token_id, bias, _ALWAYS) for token_id, bias in dict(params.logit_bias).items()]
        additions += [(word[0], -np.inf, _ALWAYS) for word in params.bad_words if len(word) == 1]
        if suppressed_until > 0:
            additions += [(token_id, -np.inf, suppressed_until) for token_id in set(suppressed_ids)]
        additions = [addition for addition in additions if 0 <= addition[0] < self._vocab_size]
        return _SlotOptions(
            params=params,
            addition_ids=np.array([token_id for token_id, _, _ in additions], dtype=np.int64),
            addition_values=np.array([value for _, value, _ in additions], dtype=np.float32),
            addition_ends=np.array([end for _, _, end in additions], dtype=np.int64),
            phrases=tuple(
                word for word in params.bad_words if len(word) > 1 and all(0 <= i < self._vocab_size for i in word)
            ),
        )

    def _plan_additions(self, options: Sequence[_SlotOptions]) -> _Additions | None:
        counts = [len(option.addition_ids) for option in options]
        if not any(counts):
            return None
        row_numbers = np.repeat(np.arange(len(options), dtype=np.int64), counts)
        end_positions = np.concatenate([option.addition_ends for option in options])
        temporary = end_positions[end_positions != _ALWAYS]
        ids = np.concatenate([option.addition_ids for option in options])
        values = np.concatenate([option.addition_values for option in options])
        return _Additions(
            rows=to_device(torch.from_numpy(row_numbers), self._device),
            ids=to_device(torch.from_numpy(ids), self._device),
            values=to_device(torch.from_numpy(values), self._device),
            row_numbers=row_numbers,
            end_positions=end_positions,
            last_end=int(temporary.max(initial=0)),
        )

    def _plan_phrases(self, slots: Sequence[int], options: Sequence[_SlotOptions]) -> _Phrases | None:
        entries = [(row, phrase) for row, option in enumerate(options) for phrase in option.phrases]
        if not entries:
            return None
        width = self._tails.tensor.shape[1]
        prefixes = [[_ANY_TOKEN] * (width - len(phrase) + 1) + list(phrase[:-1]) for _, phrase in entries]
        return _Phrases(
            rows=to_device([row for row, _ in entries], self._device, torch.int64),
            state=self._tails.index_of([slots[row] for row, _ in entries]),
            prefixes=to_device(prefixes, self._device, torch.int64),
            last_ids=to_device([phrase[-1] for _, phrase in entries], self._device, torch.int64),
        )

    def _forbid_phrases(self, logits: Tensor, phrases: _Phrases) -> None:
        """-inf for the last id of each phrase whose other ids are the sequence's last tokens.

        Agrees with transformers' NoBadWordsLogitsProcessor. Added, not assigned: several phrases may name one id,
        and sums of zeros and -inf do not depend on their order.
        """
        tails = self._tails.tensor.index_select(0, phrases.state)  # [n, width]
        matches = ((tails == phrases.prefixes) | (phrases.prefixes == _ANY_TOKEN)).all(-1)
        forbidden = torch.zeros(matches.shape, device=self._device).masked_fill_(matches, -torch.inf)
        logits.index_put_((phrases.rows, phrases.last_ids), forbidden, accumulate=True)

    def _penalize_repetition(self, logits: Tensor, repetition: _Repetition) -> None:
        """Keskar et al. 2019 (CTRL), section 4.1: seen ids, x / penalty where x > 0, x * penalty where x < 0.

        Above 1 that is the lesser of quotient and product, below 1 the greater. Unseen ids get penalty 1, which
        changes no bit. Agrees with transformers' RepetitionPenaltyLogitsProcessor. Edits logits [n, vocab] in place.
        """
        penalty_bits = repetition.penalty.view(torch.int32) ^ self._one_bits  # [n, 1]
        seen = self._seen.tensor.index_select(0, repetition.state)  # [n, vocab], 0 or -1
        penalty = seen.bitwise_and_(penalty_bits).bitwise_xor_(self._one_bits).view(torch.float32)
        product = logits * penalty
        repetition.choose(logits.div_(penalty), product, out=logits)

    def _penalize_counts(self, logits: Tensor, plan: PenaltyPlan) -> None:
        """OpenAI's definition: x[j] - count[j] * frequency - (count[j] > 0) * presence, count over the output only.

        TGI divides by a length that depends on the batch and counts the prompt too. Edits [n, vocab] in place.
        """
        counts = self._counts.tensor.index_select(0, plan.counted_state)
        logits -= counts * plan.frequency
        logits -= counts.clamp_(max=1.0).mul_(plan.presence)
