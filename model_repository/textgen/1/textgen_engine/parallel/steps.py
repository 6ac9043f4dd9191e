"""One step's schedule as words on the wire: what rank 0 tells the others, and the tensors they make of it.

Sent once per step. Positions and slots follow from lengths and block tables, so they do not travel; block tables
travel without their padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from textgen_engine.adapters.spec import AdapterRun, StepAdapters
from textgen_engine.attention.base import AttentionMetadata
from textgen_engine.batch import BatchInputs
from textgen_engine.kv_cache import KVCache

_HEADER_WORDS = 8


@dataclass(frozen=True)
class NewCache:
    """From now on steps use a fresh cache of this size."""

    num_blocks: int
    block_size: int
    dtype: torch.dtype
    has_scratch: bool = False


@dataclass(frozen=True)
class CaptureGraphs:
    """All ranks capture decode steps of these numbers of rows, at the same time."""

    sizes: tuple[int, ...]
    max_seq_len: int


def encode_step(inputs: BatchInputs, copies: list[tuple[int, int]], graph_size: int | None = None) -> np.ndarray:
    """int32 words: header, token ids, query lengths, sequence lengths, logits rows, copied blocks, rows of adapters,
    block tables. graph_size: the captured size that all ranks replay; None for a step that runs as it is."""
    attention, lists = inputs.attention, inputs.lists
    assert lists is not None
    block_size = attention.keys[0].shape[2]
    token_runs = () if inputs.adapters is None else inputs.adapters.tokens
    logits_runs = () if inputs.adapters is None else inputs.adapters.logits
    words = [
        *(len(lists.input_ids), len(attention.seq_lens), attention.num_decodes, len(lists.logits_rows), len(copies)),
        *(len(token_runs), len(logits_runs), graph_size or 0),
        *lists.input_ids,
        *attention.query_lens,
        *attention.seq_lens,
        *lists.logits_rows,
        *(block for pair in copies for block in pair),
        *(number for run in (*token_runs, *logits_runs) for number in (run.slot, run.start, run.stop)),
    ]
    for table, length in zip(lists.block_tables, attention.seq_lens, strict=True):
        words += table[: -(-length // block_size)]
    return np.array(words, dtype=np.int32)


def decode_step(
    words: np.ndarray, cache: KVCache, device: torch.device
) -> tuple[BatchInputs, list[tuple[int, int]], int | None]:
    """What `encode_step` was given, on this rank's cache and device; without the sequences, which stay with rank 0."""
    header = words[:_HEADER_WORDS].tolist()
    num_tokens, num_sequences, num_decodes, num_rows, num_copies, num_token_runs, num_logits_runs, graph_size = header
    lengths = (
        num_tokens,
        num_sequences,
        num_sequences,
        num_rows,
        2 * num_copies,
        3 * num_token_runs,
        3 * num_logits_runs,
    )
    ends = np.cumsum((_HEADER_WORDS, *lengths))
    input_ids, query_lens, seq_lens, rows, copies, token_runs, logits_runs, blocks = np.split(
        words.astype(np.int64), ends
    )[1:]
    block_size = cache.block_size
    num_blocks = -(-seq_lens // block_size)
    tables = np.zeros((num_sequences, int(num_blocks.max())), dtype=np.int64)
    tables[np.arange(tables.shape[1]) < num_blocks[:, None]] = blocks
    sequence_of_token = np.repeat(np.arange(num_sequences), query_lens)
    first_token = np.cumsum(query_lens) - query_lens
    positions = np.arange(num_tokens) - first_token[sequence_of_token] + (seq_lens - query_lens)[sequence_of_token]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    inputs = BatchInputs(
        input_ids=tensor(input_ids),
        positions=tensor(positions),
        attention=AttentionMetadata(
            num_decodes=num_decodes,
            query_lens=query_lens.tolist(),
            seq_lens=seq_lens.tolist(),
            block_tables=tensor(tables),
            slot_blocks=tensor(tables[sequence_of_token, positions // block_size]),
            slot_offsets=tensor(positions % block_size),
            keys=cache.keys,
            values=cache.values,
        ),
        logits_rows=tensor(rows),
        sampled=[],
        prompt_scored=[],
        adapters=StepAdapters(_runs(token_runs), num_tokens, _runs(logits_runs), num_rows) if num_token_runs else None,
    )
    pairs = copies.reshape(-1, 2).tolist()
    return inputs, [(source, target) for source, target in pairs], graph_size or None


def _runs(numbers: np.ndarray) -> tuple[AdapterRun, ...]:
    return tuple(AdapterRun(slot, start, stop) for slot, start, stop in numbers.reshape(-1, 3).tolist())
