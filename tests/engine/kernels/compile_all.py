"""Compiles every kernel for a GPU that need not be there: `compile_all.py 90` for compute capability 9.0.

Run by test_compiles.py in a process of its own, whose Triton is told of a device by a stand-in for its driver, compiles
down to machine code, and launches nothing. Prints one line per compilation: name and bytes of shared memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "model_repository" / "textgen" / "1"))

from textgen_engine.attention.base import Scoring
from textgen_engine.kernels.coded_linear import FLOAT8, INT8, NIBBLE, coded_linear
from textgen_engine.kernels.gated import gated
from textgen_engine.kernels.logits import apply_bitmask, race_scores
from textgen_engine.kernels.paged_decode import paged_decode
from textgen_engine.kernels.rms_norm import rms_norm
from textgen_engine.kernels.rotary_store import rotary_store

BF16, FP32 = torch.bfloat16, torch.float32


class NoDevice:
    """What Triton asks of its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(launch: Any) -> Any:
    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        compiled = launch(self, *arguments, grid=grid, warmup=True, **keywords)
        print(self.__name__, compiled.metadata.shared)
        return compiled

    return run


def decode(
    dtype: torch.dtype, cache_dtype: torch.dtype, heads: tuple[int, int], dim: int, block_size: int, **options: Any
) -> None:
    query = torch.zeros(3, heads[0], dim, dtype=dtype)
    keys, values = (torch.zeros(8, heads[1], block_size, dim, dtype=cache_dtype) for _ in range(2))
    tables, lengths = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    paged_decode(query, keys, values, tables, lengths, Scoring(0.1, **options), num_runs=4)


def main(capability: int) -> None:
    driver.set_active(NoDevice(capability))
    JITFunction.run = compile_only(JITFunction.run)
    decode(BF16, BF16, (32, 8), 128, 16)
    everything = {"sinks": torch.zeros(16), "alibi_slopes": torch.zeros(16)}
    decode(BF16, BF16, (16, 8), 80, 1, sliding_window=64, soft_cap=30.0, chunk_size=64, **everything)
    decode(FP32, FP32, (4, 2), 256, 256)
    decode(BF16, torch.float8_e5m2, (8, 2), 64, 16)
    if capability >= 89:
        decode(BF16, torch.float8_e4m3fn, (8, 2), 128, 16)
    x = torch.zeros(4, 4096, dtype=BF16)
    rms_norm(x, x[0], 1e-5, residual=x)
    rms_norm(x, x[0], 1e-5, offset=1.0)
    for activation in ("silu", "gelu", "gelu_tanh"):
        gated(torch.zeros(4, 6000, dtype=BF16), activation)
    for dim, rotary, interleaved, cache_dtype in (
        (128, 128, False, BF16),
        (96, 32, True, BF16),
        (64, 64, False, torch.float8_e5m2),
    ):
        keys, values = (torch.zeros(4, 2, 16, dim, dtype=cache_dtype) for _ in range(2))
        weight = torch.zeros(dim, dtype=BF16) if dim == 128 else None
        places, turns = torch.zeros(3, dtype=torch.int64), torch.zeros(3, rotary, dtype=BF16)
        rotary_store(
            *(torch.zeros(3, 8, dim, dtype=BF16), turns, turns, keys, values, places, places),
            num_heads=4,
            interleaved=interleaved,
            query_norm=weight,
            key_norm=weight,
        )
    wide, table = torch.zeros(64, 2048, dtype=torch.int8), torch.zeros(16)
    half_bytes, scales = wide[:, :1024].contiguous().view(torch.uint8), torch.zeros(64, 16)
    rows = torch.zeros(5, 2048, dtype=BF16)
    coded_linear(rows, INT8, None, wide, scales, None, torch.zeros(64, dtype=BF16))
    coded_linear(rows.half(), FLOAT8, None, wide.view(torch.float8_e4m3fn), scales, None, None)
    coded_linear(rows, NIBBLE, table, half_bytes, scales, None, None)
    coded_linear(rows.float(), NIBBLE, None, half_bytes, scales, scales, None)
    logits, column = torch.zeros(4, 128_257), torch.ones(4, 1)
    apply_bitmask(logits, torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4009, dtype=torch.int32))
    hashes, keys = torch.zeros(128_257, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32)
    race_scores(logits, column, column, hashes, keys)


if __name__ == "__main__":
    main(int(sys.argv[1]))
