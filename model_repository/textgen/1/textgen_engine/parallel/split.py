"""Who holds what: ranges of heads, of inner units and of the vocabulary for one rank of a group. Plain arithmetic.

Attention is split by groups of heads that share one key-value head, so that keys and values are cached once over all
ranks. The number of groups need not be a multiple of the number of ranks: 3 groups on 2 ranks are 2 and 1. With fewer
groups than ranks several ranks hold the same key-value head, each with a part of its query heads.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

Range = tuple[int, int]


class CannotSplit(Exception):
    """A model, or a tensor of it, that cannot be split over so many ranks; says why."""


@dataclass(frozen=True)
class Shard:
    """One rank of a group: rank in [0, world_size)."""

    rank: int
    world_size: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


@dataclass(frozen=True)
class Slice:
    """The part of a tensor that one rank holds: along `dim` the `ranges` [start, stop), one behind the other."""

    dim: int
    ranges: tuple[Range, ...]

    @property
    def length(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def shape(self, whole: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        """The part's shape, given the whole tensor's."""
        assert all(0 <= start < stop <= whole[self.dim] for start, stop in self.ranges), (self, whole)
        return (*whole[: self.dim], self.length, *whole[self.dim + 1 :])


@dataclass(frozen=True)
class Heads:
    """The attention heads of one rank: ranges of query heads and of key-value heads, out of so many.

    Each key-value head of the rank serves the same number of the rank's query heads.
    """

    num_query: int
    num_kv: int
    query: Range
    kv: Range

    @property
    def num_local_query(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def num_local_kv(self) -> int:
        return self.kv[1] - self.kv[0]


def split_heads(num_query: int, num_kv: int, shard: Shard) -> Heads:
    """The heads of one rank. Raises CannotSplit when some rank would get none."""
    if num_query % num_kv:
        raise CannotSplit(f"{num_query} query heads do not divide into {num_kv} groups")
    if num_query < shard.world_size:
        raise CannotSplit(f"{num_query} query heads cannot be split over {shard.world_size} ranks")
    group_size = num_query // num_kv
    if num_kv >= shard.world_size:
        kv = _even(num_kv, shard.rank, shard.world_size)
        return Heads(num_query, num_kv, (kv[0] * group_size, kv[1] * group_size), kv)
    # Fewer groups than ranks: each group to one rank or several, its query heads split among them.
    ranks = [_even(shard.world_size, group, num_kv) for group in range(num_kv)]
    group = next(group for group, (start, stop) in enumerate(ranks) if start <= shard.rank < stop)
    first, end = ranks[group]
    if group_size < end - first:
        raise CannotSplit(f"{num_kv} groups of {group_size} query heads cannot be split over {shard.world_size} ranks")
    start, stop = _even(group_size, shard.rank - first, end - first)
    return Heads(num_query, num_kv, (group * group_size + start, group * group_size + stop), (group, group + 1))


def split_units(size: int, shard: Shard) -> Range:
    """A range of `size` inner units (the width of an MLP), in multiples of up to 128 where that costs no balance:
    kernels and groups of quantized weights like round numbers. Raises CannotSplit when some rank would get none."""
    units = (128, 64, 32, 16, 8, 4, 2)
    even = next((unit for unit in units if size % (unit * shard.world_size) == 0), None)
    coarse = next((unit for unit in units if size % unit == 0 and size // unit >= 8 * shard.world_size), 1)
    unit = even or coarse
    if size // unit < shard.world_size:
        raise CannotSplit(f"a width of {size} cannot be split over {shard.world_size} ranks")
    start, stop = _even(size // unit, shard.rank, shard.world_size)
    return start * unit, stop * unit


def split_vocabulary(size: int, shard: Shard) -> Range:
    """A range of token ids; all ranks but the last hold equally many. Raises CannotSplit when one would get none."""
    width = vocabulary_width(size, shard.world_size)
    start = shard.rank * width
    if start >= size:
        raise CannotSplit(f"a vocabulary of {size} cannot be split over {shard.world_size} ranks")
    return start, min(start + width, size)


def vocabulary_width(size: int, world_size: int) -> int:
    """Token ids per rank (the last may hold fewer)."""
    return -(-size // world_size)


def query_rows(rows: int, heads: Heads) -> tuple[Range, ...]:
    """The rows of a rank's query heads, in a tensor whose `rows` are all query heads one behind the other."""
    return (_scaled(heads.query, _rows_per_head(rows, heads.num_query)),)


def kv_rows(rows: int, heads: Heads) -> tuple[Range, ...]:
    """The same for key-value heads."""
    return (_scaled(heads.kv, _rows_per_head(rows, heads.num_kv)),)


def stacked_qkv_rows(rows: int, heads: Heads) -> tuple[Range, ...]:
    """All query heads, then all key heads, then all value heads."""
    dim = _rows_per_head(rows, heads.num_query + 2 * heads.num_kv)
    keys, values = heads.num_query, heads.num_query + heads.num_kv
    return tuple(
        _scaled((start + first, stop + first), dim)
        for first, (start, stop) in ((0, heads.query), (keys, heads.kv), (values, heads.kv))
    )


def grouped_qkv_rows(rows: int, heads: Heads) -> tuple[Range, ...]:
    """Group after group: the query heads of a group, its key head, its value head."""
    dim = _rows_per_head(rows, heads.num_query + 2 * heads.num_kv)
    group_size = heads.num_query // heads.num_kv
    ranges = []
    for group in range(*heads.kv):
        first = group * (group_size + 2)
        start = max(heads.query[0] - group * group_size, 0)
        stop = min(heads.query[1] - group * group_size, group_size)
        ranges += [(first + start, first + stop), (first + group_size, first + group_size + 2)]
    return tuple(_scaled(merged, dim) for merged in _merge(ranges))


def blocked_qvk_rows(rows: int, heads: Heads, num_blocks: int = 4) -> tuple[Range, ...]:
    """Blocks of equally many heads, each with its queries, then its values, then its keys (CodeGen). A rank's part has
    as many blocks, with fewer heads each. Raises CannotSplit where its heads do not make so many."""
    size, local_size = heads.num_query // num_blocks, heads.num_local_query // num_blocks
    if heads.num_query % num_blocks or heads.num_local_query % num_blocks:
        raise CannotSplit(
            f"its layers want {num_blocks} blocks of heads on each rank: {heads.num_query} do not make them"
        )
    ranges = []
    for first in range(*heads.query, local_size):
        for part in range(3):
            for head in range(first, first + local_size):
                start = (3 * (head // size) + part) * size + head % size
                ranges.append((start, start + 1))
    dim = _rows_per_head(rows, 3 * heads.num_query)
    return tuple(_scaled(merged, dim) for merged in _merge(ranges))


def halves_rows(rows: int, shard: Shard) -> tuple[Range, ...]:
    """Two layers of the same width, one behind the other (gate and up): the rank's part of each."""
    half = rows // 2
    start, stop = split_units(half, shard)
    return (start, stop), (half + start, half + stop)


def _even(size: int, index: int, count: int) -> Range:
    """Part `index` of `count`, the first ones larger by one where it does not divide."""
    share, rest = divmod(size, count)
    start = index * share + min(index, rest)
    return start, start + share + (index < rest)


def _rows_per_head(rows: int, num_heads: int) -> int:
    if rows % num_heads:
        raise CannotSplit(f"{rows} rows are not those of {num_heads} heads")
    return rows // num_heads


def _scaled(heads: Range, dim: int) -> Range:
    return heads[0] * dim, heads[1] * dim


def _merge(ranges: list[Range]) -> list[Range]:
    merged = ranges[:1]
    for start, stop in itertools.islice(ranges, 1, None):
        if merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
