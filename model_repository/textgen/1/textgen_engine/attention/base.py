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
    """What a model's attention layers ask for beside plain softmax attention with a causal mask; see `Scoring`."""

    sliding_window: bool = False
    chunks: bool = False
    soft_cap: bool = False
    sinks: bool = False
    alibi: bool = False


@dataclass(frozen=True, eq=False)
class Scoring:
    """How one layer turns queries and keys into weights: softmax over the visible keys of

        soft_cap * tanh(scale * q . k / soft_cap) + alibi_slope * (key position - query position)

    scale: of the scores. soft_cap: None leaves them uncapped.
    sliding_window: a token sees itself and at most sliding_window - 1 tokens before it; None sees all.
    chunk_size: positions are cut into chunks of so many, and a token sees nothing before its own chunk.
    sinks: [num_heads], one more score per head, of a key whose value is zero.
    alibi_slopes: float32 [num_heads].
    """

    scale: float
    sliding_window: int | None = None
    chunk_size: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None

    @property
    def features(self) -> AttentionFeatures:
        """What of it a backend must be able to do."""
        return AttentionFeatures(
            sliding_window=self.sliding_window is not None,
            chunks=self.chunk_size is not None,
            soft_cap=self.soft_cap is not None,
            sinks=self.sinks is not None,
            alibi=self.alibi_slopes is not None,
        )

    def first_visible(self, position: int) -> int:
        """The first position that a query at `position` may see."""
        first = 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1)
        return first if self.chunk_size is None else max(first, position // self.chunk_size * self.chunk_size)


@dataclass
class AttentionMetadata:
    """One step, as lists for the host and tensors for the device.

    num_decodes: leading sequences with exactly one query row.
    query_lens, seq_lens: per sequence, tokens.
    block_tables: int64 (int32 in a graph's buffers) [num_sequences, max_blocks], rows padded with 0.
    slot_blocks, slot_offsets: int64 [num_tokens], the block and the place in it where each token's K and V go.
    keys, values: the cache's tensors, one per layer.
    device_seq_lens: seq_lens as int32 on the device, where they are a buffer of their own; None: not there yet.
    wanted_rows: query rows, in ascending order, beside which the last layer's results are not asked for; a backend's
        plan may make use of it. None: all are.
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
    device_seq_lens: torch.Tensor | None = None
    wanted_rows: list[int] | None = None
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
        scoring: Scoring,
    ) -> torch.Tensor:
        """Store key and value, then attend.

        query [num_tokens, num_heads, head_dim], key [num_tokens, num_kv_heads, head_dim],
        value [num_tokens, num_kv_heads, value_dim] -> [num_tokens, num_heads, value_dim].
        """
