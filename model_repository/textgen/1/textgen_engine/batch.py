"""A `ScheduledBatch` as tensors. The only place where token ids and lengths become tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from textgen_engine.adapters.spec import StepAdapters, find_runs
from textgen_engine.attention.base import AttentionMetadata
from textgen_engine.kv_cache import KVCache
from textgen_engine.scheduler import ScheduledBatch, ScheduledSequence


@dataclass(frozen=True)
class StepLists:
    """Token ids, logits rows and (padded) block tables on the host, for whoever sends them on."""

    input_ids: list[int]
    logits_rows: list[int]
    block_tables: list[list[int]]


@dataclass
class BatchInputs:
    """One step's tensors, on the model's device.

    input_ids, positions: int64 [num_tokens]. attention: where K and V go and what each sequence sees.
    logits_rows: int64 [num_rows], the flattened token rows whose logits are wanted: first one per entry of
    `sampled`, then, for each entry of `prompt_scored`, one per token of its chunk.
    sampled: entries (of the scheduled batch) whose last known token is in this step.
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
    adapters: StepAdapters | None = None
    lists: StepLists | None = None


def build_inputs(batch: ScheduledBatch, cache: KVCache, device: torch.device) -> BatchInputs:
    """Flatten the batch: decodes first, in the order given, then chunks. Mutates nothing."""
    decodes = [entry for entry in batch.entries if entry.num_tokens == 1]
    entries = decodes + [entry for entry in batch.entries if entry.num_tokens > 1]
    block_size = cache.block_size
    input_ids: list[int] = []
    positions: list[int] = []
    slot_blocks: list[int] = []
    last_row: list[int] = []
    for entry in entries:
        sequence, end = entry.sequence, entry.start + entry.num_tokens
        input_ids += sequence.token_ids[entry.start : end]
        positions += range(entry.start, end)
        slot_blocks += [sequence.block_table[position // block_size] for position in range(entry.start, end)]
        last_row.append(len(input_ids) - 1)
    max_blocks = max(-(-(entry.start + entry.num_tokens) // block_size) for entry in entries)
    block_tables = [
        (entry.sequence.block_table + [0] * max_blocks)[:max_blocks] for entry in entries
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
    positions_tensor = torch.tensor(positions, device=device)
    return BatchInputs(
        input_ids=torch.tensor(input_ids, device=device),
        positions=positions_tensor,
        attention=AttentionMetadata(
            num_decodes=len(decodes),
            query_lens=[entry.num_tokens for entry in entries],
            seq_lens=[entry.start + entry.num_tokens for entry in entries],
            block_tables=torch.tensor(block_tables, device=device),
            slot_blocks=torch.tensor(slot_blocks, device=device),
            slot_offsets=positions_tensor % block_size,
            keys=cache.keys,
            values=cache.values,
        ),
        logits_rows=torch.tensor(rows, dtype=torch.int64, device=device),
        sampled=[entry for entry, _ in sampled],
        prompt_scored=[entry for entry, _ in scored],
        adapters=_adapters(entries, [(entry, 1) for entry, _ in sampled] + [(e, e.num_tokens) for e, _ in scored]),
        lists=StepLists(input_ids, rows, block_tables),
    )


def _adapters(entries: list[ScheduledSequence], logits: list[tuple[ScheduledSequence, int]]) -> StepAdapters | None:
    """logits: entries with the number of logits rows of each, in the order of the rows."""
    if all(entry.sequence.adapter is None for entry in entries):
        return None
    lengths = [entry.num_tokens for entry in entries]
    logits_lengths = [length for _, length in logits]
    return StepAdapters(
        tokens=find_runs([entry.sequence.adapter for entry in entries], lengths),
        num_tokens=sum(lengths),
        logits=find_runs([entry.sequence.adapter for entry, _ in logits], logits_lengths),
        num_logits=sum(logits_lengths),
    )
