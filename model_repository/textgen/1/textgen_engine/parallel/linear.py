"""Modules around the layers that a rank holds only a part of: they add up, mask or gather, once per layer.

What they wrap may be any module (a plain, compiled or quantized layer, an adapter's): only inputs and results count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from textgen_engine.parallel.group import Collectives


class RankWrapper(torch.nn.Module):
    """Does what `inner` does on this rank, and what there is to do with the other ranks."""

    def __init__(self, inner: torch.nn.Module, collectives: Collectives) -> None:
        super().__init__()
        self.inner = inner
        self._collectives = collectives


class SummedOverRanks(RankWrapper):
    """A module whose result on each rank is one addend: a layer split by its inputs, or experts split inside."""

    def forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        result: torch.Tensor = self.inner(*arguments, **keywords)
        return self._collectives.all_reduce(result)


class VocabularyEmbedding(RankWrapper):
    """An embedding of which each rank holds the rows from `start` on: foreign ids give zeros, the sum is whole."""

    def __init__(self, inner: torch.nn.Module, start: int, num_rows: int, collectives: Collectives) -> None:
        super().__init__(inner, collectives)
        self._start, self._num_rows = start, num_rows

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        local = input_ids - self._start
        is_foreign = (local < 0) | (local >= self._num_rows)
        rows: torch.Tensor = self.inner(local.masked_fill(is_foreign, 0))
        return self._collectives.all_reduce(rows.masked_fill(is_foreign[..., None], 0))


class VocabularyHead(RankWrapper):
    """A head of which each rank holds part of the vocabulary: rank 0 gets all logits, the others keep their own."""

    def __init__(self, inner: torch.nn.Module, vocab_size: int, width: int, collectives: Collectives) -> None:
        super().__init__(inner, collectives)
        self._vocab_size, self._width = vocab_size, width

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        local: torch.Tensor = self.inner(hidden_states)
        # Parts of one size travel; the last rank's may be smaller.
        padded = functional.pad(local, (0, self._width - local.shape[-1]))
        gathered = self._collectives.gather(padded)
        if gathered is None:
            return local
        return torch.cat(gathered, dim=-1)[..., : self._vocab_size]


class NormOverHeads(torch.nn.Module):
    """RMSNorm over the heads of all ranks (`width` numbers), of which x [..., local] are this rank's."""

    def __init__(self, inner: Any, width: int, collectives: Collectives) -> None:
        super().__init__()
        self.weight = inner.weight
        self._epsilon = inner.variance_epsilon
        self._width = width
        self._collectives = collectives

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        mean = self._collectives.all_reduce(wide.square().sum(-1, keepdim=True)) / self._width
        normed: torch.Tensor = self.weight * (wide * torch.rsqrt(mean + self._epsilon))
        return normed.to(x.dtype)
