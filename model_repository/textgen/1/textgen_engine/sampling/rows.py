"""`RowSet` and `SlotRows`: which rows of a batch an option concerns, and the state kept per slot.

Both exist so that an option costs nothing to the requests that do not use it, and cannot change their result: the
rows concerned are taken out, worked on and put back; all others are never read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from textgen_engine.transfer import to_device


class RowSet:
    """Some rows of a batch, in order. Free of charge when it holds all of them."""

    def __init__(self, rows: Sequence[int], num_rows: int, device: torch.device) -> None:
        self.rows = list(rows)
        self.index = to_device(self.rows, device, torch.int64)  # [n]
        self._all = len(self.rows) == num_rows

    def __len__(self) -> int:
        return len(self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def take(self, values: Tensor) -> Tensor:
        """These rows of `values`: the tensor itself when all rows are meant, else a copy."""
        return values if self._all else values.index_select(0, self.index)

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write `values` [n, ...] back into these rows of `target`; nothing to do when `values` is the target."""
        if values is not target:
            target.index_copy_(0, self.index, values)


class SlotRows:
    """A tensor [capacity, width] with one row for each slot that asked for one; grows by doubling, never shrinks.

    `tensor` is replaced when it grows, so read it at each use. Rows are handed out filled with `fill`.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device, fill: float = 0) -> None:
        self.tensor = torch.empty((0, width), dtype=dtype, device=device)
        self._fill = fill
        self._row_of_slot: dict[int, int] = {}
        self._free: list[int] = []

    def __contains__(self, slot: int) -> bool:
        return slot in self._row_of_slot

    def claim(self, slot: int) -> Tensor:
        """Give `slot` a row and return it as a view [width], for filling."""
        assert slot not in self._row_of_slot, f"slot {slot} already has a row"
        if not self._free:
            capacity, width = self.tensor.shape
            grown = self.tensor.new_empty((max(4, 2 * capacity), width))
            grown[:capacity] = self.tensor
            self.tensor = grown
            self._free = list(range(capacity, grown.shape[0]))[::-1]
        row = self._row_of_slot[slot] = self._free.pop()
        return self.tensor[row].fill_(self._fill)

    def widen(self, width: int) -> None:
        """Make every row at least `width` wide; what was there stays at the right end, `fill` goes to its left."""
        capacity, old_width = self.tensor.shape
        if width > old_width:
            widened = self.tensor.new_full((capacity, width), self._fill)
            widened[:, width - old_width :] = self.tensor
            self.tensor = widened

    def release(self, slot: int) -> None:
        """Take the row back; no effect for a slot without one."""
        row = self._row_of_slot.pop(slot, None)
        if row is not None:
            self._free.append(row)

    def index_of(self, slots: Sequence[int]) -> Tensor:
        """Row numbers of `slots`, each of which has a row. -> [n] int64."""
        return to_device([self._row_of_slot[slot] for slot in slots], self.tensor.device, torch.int64)


def valid_ids(ids: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """The ids that the model can produce, as int64 on `device`; a tokenizer may know more ids than the model."""
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    return to_device(torch.from_numpy(array[(array >= 0) & (array < vocab_size)]), device)
