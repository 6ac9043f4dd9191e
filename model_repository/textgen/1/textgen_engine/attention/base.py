"""The interface every attention backend implements, and the metadata of one step.

Tokens of all sequences of a step lie behind one another ("flattened"). Sequence i of the step owns the query rows
cu_seqlens_q[i]:cu_seqlens_q[i + 1]; with them its first seq_lens[i] tokens have their keys and values in the cache.
Decodes (one query row each) come first, chunks of prompts behind them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionFeatures:
    """What a model's attention layers ask for beside plain softmax attention with a causal mask."""

    sliding_window: bool = False
    soft_cap: bool = False
    sinks: bool = False


@dataclass
class AttentionMetadata:
    """One step, as lists for the host and tensors for the device.

    num_decodes: leading sequences with exactly one query row.
    query_lens, seq_lens: per sequence, tokens.
    block_tables: int64 [num_sequences, max_blocks], rows padded with 0.
    slot_blocks, slot_offsets: int64 [num_tokens], the block and the place in it where each token's K and V go.
    keys, values: the cache's tensors, one per layer.
    plan: what the backend's `prepare` worked out once for all layers.
    """

    num_decodes: int
    query_lens: list[int]
    seq_lens: list[int]
    block_tables: torch.Tensor
    slot_blocks: torch.Tensor
    slot_offsets: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    plan: object = None


class AttentionBackend(ABC):
    """Stores a step's keys and values and attends to everything stored. Stateless between steps."""

    @abstractmethod
    def check(self, features: AttentionFeatures) -> None:
        """Raise ModelLoadError when the backend lacks a feature, so that a model is refused when it is loaded."""

    @abstractmethod
    def prepare(self, metadata: AttentionMetadata) -> None:
        """Work out once per step what all layers share; fills metadata.plan."""

    @abstractmethod
    def run(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Store key and value, then attend.

        query [num_tokens, num_heads, head_dim], key [num_tokens, num_kv_heads, head_dim],
        value [num_tokens, num_kv_heads, value_dim] -> [num_tokens, num_heads, value_dim].
        sliding_window: a token sees itself and at most sliding_window - 1 tokens before it; None sees all.
        """
