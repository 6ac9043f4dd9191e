"""`block_manager.py`: who owns which block, what is found again, and that nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen_engine.block_manager import BlockManager
from textgen_engine.sequence import Sequence

from .tiny import make_request

BLOCK = 4


def sequence_of(token_ids: list[int], salt: str = "") -> Sequence:
    return Sequence(make_request("r", token_ids, cache_salt=salt))


def compute(blocks: BlockManager, sequence: Sequence, num_tokens: int) -> list[tuple[int, int]]:
    """Reserve and compute up to num_tokens, as one step does."""
    copies = blocks.reserve(sequence, num_tokens)
    assert copies is not None
    sequence.num_computed = num_tokens
    blocks.register(sequence)
    return copies


def admit(blocks: BlockManager, sequence: Sequence) -> int:
    """Take over the cached prefix and compute the rest; the number of tokens found."""
    found = blocks.find_prefix(sequence)
    blocks.adopt_prefix(sequence, found)
    sequence.num_computed = len(found) * blocks.block_size
    compute(blocks, sequence, len(sequence.token_ids))
    return len(found) * blocks.block_size


def test_blocks_are_reserved_for_the_tokens_asked_for_only() -> None:
    blocks = BlockManager(8, BLOCK)
    sequence = sequence_of(list(range(20)))
    for num_tokens, expected in ((1, 1), (4, 1), (5, 2), (12, 3)):
        assert blocks.reserve(sequence, num_tokens) == []
        assert len(sequence.block_table) == expected
        blocks.check_integrity([sequence])
    assert blocks.num_used == 3 and blocks.num_available == 5
    assert blocks.usage == 3 / 8


def test_a_refused_reservation_changes_nothing() -> None:
    blocks = BlockManager(2, BLOCK)
    first, second = sequence_of([1]), sequence_of(list(range(12)))
    assert blocks.reserve(first, 1) == []
    assert blocks.reserve(second, 8) is None
    assert second.block_table == [] and blocks.num_available == 1
    blocks.check_integrity([first])


def test_a_prefix_is_found_while_its_owner_still_runs() -> None:
    blocks = BlockManager(8, BLOCK)
    first, second = sequence_of(list(range(10))), sequence_of([*range(8), 99, 98])
    compute(blocks, first, 10)
    assert blocks.find_prefix(second) == first.block_table[:2]
    blocks.adopt_prefix(second, blocks.find_prefix(second))
    assert blocks.num_used == 3, "two of the blocks have two owners"
    blocks.check_integrity([first, second])
    blocks.release(first)
    blocks.check_integrity([second])
    assert blocks.num_used == 2


def test_the_last_token_is_never_found() -> None:
    """It has to be computed, or there is nothing to sample from."""
    blocks = BlockManager(8, BLOCK)
    first = sequence_of(list(range(8)))
    compute(blocks, first, 8)
    assert len(blocks.find_prefix(sequence_of(list(range(8))))) == 1
    assert len(blocks.find_prefix(sequence_of(list(range(9))))) == 2


def test_only_computed_full_blocks_are_found() -> None:
    blocks = BlockManager(8, BLOCK)
    first = sequence_of(list(range(12)))
    compute(blocks, first, 7)
    assert len(blocks.find_prefix(sequence_of(list(range(12))))) == 1


def test_a_block_counts_with_everything_before_it() -> None:
    blocks = BlockManager(8, BLOCK)
    compute(blocks, sequence_of(list(range(12))), 12)
    assert blocks.find_prefix(sequence_of([9, 9, 9, 9, *range(4, 12), 1])) == []
    assert len(blocks.find_prefix(sequence_of([0, 1, 2, 3, 9, 9, 9, 9, *range(8, 12), 1]))) == 1


def test_different_salts_share_nothing() -> None:
    blocks = BlockManager(8, BLOCK)
    compute(blocks, sequence_of(list(range(9)), salt="tenant a"), 9)
    assert blocks.find_prefix(sequence_of(list(range(9)), salt="tenant b")) == []
    assert blocks.find_prefix(sequence_of(list(range(9)))) == []
    assert len(blocks.find_prefix(sequence_of(list(range(9)), salt="tenant a"))) == 2


def test_generated_tokens_are_found_too() -> None:
    blocks = BlockManager(8, BLOCK)
    first = sequence_of([1, 2, 3])
    first.token_ids += [4, 5, 6, 7, 8]
    compute(blocks, first, 8)
    blocks.release(first)
    assert len(blocks.find_prefix(sequence_of([1, 2, 3, 4, 5, 6, 7, 8, 9]))) == 2


def test_no_prefix_caching_finds_nothing_and_caches_nothing() -> None:
    blocks = BlockManager(8, BLOCK, prefix_caching=False)
    first = sequence_of(list(range(9)))
    compute(blocks, first, 9)
    assert blocks.find_prefix(sequence_of(list(range(9)))) == []
    blocks.release(first)
    blocks.check_integrity([])
    assert not blocks._cached


def test_forks_share_until_they_write() -> None:
    blocks = BlockManager(8, BLOCK)
    parent = sequence_of(list(range(6)))
    compute(blocks, parent, 6)
    child = Sequence(parent.request, 1)
    blocks.fork(parent, child)
    child.num_computed = 6
    assert child.block_table == parent.block_table and blocks.num_used == 2

    shared = parent.block_table[1]
    assert blocks.num_missing(parent, 7) == 1, "the half-full block has to be copied"
    copies = blocks.reserve(parent, 7)
    assert copies == [(shared, parent.block_table[1])] and parent.block_table[1] != shared
    assert blocks.reserve(child, 7) == [], "it is the child's own now"
    assert child.block_table == [parent.block_table[0], shared]
    blocks.check_integrity([parent, child])
    blocks.release(parent)
    blocks.release(child)
    blocks.check_integrity([])


def test_forks_of_a_full_last_block_copy_nothing() -> None:
    blocks = BlockManager(8, BLOCK)
    parent = sequence_of(list(range(8)))
    compute(blocks, parent, 8)
    child = Sequence(parent.request, 1)
    blocks.fork(parent, child)
    child.num_computed = 8
    assert blocks.reserve(parent, 9) == [] and blocks.reserve(child, 9) == []
    assert parent.block_table[:2] == child.block_table[:2] and parent.block_table[2] != child.block_table[2]


def test_a_copy_needs_a_block() -> None:
    blocks = BlockManager(2, BLOCK)
    parent = sequence_of(list(range(6)))
    compute(blocks, parent, 6)
    child = Sequence(parent.request, 1)
    blocks.fork(parent, child)
    child.num_computed = 6
    assert blocks.reserve(child, 7) is None
    blocks.release(parent)
    assert blocks.reserve(child, 7) == []


def test_the_least_recently_used_prefix_is_evicted_first_and_tails_before_heads() -> None:
    blocks = BlockManager(4, BLOCK)
    old, new = sequence_of([*range(8), 1]), sequence_of([*range(100, 108), 1])
    compute(blocks, old, 8)
    compute(blocks, new, 8)
    blocks.release(old)
    blocks.release(new)
    assert blocks.num_available == 4 and blocks.num_used == 0
    taker = sequence_of(list(range(50, 70)))
    assert blocks.reserve(taker, 4) == []
    assert len(blocks.find_prefix(old)) == 1, "the tail of the older one went first"
    assert len(blocks.find_prefix(new)) == 2
    assert blocks.reserve(taker, 8) == []
    assert blocks.find_prefix(old) == [] and len(blocks.find_prefix(new)) == 2
    blocks.check_integrity([taker])


def test_use_renews_a_cached_prefix() -> None:
    blocks = BlockManager(4, BLOCK)
    first, second = sequence_of([*range(4), 1]), sequence_of([*range(100, 104), 1])
    for sequence in (first, second):
        compute(blocks, sequence, 4)
        blocks.release(sequence)
    again = sequence_of([*range(4), 1])
    blocks.adopt_prefix(again, blocks.find_prefix(again))
    blocks.release(again)
    taker = sequence_of(list(range(50, 70)))
    assert blocks.reserve(taker, 3 * BLOCK) == []
    assert len(blocks.find_prefix(first)) == 1 and blocks.find_prefix(second) == []


def test_two_that_computed_the_same_prefix_keep_one_copy_findable() -> None:
    blocks = BlockManager(8, BLOCK)
    first, second = sequence_of([*range(8), 1]), sequence_of([*range(8), 2])
    for sequence in (first, second):
        assert blocks.reserve(sequence, 9) == []
    for sequence in (first, second):
        sequence.num_computed = 9
        blocks.register(sequence)
    blocks.check_integrity([first, second])
    blocks.release(first)
    blocks.release(second)
    blocks.check_integrity([])
    assert len(blocks._cached) == 2


def test_integrity_check_notices_a_leak_and_a_double_free() -> None:
    blocks = BlockManager(4, BLOCK)
    sequence = sequence_of(list(range(8)))
    compute(blocks, sequence, 8)
    with pytest.raises(AssertionError):
        blocks.check_integrity([])
    with pytest.raises(AssertionError):
        blocks.check_integrity([sequence, sequence])


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "grow", "fork", "preempt", "remove"]),
        st.integers(0, 7),  # which sequence
        st.integers(1, 11),  # tokens, or the kind of prompt
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(operations=OPERATIONS, num_blocks=st.integers(2, 12), prefix_caching=st.booleans())
def test_random_operations_keep_the_books(
    operations: list[tuple[str, int, int]], num_blocks: int, prefix_caching: bool
) -> None:
    """Besides the books: a block's content, followed by hand, is what each owner believes it to be."""
    blocks = BlockManager(num_blocks, 2, prefix_caching=prefix_caching)
    running: list[Sequence] = []
    written: dict[int, list[int | None]] = {block: [None, None] for block in range(num_blocks)}

    def write(sequence: Sequence, num_tokens: int) -> bool:
        copies = blocks.reserve(sequence, num_tokens)
        if copies is None:
            return False
        for source, destination in copies:
            written[destination] = list(written[source])
        for position in range(sequence.num_computed, num_tokens):
            written[sequence.block_table[position // 2]][position % 2] = sequence.token_ids[position]
        sequence.num_computed = num_tokens
        blocks.register(sequence)
        return True

    for name, index, amount in operations:
        if name == "add":
            sequence = sequence_of([amount % 3] * 3 + [amount] * (amount % 5 + 1))
            found = blocks.find_prefix(sequence)
            blocks.adopt_prefix(sequence, found)
            sequence.num_computed = 2 * len(found)
            if write(sequence, len(sequence.token_ids)):
                running.append(sequence)
            else:
                blocks.release(sequence)
        elif running:
            sequence = running[index % len(running)]
            if name == "grow":
                sequence.token_ids += [amount % 2] * amount
                if not write(sequence, len(sequence.token_ids)):
                    blocks.release(sequence)
                    running.remove(sequence)
            elif name == "fork":
                child = Sequence(sequence.request, 1, list(sequence.token_ids))
                blocks.fork(sequence, child)
                child.num_computed = sequence.num_computed
                running.append(child)
            else:
                blocks.release(sequence)
                running.remove(sequence)
        blocks.check_integrity(running)
        for sequence in running:
            held = [written[b][i] for b in sequence.block_table for i in range(2)][: sequence.num_computed]
            assert held == sequence.token_ids[: sequence.num_computed]
    for sequence in running:
        blocks.release(sequence)
    blocks.check_integrity([])
    assert blocks.num_used == 0
