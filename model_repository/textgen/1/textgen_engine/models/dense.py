"""Serves a model that paged attention cannot serve: every step computes the texts anew, as transformers would.

Nothing of such a model can be cached, so what is cached is the tokens themselves: one layer of the paged KV cache holds
their ids, in digits that every float type represents exactly. Paging, chunks, prefix cache, choices and preemption are
the engine's as ever. A token of a text of n costs what a prompt of n costs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from textgen_engine.attention.base import AttentionMetadata
from textgen_engine.attention.paging import gather_blocks, store
from textgen_engine.kv_cache import LayerShape

# Ids as four digits of base 128: whole numbers up to 256 are exact in bfloat16.
_BASE, _NUM_DIGITS = 128, 4
DENSE_LAYERS = [LayerShape(num_kv_heads=1, head_dim=_NUM_DIGITS, value_dim=1)]
# The longest text: the cost of one grows with the square of its length.
MAX_POSITIONS = 4096


class DenseFallback(torch.nn.Module):
    """Stands in for a model; called like one whose attention is ours."""

    def __init__(self, model: Any) -> None:
        """Takes the model over; its attention is set to transformers' own."""
        super().__init__()
        model.__dict__.pop("forward", None)  # what models/families/step.py may have put there
        model.set_attn_implementation("eager")
        self.model = model

    def forward(
        self,
        *,
        input_ids: torch.Tensor,
        attention_metadata: AttentionMetadata,
        logits_to_keep: torch.Tensor | int = 0,
        **_: Any,  # positions, the attention backend and use_cache: the model counts for itself and caches nothing
    ) -> SimpleNamespace:
        """input_ids [1, num_tokens] of all sequences -> `logits` [1, num_rows, vocab] of the rows to keep (an int:
        one row of zeros, for a step that samples nothing)."""
        metadata = attention_metadata
        keys = metadata.keys[0]
        _store_ids(input_ids[0], metadata)
        wanted = set() if isinstance(logits_to_keep, int) else set(logits_to_keep.tolist())
        rows: dict[int, torch.Tensor] = {}
        start = 0
        for index, (query_len, seq_len) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
            here = sorted(wanted & set(range(start, start + query_len)))
            if here:
                blocks = metadata.block_tables[index : index + 1, : -(-seq_len // keys.shape[2])]
                digits = gather_blocks(keys, blocks, keys.dtype)[0, 0, :seq_len]  # [seq_len, _NUM_DIGITS]
                digits = digits.to(torch.int64)
                logits = self.model(input_ids=(digits * _weights(digits.device)).sum(-1)[None], use_cache=False).logits
                rows |= {row: logits[0, row - start - query_len] for row in here}
            start += query_len
        if isinstance(logits_to_keep, int):
            return SimpleNamespace(logits=torch.zeros(1, 1, 1, device=input_ids.device))
        return SimpleNamespace(logits=torch.stack([rows[row] for row in logits_to_keep.tolist()])[None])


def _weights(device: torch.device) -> torch.Tensor:
    return _BASE ** torch.arange(_NUM_DIGITS, device=device)


def _store_ids(ids: torch.Tensor, metadata: AttentionMetadata) -> None:
    keys, values = metadata.keys[0], metadata.values[0]
    digits = (ids[:, None] // _weights(ids.device) % _BASE).to(keys.dtype)[:, None]  # [num_tokens, 1, _NUM_DIGITS]
    store(digits, values.new_zeros(len(ids), 1, 1), keys, values, metadata)
