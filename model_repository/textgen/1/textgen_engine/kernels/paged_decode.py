"""Decode attention over the paged cache in Triton's language: one query row per sequence, keys read where they lie.

The keys of a sequence are split into runs that programs of their own attend to (flash decoding, Dao et al. 2023), so
that a single long sequence fills the device; a second pass joins the runs' results by their log-sum-exp. The query
heads that share a key-value head are the rows of one tile, so that every key is read once for all of them.

    grid  (sequence, key-value head, run)          one run: tiles of TILE keys, online softmax
          (sequence, head)                         joins the runs, and the sink, which belongs to none of them

Sequence lengths and block tables are read on the device and the grid depends on neither, which is what CUDA graphs
need. Rows whose length is 0 give zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from textgen_engine.attention.base import Scoring

_LOG2E = tl.constexpr(1.4426950408889634)
# Runs a sequence is cut into at most, and the keys below which another run does not pay.
MAX_RUNS = 32
MIN_KEYS_PER_RUN = 256
# Matrix units take no fewer rows.
_MIN_ROWS = 16


def paged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scoring: Scoring,
    *,
    num_runs: int = 1,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [n, num_heads, dim], the last token of each sequence; keys [num_blocks, kv_heads, block_size, dim] and
    values [..., value_dim], possibly of 8-bit floats that stand for their value times key_scale or value_scale;
    block_tables int32 or int64 [n, max_blocks]; seq_lens int32 [n] -> [n, num_heads, value_dim].

    num_runs: how many parts each sequence's keys are split into (see choose_num_runs).
    """
    num_rows, num_heads, dim = query.shape
    num_kv_heads, block_size, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    assert num_heads % num_kv_heads == 0 and keys.shape[3] == dim and values.shape[:3] == keys.shape[:3]
    assert query.stride(2) == keys.stride(3) == values.stride(3) == 1 and block_tables.stride(1) == 1
    assert seq_lens.dtype is torch.int32 and seq_lens.is_contiguous() and len(seq_lens) == num_rows
    if output is None:
        output = query.new_empty(num_rows, num_heads, value_dim)
    assert output.is_contiguous() and num_runs <= MAX_RUNS
    group = num_heads // num_kv_heads
    is_wide = max(dim, value_dim) > 128 or query.dtype is torch.float32
    partial = query.new_empty(num_rows, num_heads, num_runs, value_dim, dtype=torch.float32)
    sums = query.new_empty(num_rows, num_heads, num_runs, dtype=torch.float32)
    sinks, slopes = scoring.sinks, scoring.alibi_slopes
    if num_rows == 0:
        return output
    _attend_run[(num_rows, num_kv_heads, num_runs)](
        query,
        keys,
        values,
        block_tables,
        seq_lens,
        query if slopes is None else slopes,
        partial,
        sums,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        block_tables.stride(0),
        num_runs,
        scoring.scale * key_scale,
        value_scale,
        scoring.soft_cap or 0.0,
        scoring.sliding_window or 0,
        scoring.chunk_size or 0,
        GROUP=group,
        ROWS=max(_MIN_ROWS, triton.next_power_of_2(group)),
        DIM=dim,
        DIM_PADDED=max(_MIN_ROWS, triton.next_power_of_2(dim)),
        VALUE_DIM=value_dim,
        VALUE_DIM_PADDED=max(_MIN_ROWS, triton.next_power_of_2(value_dim)),
        BLOCK_SIZE=block_size,
        TILE=32 if is_wide else 64,
        HAS_SOFT_CAP=scoring.soft_cap is not None,
        HAS_WINDOW=scoring.sliding_window is not None,
        HAS_CHUNKS=scoring.chunk_size is not None,
        HAS_SLOPES=slopes is not None,
        # Triton's interpreter multiplies the words that bfloat16 numbers are kept in, not the numbers.
        WIDENS=triton.knobs.runtime.interpret,
        num_warps=4,
        num_stages=2,
    )
    _join_runs[(num_rows, num_heads)](
        partial,
        sums,
        sums if sinks is None else sinks,
        output,
        num_runs,
        MOST_RUNS=MAX_RUNS,
        VALUE_DIM=value_dim,
        VALUE_DIM_PADDED=triton.next_power_of_2(value_dim),
        HAS_SINKS=sinks is not None,
        num_warps=4,
    )
    return output


def choose_num_runs(num_rows: int, num_kv_heads: int, max_keys: int, num_processors: int) -> int:
    """Runs per sequence that keep so many multiprocessors busy, for sequences of at most max_keys."""
    wanted = -(-2 * num_processors // max(num_rows * num_kv_heads, 1))
    return max(1, min(wanted, MAX_RUNS, -(-max_keys // MIN_KEYS_PER_RUN)))


def paged_decode_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scoring: Scoring,
    *,
    num_runs: int = 1,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same with PyTorch's operations, in float32, over all places that the block tables name; num_runs changes
    nothing."""
    num_rows, num_heads, dim = query.shape
    num_kv_heads, value_dim = keys.shape[1], values.shape[3]
    tables = block_tables.long()

    def gathered(cache: torch.Tensor, scale: float) -> torch.Tensor:  # -> [n, kv_heads, num_keys, dim]
        stored = cache.float()[tables].transpose(1, 2)
        return stored.reshape(num_rows, num_kv_heads, -1, cache.shape[3]) * scale

    k, v = gathered(keys, key_scale), gathered(values, value_scale)
    q = query.float().view(num_rows, num_kv_heads, -1, dim)
    scores = (q @ k.transpose(2, 3)).reshape(num_rows, num_heads, -1) * scoring.scale
    places = torch.arange(scores.shape[2], device=query.device)
    positions = (seq_lens.long() - 1).view(-1, 1, 1)
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    if scoring.alibi_slopes is not None:
        scores = scores + scoring.alibi_slopes.view(1, -1, 1) * (places - positions)
    hidden = places > positions
    if scoring.sliding_window is not None:
        hidden = hidden | (places <= positions - scoring.sliding_window)
    if scoring.chunk_size is not None:
        hidden = hidden | (places < positions // scoring.chunk_size * scoring.chunk_size)
    scores = scores.masked_fill(hidden, float("-inf"))
    if scoring.sinks is None:
        weights = torch.softmax(scores, -1).nan_to_num()  # a row without keys
    else:
        sinks = scoring.sinks.float().view(1, -1, 1).expand(num_rows, -1, 1)
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
    shared = (positions < 0) | hidden
    v = v.masked_fill(shared.view(num_rows, 1, -1, 1), 0.0)  # what nobody may see may be anything, NaN too
    attended = weights.view(num_rows, num_kv_heads, -1, weights.shape[2]) @ v
    attended = attended.reshape(num_rows, num_heads, value_dim).to(query.dtype)
    return attended if output is None else output.copy_(attended)


# What differs from step to step is not to be compiled for.
@triton.jit(do_not_specialize=["table_stride", "num_runs", "window", "chunk_size"])
def _attend_run(
    query_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    lens_ptr,
    slopes_ptr,
    partial_ptr,
    sums_ptr,
    query_row_stride,
    query_head_stride,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
    value_block_stride,
    value_head_stride,
    value_slot_stride,
    table_stride,
    num_runs,
    scale,
    value_scale,
    soft_cap,
    window,
    chunk_size,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CHUNKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    WIDENS: tl.constexpr,
):
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    run = tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    length = tl.load(lens_ptr + sequence)
    position = length - 1
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(first, position - window + 1)
    if HAS_CHUNKS:
        first = tl.maximum(first, position // chunk_size * chunk_size)
    # Runs are whole tiles, counted from the first visible key, and as even as that allows.
    num_tiles = tl.cdiv(tl.maximum(length - first, 0), TILE)
    tiles_per_run = tl.cdiv(num_tiles, num_runs)
    begin = first + run * tiles_per_run * TILE
    end = tl.minimum(begin + tiles_per_run * TILE, length)

    rows = tl.arange(0, ROWS)
    row_mask = rows < GROUP
    heads = kv_head * GROUP + rows
    dims = tl.arange(0, DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    query = tl.load(
        query_ptr + sequence.to(tl.int64) * query_row_stride + heads[:, None] * query_head_stride + dims[None, :],
        mask=row_mask[:, None] & (dims[None, :] < DIM),
        other=0.0,
    )
    if WIDENS:
        query = query.to(tl.float32)
    if HAS_SLOPES:
        slopes = tl.load(slopes_ptr + heads, mask=row_mask, other=0.0).to(tl.float32)
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, VALUE_DIM_PADDED), tl.float32)
    for start in range(begin, end, TILE):
        places = start + tl.arange(0, TILE)
        seen = places < end
        blocks = tl.load(tables_ptr + sequence.to(tl.int64) * table_stride + places // BLOCK_SIZE, mask=seen, other=0)
        blocks = blocks.to(tl.int64)
        slots = places % BLOCK_SIZE
        key = tl.load(
            keys_ptr
            + (blocks * key_block_stride + kv_head * key_head_stride + slots * key_slot_stride)[None, :]
            + dims[:, None],
            mask=seen[None, :] & (dims[:, None] < DIM),
            other=0.0,
        ).to(query.dtype)
        scores = tl.dot(query, key, input_precision="ieee") * scale  # [ROWS, TILE]
        if HAS_SOFT_CAP:
            scores = soft_cap * (2.0 * tl.sigmoid(2.0 * scores / soft_cap) - 1.0)  # soft_cap * tanh(scores / soft_cap)
        if HAS_SLOPES:
            scores += slopes[:, None] * (places - position)[None, :].to(tl.float32)
        scores = tl.where(seen[None, :], scores * _LOG2E, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        correction = tl.exp2(highest - new_highest)
        total = total * correction + tl.sum(weights, 1)
        value = tl.load(
            values_ptr
            + (blocks * value_block_stride + kv_head * value_head_stride + slots * value_slot_stride)[:, None]
            + value_dims[None, :],
            mask=seen[:, None] & (value_dims[None, :] < VALUE_DIM),
            other=0.0,
        ).to(query.dtype)
        attended = attended * correction[:, None] + tl.dot(weights.to(query.dtype), value, input_precision="ieee")
        highest = new_highest
    # A run without keys weighs nothing: its sum is -inf, and its part is zero.
    is_empty = total == 0.0
    attended = attended * value_scale / tl.where(is_empty, 1.0, total)[:, None]
    log_sum = tl.where(is_empty, -float("inf"), highest + tl.log2(tl.where(is_empty, 1.0, total)))
    place = (sequence.to(tl.int64) * num_heads + heads) * num_runs + run
    tl.store(sums_ptr + place, log_sum, mask=row_mask)
    tl.store(
        partial_ptr + place[:, None] * VALUE_DIM + value_dims[None, :],
        attended,
        mask=row_mask[:, None] & (value_dims[None, :] < VALUE_DIM),
    )


@triton.jit(do_not_specialize=["num_runs"])
def _join_runs(
    partial_ptr,
    sums_ptr,
    sinks_ptr,
    output_ptr,
    num_runs,
    MOST_RUNS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    runs = tl.arange(0, MOST_RUNS)
    dims = tl.arange(0, VALUE_DIM_PADDED)
    sums = tl.load(sums_ptr + row * num_runs + runs, mask=runs < num_runs, other=-float("inf"))
    highest = tl.max(sums, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * _LOG2E
        highest = tl.maximum(highest, sink)
    highest = tl.maximum(highest, -1e30)  # a row without keys: -inf - -inf would be no number
    weights = tl.exp2(sums - highest)
    total = tl.sum(weights, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - highest)
    partial = tl.load(
        partial_ptr + (row * num_runs + runs[:, None]) * VALUE_DIM + dims[None, :],
        mask=(runs[:, None] < num_runs) & (dims[None, :] < VALUE_DIM),
        other=0.0,
    )
    joined = tl.sum(partial * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output_ptr + row * VALUE_DIM + dims, joined.to(output_ptr.dtype.element_ty), mask=dims < VALUE_DIM)
