"""Counter-based randomness: a hash of (seed, choice, position, token id), and the race that chooses by it.

Owns the hash, the noise made from it and the choice by noise. Keeps no state: the noise of a token is a pure function
of those four numbers, so the same seed chooses the same tokens alone or in a batch, on a CPU or a GPU, before or
after a preemption or a restart.

Why a race and not the inverse of the cumulative distribution: `argmax(logit + Gumbel noise)` is a sample of the
softmax (Gumbel 1954; Maddison et al. 2014, "A* Sampling"; the same as the least `exponential / probability`). A tiny
change of one logit changes the outcome only if two tokens nearly tie. A cumulative sum moves every later boundary, so
that a last-bit difference between kernels flips tokens far from the cause.

Integers are int32 everywhere and wrap around; torch multiplies them so on every device (a test compares with Python).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textgen_engine.sampling.watermark import GREEN_MULTIPLIER, ID_SALT, PREVIOUS_SALT

_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0x21F0AAAD
_SECOND_MULTIPLIER = 0x735A2D97  # odd, and below 2**31 because torch takes scalars for int32 tensors as signed
_LARGEST_UNIFORM = 1.0 - 2.0**-24  # the largest float32 below 1: keeps log1p finite


def stream_key(seed: int, choice: int) -> int:
    """The 64-bit key of one choice of one request; `seed` is any unsigned 64-bit integer, `choice` its index."""
    return _mix64(_mix64(seed & _MASK64) ^ (((choice + 1) * _GOLDEN64) & _MASK64))


def row_keys(stream_keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.int32]:
    """Two int32 words per row for its position. stream_keys [n] uint64, positions [n] int64 -> [n, 2] int32."""
    with np.errstate(over="ignore"):
        value = stream_keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN64)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    words: NDArray[np.uint32] = np.stack((value & np.uint64(0xFFFFFFFF), value >> np.uint64(32)), 1).astype(np.uint32)
    return words.view(np.int32)


def hashed_ids(vocab_size: int, device: torch.device) -> Tensor:
    """`mix32(id ^ ID_SALT)` for every id, made once per sampler. -> [vocab_size] int32."""
    ids = torch.arange(vocab_size, dtype=torch.int32)
    return mix32(ids ^ _signed(ID_SALT)).to(device)


def noise_bits(id_hashes: Tensor, keys: Tensor) -> Tensor:
    """The random word of each (row, token).

    id_hashes: [n] or [rows, n] int32, entries of `hashed_ids`. keys: [rows, 2] int32. -> [rows, n] int32, uniform.
    Two multiply-and-shift rounds with a key word before each: the ids come in already mixed.
    """
    bits = torch.bitwise_xor(id_hashes, keys[:, :1])  # [rows, n]
    scratch = torch.empty_like(bits)
    bits.mul_(_FIRST_MULTIPLIER)
    _xor_shifted(bits, 15, scratch)
    bits.add_(keys[:, 1:]).mul_(_SECOND_MULTIPLIER)
    return _xor_shifted(bits, 16, scratch)


def gumbel_noise(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise from random words, any shape. dtype: float32 to sift a vocabulary, float64 to decide.

    The uniform number is |bits| / 2**31, so its fine steps (2**-31, exact even in float32) lie at zero, where the
    exponential that wins a race comes from.
    """
    noise = bits.to(dtype).abs_().add_(0.5).mul_(-(2.0**-31)).clamp_(min=-_LARGEST_UNIFORM)  # minus a uniform number
    return noise.log1p_().neg_().log_().neg_()


def race(scaled: Tensor, id_hashes: Tensor, keys: Tensor) -> Tensor:
    """Choose one column per row with probability softmax(scaled). -> [rows] int64, the column.

    scaled: [rows, n] float64 logits over temperature, -inf where a token is out (at least one per row should be in;
    else the first column comes back). id_hashes: [rows, n] int32. keys: [rows, 2] int32.
    """
    return (scaled + gumbel_noise(noise_bits(id_hashes, keys), torch.float64)).argmax(-1)


def green_bits(id_hashes: Tensor, previous_ids: Tensor, threshold: int) -> Tensor:
    """`watermark.is_green` for whole rows. id_hashes [n], previous_ids [rows] int64 -> [rows, n] int32, -1 is green.

    -1 (all bits set) so that a bitwise "and" with a float's bits selects the float, without a slow boolean select.
    """
    previous_hashes = mix32(previous_ids.to(torch.int32).bitwise_xor_(_signed(PREVIOUS_SALT)))  # [rows]
    bits = torch.bitwise_xor(id_hashes, previous_hashes[:, None]).mul_(GREEN_MULTIPLIER)
    _xor_shifted(bits, 15, torch.empty_like(bits))
    bits.mul_(GREEN_MULTIPLIER)
    bits.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF)
    return bits.sub_(threshold).bitwise_right_shift_(31)  # two 31-bit numbers: the difference cannot overflow


def mix32(values: Tensor) -> Tensor:
    """`watermark.mix32` on an int32 tensor, in place."""
    scratch = torch.empty_like(values)
    _xor_shifted(values, 16, scratch).mul_(0x21F0AAAD)
    _xor_shifted(values, 15, scratch).mul_(_signed(0xD35A2D97))
    return _xor_shifted(values, 15, scratch)


def _xor_shifted(values: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """values ^= values >>> shift, in place; torch's own shift drags the sign along, hence the "and"."""
    torch.bitwise_right_shift(values, shift, out=scratch)
    scratch.bitwise_and_((1 << (32 - shift)) - 1)
    return values.bitwise_xor_(scratch)


def _signed(word: int) -> int:
    """The int32 with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _mix64(value: int) -> int:
    """splitmix64's finalizer (Steele, Lea and Flood 2014); `row_keys` repeats it with numpy."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
