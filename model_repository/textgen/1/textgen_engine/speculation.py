"""Guesses the next tokens of a sequence by what followed the last ones before: n-gram lookup in prompt and output.

Owns the guesses and how many are worth making. Whether one is right is the engine's business: a guess is only ever
checked against the token that is sampled anyway, so that guessing changes speed and never a token. (Saxena 2023,
"Prompt Lookup Decoding"; the idea of verifying guesses in one step is Leviathan et al.'s, 2023.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from textgen_engine.sequence import Sequence

# Lengths of the n-grams looked up, most telling first. What follows a single token before says little.
_NGRAM_SIZES = (3, 2)


@dataclass(slots=True)
class _History:
    """What is known of one sequence. places: n-gram -> index of the token behind its latest occurrence."""

    most: int  # guesses to make next
    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0  # tokens up to which n-grams are in `places`; always less than the sequence has


class Speculator:
    """Called from the engine's loop thread alone."""

    def __init__(self, most: int) -> None:
        """most: guesses per sequence and step; 0: none are made."""
        self._most = most
        self._histories: dict[Sequence, _History] = {}

    @property
    def is_on(self) -> bool:
        return self._most > 0

    def guess(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """The tokens that may come next, at most `room`; empty where nothing like it was seen."""
        history = self._histories.get(sequence)
        if history is None:
            history = self._histories[sequence] = _History(self._most)
        ids = sequence.token_ids
        for end in range(history.num_indexed + 1, len(ids)):  # not up to the last one: it has nothing behind it
            for size in _NGRAM_SIZES:
                if end >= size:
                    history.places[tuple(ids[end - size : end])] = end
        history.num_indexed = len(ids) - 1
        for size in _NGRAM_SIZES:
            place = history.places.get(tuple(ids[-size:])) if len(ids) > size else None
            if place is not None:
                guessed: list[int] = []
                for index in range(place, place + min(history.most, room)):
                    # Behind the end the text is taken to repeat itself, as far back as the n-gram was.
                    guessed.append(ids[index] if index < len(ids) else guessed[index - len(ids)])
                return tuple(guessed)
        return ()

    def note(self, sequence: Sequence, num_guessed: int, num_right: int) -> None:
        """Learn from a step: a sequence whose guesses are wrong gets fewer, down to one."""
        history = self._histories[sequence]
        if num_right == num_guessed:
            history.most = min(2 * history.most, self._most)
        elif num_right == 0:
            history.most = max(history.most // 2, 1)

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended."""
        self._histories.pop(sequence, None)
