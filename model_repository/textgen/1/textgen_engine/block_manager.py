"""Block ids, reference counts and prefix hashes of the paged KV cache. Pure Python; the tensors are kv_cache.py's.

Every block is in exactly one of three states:

    free    no owner, no known content
    used    reference count > 0: in the block table of that many running sequences; may also be findable by its hash
    cached  reference count 0, content known: findable by its hash, given away least recently used first

A full block is known by a chained hash: blake2b over its parent's hash and its token ids, so equal hashes mean equal
prefixes. The chain starts from the request's adapter and its cache salt. blake2b with 128 bits is collision resistant:
a hit never shows one client the content of another's different prompt.

Where every layer sees a sliding window only, blocks behind it are given back while their sequence runs. Its block table
keeps its length: in the places of such blocks stands the first one that is left, so that whoever reads them (nobody
weighs what is read) meets the sequence's own keys and values.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterable

from textgen_engine.sequence import Sequence


class BlockManager:
    """Owns `num_blocks` blocks of `block_size` tokens. Not thread safe: the engine's loop thread alone calls it.

    window: the most tokens, itself included, that a token sees in any layer; None: all before it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, window: int | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._window = window
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))  # a stack: lowest ids first, most recent reused
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._ref_counts: list[int] = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def usage(self) -> float:
        """Share of blocks in use by running sequences, 0 to 1."""
        return self.num_used / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks needed to hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """New blocks that `reserve` would take for this sequence, a copy of a shared last block included."""
        # A block may be there already, reserved for guesses that turned out wrong.
        missing = max(self.blocks_for(num_tokens) - len(sequence.block_table), 0)
        return missing + (1 if self._shared_write_index(sequence) is not None else 0)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold the leading full blocks of the sequence's tokens; takes nothing.

        At most all but the last token are covered, since the last one must be computed to be sampled from.
        """
        if not self.prefix_caching:
            return []
        found: list[int] = []
        limit = (len(sequence.token_ids) - 1) // self.block_size
        for index in range(limit):
            block = self._block_of.get(self._hash(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def is_idle(self, block: int) -> bool:
        """True when no sequence owns the block."""
        return self._ref_counts[block] == 0

    def adopt_prefix(self, sequence: Sequence, blocks: Iterable[int]) -> None:
        """Put found blocks into the (empty) block table of the sequence, which becomes one of their owners."""
        assert not sequence.block_table
        for block in blocks:
            self._take(block)
            sequence.block_table.append(block)
        sequence.num_registered_blocks = len(sequence.block_table)

    def reserve(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Extend the block table to hold `num_tokens`, and make the block that is written next the sequence's own.

        Returns the block copies (source, destination) to be made before the step writes, or None when there are not
        enough blocks (then nothing has changed).
        """
        if self.num_missing(sequence, num_tokens) > self.num_available:
            return None
        copies: list[tuple[int, int]] = []
        shared = self._shared_write_index(sequence)
        if shared is not None:
            source = sequence.block_table[shared]
            sequence.block_table[shared] = self._allocate()
            copies.append((source, sequence.block_table[shared]))
            self._release(source)
        while len(sequence.block_table) < self.blocks_for(num_tokens):
            sequence.block_table.append(self._allocate())
        return copies

    def register(self, sequence: Sequence) -> None:
        """Make the sequence's full, computed blocks findable, as far as their tokens are known. Call when a step's
        results are in."""
        if not self.prefix_caching:
            return
        num_known = min(sequence.num_computed, len(sequence.token_ids))
        while (sequence.num_registered_blocks + 1) * self.block_size <= num_known:
            index = sequence.num_registered_blocks
            block = sequence.block_table[index]
            key = self._hash(sequence, index)
            # When another block already holds the same prefix, ours stays anonymous and is freed plainly.
            if key not in self._block_of and block not in self._hash_of:
                self._block_of[key] = block
                self._hash_of[block] = key
            sequence.num_registered_blocks += 1

    def release_hidden(self, sequence: Sequence) -> None:
        """Give back the blocks that no later token of the sequence can see. Call after `register`."""
        if self._window is None:
            return
        first_visible = sequence.num_computed - self._window + 1  # of the next token
        count = min(first_visible // self.block_size, len(sequence.block_table) - 1)
        if self.prefix_caching:  # first offered, then given back
            count = min(count, sequence.num_registered_blocks)
        if count <= sequence.num_released_blocks:
            return
        for block in sequence.block_table[sequence.num_released_blocks : count]:
            self._release(block)
        sequence.block_table[:count] = [sequence.block_table[count]] * count
        sequence.num_released_blocks = count

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let the child own the parent's blocks too; `reserve` copies the shared one that is written first."""
        assert not child.block_table
        for block in _owned(parent):
            self._take(block)
        child.block_table = list(parent.block_table)
        child.num_released_blocks = parent.num_released_blocks
        child.block_hashes = list(parent.block_hashes)
        child.num_registered_blocks = parent.num_registered_blocks

    def release(self, sequence: Sequence) -> None:
        """Take the sequence out of the owners of all its blocks; its block table is empty afterwards."""
        # The tail goes first, so that it is evicted before the prefixes that more requests may share.
        for block in reversed(_owned(sequence)):
            self._release(block)
        sequence.block_table.clear()
        sequence.num_released_blocks = 0
        sequence.num_registered_blocks = 0

    def check_integrity(self, owners: Iterable[Sequence]) -> None:
        """Assert that free + used + cached is all, and that reference counts equal the owners' block tables."""
        counts = Counter(block for sequence in owners for block in _owned(sequence))
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free) and not free & cached
        for block in range(self.num_blocks):
            count = self._ref_counts[block]
            assert count == counts.get(block, 0), f"block {block}: {count} references, {counts.get(block, 0)} owners"
            assert (count > 0) != (block in free or block in cached), f"block {block} is in two states, or in none"
            assert block not in free or block not in self._hash_of, f"free block {block} has a hash"
            assert block not in cached or block in self._hash_of, f"cached block {block} has no hash"
        assert {block: key for key, block in self._block_of.items()} == self._hash_of

    def _shared_write_index(self, sequence: Sequence) -> int | None:
        """Index of the block the sequence writes next, if others own that block too."""
        index = sequence.num_computed // self.block_size
        if index < len(sequence.block_table) and self._ref_counts[sequence.block_table[index]] > 1:
            return index
        return None

    def _take(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def _allocate(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._ref_counts[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """The chained hash of block `index`, computed once per sequence."""
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else _root(sequence)
            tokens = struct.pack(f"<{size}i", *sequence.token_ids[start : start + size])
            hashes.append(hashlib.blake2b(parent + tokens, digest_size=16).digest())
        return hashes[index]


def _owned(sequence: Sequence) -> list[int]:
    return sequence.block_table[sequence.num_released_blocks :]


def _root(sequence: Sequence) -> bytes:
    """What the chain of hashes starts from: keys and values of different adapters, or salts, are never shared."""
    generation = 0 if sequence.adapter is None else sequence.adapter.generation  # 1 is the first adapter's
    return struct.pack("<Q", generation) + b"salt:" + sequence.request.cache_salt.encode()
