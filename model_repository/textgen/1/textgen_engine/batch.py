"""A `ScheduledBatch` as tensors. The only place where token ids and lengths become tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from textgen_engine.adapters.spec import StepAdapters, find_runs
from textgen_engine.attention.base import AttentionMetadata
from textgen_engine.kv_cache import KVCache
from textgen_engine.scheduler import ScheduledBatch, ScheduledSequence
from textgen_engine.sequence import Sequence
from textgen_engine.transfer import to_device


@dataclass(frozen=True)
class StepLists:
    """Token ids, logits rows and (padded) block tables on the host, for whoever sends them on."""

    input_ids: list[int]
    logits_rows: list[int]
    block_tables: list[list[int]]


@dataclass(frozen=True, eq=False)
class PendingTokens:
    """Tokens that are on the device alone: of each sequence that a launched step samples, its row in token_ids, int64
    [num_rows]."""

    rows: dict[Sequence, int]
    token_ids: torch.Tensor


@dataclass
class BatchInputs:
    """One step's tensors, on the model's device.

    input_ids, positions: int64 [num_tokens]. attention: where K and V go and what each sequence sees.
    logits_rows: int64 [num_rows], the flattened token rows whose logits are wanted: first one per entry of
    `sampled`, then, for each entry of `prompt_scored`, one per token of its chunk, then one per guessed token.
    sampled: entries (of the scheduled batch) whose last known token is in this step.
    guessed_rows: where the logits rows behind a sequence's guessed tokens begin.
    adapters: the rows of each LoRA adapter; None: no sequence of the step has one.
    prompt_scored: entries whose prompt's log-probabilities were asked for.
    lists: what some of the tensors were made from; None where they came from another process.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionMetadata
    logits_rows: torch.Tensor
    sampled: list[ScheduledSequence]
    prompt_scored: list[ScheduledSequence]
    guessed_rows: dict[Sequence, int] = field(default_factory=dict)
    adapters: StepAdapters | None = None
    lists: StepLists | None = None


def build_inputs(
    batch: ScheduledBatch, cache: KVCache, device: torch.device, pending: PendingTokens | None = None
) -> BatchInputs:
    """Flatten the batch: decodes first, in the order given, then chunks. Mutates nothing, waits for nothing.

    pending: where the tokens are that the host does not know yet (Sequence.num_pending); they go from there into the
    input ids on the device.

    A guessed token is a decode of its own: one row, one token further than the row before it. Every layer stores the
    keys and values of all rows before any row attends, so it sees the guesses it stands behind and no others.
    """
    decodes = [entry for entry in batch.entries if entry.num_tokens == 1]
    chunks = [entry for entry in batch.entries if entry.num_tokens > 1]
    entries = decodes + chunks
    block_size = cache.block_size
    input_ids: list[int] = []
    positions: list[int] = []
    slot_blocks: list[int] = []
    last_row: list[int] = []
    spans: list[tuple[ScheduledSequence, int, int]] = []  # what attention takes for a sequence: from, to
    carried: list[tuple[int, int]] = []  # rows of input ids and of pending token ids
    for entry in entries:
        sequence, end = entry.sequence, entry.start + entry.num_tokens
        input_ids += sequence.token_ids[entry.start : end]
        if end > len(sequence.token_ids):
            assert pending is not None
            carried.append((len(input_ids), pending.rows[sequence]))
            input_ids.append(0)
        last_row.append(len(input_ids) - 1)
        spans.append((entry, entry.start, end))
        input_ids += sequence.draft[: entry.num_guessed]
        spans += [(entry, position, position + 1) for position in range(end, end + entry.num_guessed)]
        positions += range(entry.start, end + entry.num_guessed)
        slot_blocks += [
            sequence.block_table[position // block_size] for position in range(entry.start, end + entry.num_guessed)
        ]
    max_blocks = max(-(-end // block_size) for _, _, end in spans)
    block_tables = [
        (entry.sequence.block_table + [0] * max_blocks)[:max_blocks] for entry, _, _ in spans
    ]  # padding is never read: seq_lens bounds every access
    sampled = [(entry, row) for entry, row in zip(entries, last_row, strict=True) if entry.is_last]
    scored = [
        (entry, row)
        for entry, row in zip(entries, last_row, strict=True)
        if entry.sequence.request.output.prompt_logprobs and entry.start < entry.sequence.num_prompt_tokens
    ]
    rows = [row for _, row in sampled]
    for entry, row in scored:
        rows += range(row - entry.num_tokens + 1, row + 1)
    guessed_rows: dict[Sequence, int] = {}
    guessing = [(entry, row) for entry, row in sampled if entry.num_guessed]
    for entry, row in guessing:
        guessed_rows[entry.sequence] = len(rows)
        rows += range(row + 1, row + 1 + entry.num_guessed)
    logits_of = [(entry, 1) for entry, _ in sampled] + [(entry, entry.num_tokens) for entry, _ in scored]
    logits_of += [(entry, entry.num_guessed) for entry, _ in guessing]
    positions_tensor = to_device(positions, device)
    ids_tensor = to_device(input_ids, device)
    if carried:
        assert pending is not None
        targets, sources = to_device(list(zip(*carried, strict=True)), device)
        ids_tensor.index_copy_(0, targets, pending.token_ids.index_select(0, sources))
    return BatchInputs(
        input_ids=ids_tensor,
        positions=positions_tensor,
        attention=AttentionMetadata(
            num_decodes=len(spans) - len(chunks),
            query_lens=[end - start for _, start, end in spans],
            seq_lens=[end for _, _, end in spans],
            # Nested lists: NumPy reads them four times as fast as torch.tensor does.
            block_tables=to_device(torch.from_numpy(np.array(block_tables, dtype=np.int64)), device),
            slot_blocks=to_device(slot_blocks, device),
            slot_offsets=positions_tensor % block_size,
            keys=cache.keys,
            values=cache.values,
        ),
        logits_rows=to_device(rows, device, torch.int64),
        sampled=[entry for entry, _ in sampled],
        prompt_scored=[entry for entry, _ in scored],
        guessed_rows=guessed_rows,
        adapters=_adapters(entries, logits_of),
        lists=StepLists(input_ids, rows, block_tables),
    )


def _adapters(entries: list[ScheduledSequence], logits: list[tuple[ScheduledSequence, int]]) -> StepAdapters | None:
    """logits: entries with the number of logits rows of each, in the order of the rows."""
    if all(entry.sequence.adapter is None for entry in entries):
        return None
    lengths = [entry.num_tokens + entry.num_guessed for entry in entries]
    logits_lengths = [length for _, length in logits]
    return StepAdapters(
        tokens=find_runs([entry.sequence.adapter for entry in entries], lengths),
        num_tokens=sum(lengths),
        logits=find_runs([entry.sequence.adapter for entry, _ in logits], logits_lengths),
        num_logits=sum(logits_lengths),
    )
