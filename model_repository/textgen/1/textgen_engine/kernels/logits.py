"""Sampling pieces in Triton's language that pass over whole rows of logits: grammar masks, the race of free rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from textgen_engine.sampling import randomness

_TILE = 4096
_FIRST_MULTIPLIER = tl.constexpr(0x21F0AAAD)
_SECOND_MULTIPLIER = tl.constexpr(0x735A2D97)
_LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)


def apply_bitmask(logits: torch.Tensor, row_ids: torch.Tensor, bits: torch.Tensor) -> None:
    """-inf in logits [num_rows, vocab_size] float32, in place, wherever a row of row_ids int64 [k] has no bit: bits
    int32 [k, num_words], bit j of word w is token 32 * w + j; tokens beyond the last word have none."""
    num_masked, vocab_size = len(row_ids), logits.shape[1]
    assert logits.stride(1) == 1 and row_ids.is_contiguous() and bits.stride(1) == 1 and len(bits) == num_masked
    if num_masked:
        tile = min(_TILE, triton.next_power_of_2(vocab_size))
        _apply_bitmask[(num_masked, triton.cdiv(vocab_size, tile))](
            logits,
            row_ids,
            bits,
            logits.stride(0),
            bits.stride(0),
            bits.shape[1],
            vocab_size,
            TILE=tile,
            num_warps=4,
        )


def apply_bitmask_reference(logits: torch.Tensor, row_ids: torch.Tensor, bits: torch.Tensor) -> None:
    """The same with PyTorch's operations."""
    tokens = torch.arange(logits.shape[1], device=logits.device)
    words = tokens // 32
    is_set = (bits[:, words.clamp(max=bits.shape[1] - 1)] >> (tokens % 32)) & 1
    is_allowed = (is_set == 1) & (words < bits.shape[1])
    logits[row_ids] = logits[row_ids].masked_fill(~is_allowed, float("-inf"))


def race_scores(
    logits: torch.Tensor, top: torch.Tensor, temperature: torch.Tensor, id_hashes: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """What a race over the whole vocabulary is decided by: logits float32 [n, vocab_size], less top [n, 1], over
    temperature [n, 1], plus Gumbel noise of (id_hashes int32 [vocab_size], keys int32 [n, 2]), see
    sampling/randomness.py -> float32 [n, vocab_size]. One pass in place of a dozen."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and id_hashes.is_contiguous() and keys.is_contiguous()
    top, temperature = (column.to(torch.float32).contiguous() for column in (top, temperature))
    scores = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if num_rows:
        tile = min(_TILE, triton.next_power_of_2(vocab_size))
        _race_scores[(num_rows, triton.cdiv(vocab_size, tile))](
            logits, top, temperature, id_hashes, keys, scores, logits.stride(0), vocab_size, TILE=tile, num_warps=4
        )
    return scores


def race_scores_reference(
    logits: torch.Tensor, top: torch.Tensor, temperature: torch.Tensor, id_hashes: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """The same with PyTorch's operations."""
    noise = randomness.gumbel_noise(randomness.noise_bits(id_hashes, keys), torch.float32)
    return (logits - top) / temperature.to(torch.float32) + noise


@triton.jit
def _apply_bitmask(
    logits_ptr, rows_ptr, bits_ptr, logits_stride, bits_stride, num_words, vocab_size, TILE: tl.constexpr
):
    masked = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + masked)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = tokens < vocab_size
    words = tl.load(bits_ptr + masked * bits_stride + tokens // 32, mask=in_row & (tokens // 32 < num_words), other=0)
    is_forbidden = ((words >> (tokens % 32)) & 1) == 0
    forbidden = tl.full((TILE,), -float("inf"), tl.float32)
    tl.store(logits_ptr + row * logits_stride + tokens, forbidden, mask=in_row & is_forbidden)


@triton.jit
def _race_scores(
    logits_ptr,
    top_ptr,
    temperature_ptr,
    hashes_ptr,
    keys_ptr,
    scores_ptr,
    logits_stride,
    vocab_size,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = tokens < vocab_size
    logits = tl.load(logits_ptr + row * logits_stride + tokens, mask=mask, other=-float("inf"))
    bits = tl.load(hashes_ptr + tokens, mask=mask, other=0).to(tl.uint32, bitcast=True)
    first_key = tl.load(keys_ptr + 2 * row).to(tl.uint32, bitcast=True)
    second_key = tl.load(keys_ptr + 2 * row + 1).to(tl.uint32, bitcast=True)
    # randomness.noise_bits on unsigned words, whose shifts drag no sign along.
    bits = (bits ^ first_key) * _FIRST_MULTIPLIER
    bits = bits ^ (bits >> 15)
    bits = (bits + second_key) * _SECOND_MULTIPLIER
    bits = bits ^ (bits >> 16)
    uniform = (tl.abs(bits.to(tl.int32, bitcast=True).to(tl.float32)) + 0.5) * 4.656612873077393e-10
    uniform = tl.minimum(uniform, _LARGEST_UNIFORM)
    # log1p(-u) without losing the small u that a race is won by: 1 - u is exact to 2**-24, so its log is corrected by
    # what the subtraction rounded away (Goldberg 1991, theorem 4).
    rest = 1.0 - uniform
    log_rest = tl.where(rest == 1.0, -uniform, tl.log(rest) * (uniform / (1.0 - rest)))
    noise = -tl.log(-log_rest)
    scores = (logits - tl.load(top_ptr + row)) / tl.load(temperature_ptr + row) + noise
    tl.store(scores_ptr + row * vocab_size + tokens, scores, mask=mask)
