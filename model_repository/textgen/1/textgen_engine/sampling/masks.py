"""Grammar masks: packed bits of allowed tokens, applied to the rows that have one. Knows no grammar."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from textgen_engine.kernels.cpu import CpuKernels
from textgen_engine.kernels.sampling import sampling_kernels


@dataclass(frozen=True, slots=True)
class GrammarRows:
    """Which tokens a grammar allows next.

    row_ids: [k] int64, rows of the batch, each at most once. bits: [k, num_words] int32, bit j of word w allows token
    32 * w + j (the layout of xgrammar and llguidance). Tokens beyond the last word are forbidden. Any device.
    """

    row_ids: Tensor
    bits: Tensor


class MaskApplier:
    """By a kernel where there is one. Else unpacks bits through a table of the 256 bytes, since eight additions at a
    time beat thirty-two shifts."""

    def __init__(self, device: torch.device, cpu_kernels: CpuKernels | None = None) -> None:
        byte_bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1  # [256, 8]
        self._addends = torch.where(byte_bits == 1, 0.0, -torch.inf).to(torch.float32).to(device)
        self._device = device
        self._kernels = sampling_kernels(device)
        self._cpu_kernels = cpu_kernels

    def apply(self, logits: Tensor, mask: GrammarRows) -> None:
        """Put -inf where a row's mask forbids. logits: [num_rows, vocab_size] float32, edited in place."""
        if mask.row_ids.numel() == 0:
            return
        num_masked, vocab_size = mask.row_ids.shape[0], logits.shape[1]
        rows = mask.row_ids.to(self._device)
        if self._kernels is not None:
            self._kernels.apply_bitmask(logits, rows, mask.bits.to(self._device))
            return
        if self._cpu_kernels is not None:
            self._cpu_kernels.forbid(logits, rows, mask.bits.to(self._device))
            return
        packed = mask.bits[:, : -(-vocab_size // 32)].to(self._device).contiguous()
        octets = packed.view(torch.uint8).to(torch.int32)  # little-endian hosts and devices: byte order is bit order
        addends = self._addends.index_select(0, octets.view(-1)).view(num_masked, -1)[:, :vocab_size]
        covered = addends.shape[1]
        part = logits.index_select(0, rows)
        part[:, :covered] += addends
        part[:, covered:] = -torch.inf
        logits.index_copy_(0, rows, part)
