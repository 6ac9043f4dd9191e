"""Kernels for the CPU, in float32 or with weights and caches in smaller types: the way to the
functions of cpu_kernels.cpp, which cpu_build.py compiles for the machine at hand.

`load_kernels()` answers None where no C++ compiler is found or the compiled code cannot be used; callers then take
PyTorch's operations, which are also what the tests compare with: `linear` with torch.nn.functional.linear, `attend`
with attention/paging.py and attention/sdpa.py, `layers` with models/fusion.py, all up to the order of float32
additions, and, over a cache in bfloat16 (or one of 8 bits in a model of bfloat16), up to the rounding of queries and
softmax weights to it.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from textgen_engine.attention.base import Scoring
from textgen_engine.kernels.cpu_build import build
from textgen_engine.kernels.cpu_records import (
    CODES_TOGETHER,
    HALF_BYTES,
    KINDS,
    TOGETHER,
    CodedWeight,
    GatedLayers,
    PackedWeight,
    StepTables,
    address,
    addresses,
    rows_record,
    scoring_record,
    shape_record,
)

logger = logging.getLogger(__name__)


class CpuKernels:
    """The compiled functions, on a pool of num_threads threads that ends with this object.

    Tensors lie on the CPU and are float32 where nothing else is said; what must be contiguous is checked by assertion.
    """

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._pack, self._take, self._linear = library.textgen_pack, library.textgen_take, library.textgen_linear
        self._attend, self._layers = library.textgen_attend, library.textgen_layers
        self._pack.argtypes = _types("pippii")
        self._take.argtypes = _types("pipppii")
        self._linear.argtypes = _types("pipppiii")
        library.textgen_block.restype = ctypes.c_int64
        # Outputs of a packed weight's blocks.
        self.block: int = library.textgen_block()
        library.textgen_has_bfloat16.restype = ctypes.c_int64
        # What weights of floats may be of; integers are int8.
        self.dtypes = {torch.float32} | ({torch.bfloat16} if library.textgen_has_bfloat16() else set())
        self._attend.argtypes = _types("pppppppppp")
        self._layers.argtypes = _types("ppi" + "ppppppppp")
        self._largest, self._finalists = library.textgen_largest, library.textgen_finalists
        self._largest.argtypes = _types("ppippiii")
        self._finalists.argtypes = _types("ppipppppiii")
        self._forbid = library.textgen_forbid
        self._forbid.argtypes = _types("ppippiii")
        self._largest.restype = self._finalists.restype = self._forbid.restype = None
        for function in (self._pack, self._take, self._linear, self._attend, self._layers):
            function.restype = None
        self._pack_codes = library.textgen_pack_codes
        self._pack_codes.argtypes = _types("pippii")
        self._pack_codes.restype = None
        library.textgen_pool.restype = ctypes.c_void_p
        library.textgen_free_pool.argtypes = _types("p")
        self._free_pool = library.textgen_free_pool
        self._pool: int | None = library.textgen_pool(ctypes.c_int(num_threads))

    def __del__(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            self._free_pool(pool)

    def pack(
        self, weight: torch.Tensor, empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """weight [num_outputs, depth] of one of self.dtypes, or int8 -> [blocks, depth, self.block, 1], outputs padded
        with zeros: the form that the functions below read; bfloat16 [blocks, depth / 2, self.block, 2] and int8
        [blocks, depth / 4, self.block, 4], rounded up. empty: gives the memory for it, contiguous; None: PyTorch does.
        """
        weight = weight.contiguous()
        kind = KINDS[weight.dtype]
        num_outputs, depth = weight.shape
        num_blocks = -(-num_outputs // self.block)
        together = TOGETHER[weight.dtype]
        shape: tuple[int, ...] = (num_blocks, -(-depth // together), self.block, together)
        packed = weight.new_empty(shape) if empty is None else empty(shape, weight.dtype)
        self._pack(self._pool, kind, weight.data_ptr(), packed.data_ptr(), depth, num_outputs)
        return packed

    def take(self, packed: torch.Tensor, ids: torch.Tensor, depth: int) -> torch.Tensor:
        """Rows of a packed weight of floats: ids int64 [num_ids], each below its number of outputs -> [num_ids, depth],
        in its type."""
        ids = ids.contiguous()
        rows = packed.new_empty(len(ids), depth)
        kind = KINDS[packed.dtype]
        self._take(self._pool, kind, packed.data_ptr(), ids.data_ptr(), rows.data_ptr(), len(ids), depth)
        return rows

    def pack_codes(
        self,
        code: int,
        weight: torch.Tensor,
        empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """weight: codes as models/quantization/linear.py has them, bytes [num_outputs, depth] or half bytes
        [num_outputs, depth / 2] -> uint8 [blocks, depth, self.block], or of half bytes [blocks, depth / 8, self.block,
        4]: eight neighbours of an output in four bytes, the first in the lowest bits. depth: a multiple of
        CODES_TOGETHER."""
        weight = weight.contiguous()
        num_outputs, width = weight.shape
        num_blocks = -(-num_outputs // self.block)
        depth = 2 * width if code == HALF_BYTES else width
        assert depth % CODES_TOGETHER == 0
        shape = (num_blocks, depth // 8, self.block, 4) if code == HALF_BYTES else (num_blocks, depth, self.block)
        packed = torch.empty(shape, dtype=torch.uint8) if empty is None else empty(shape, torch.uint8)
        self._pack_codes(self._pool, code, weight.data_ptr(), packed.data_ptr(), depth, num_outputs)
        return packed

    def pack_groups(self, values: torch.Tensor) -> torch.Tensor:
        """Scales or offsets of coded weights, float32 [num_outputs, groups] -> [blocks, groups, self.block]."""
        padded = functional.pad(values, (0, 0, 0, -values.shape[0] % self.block))
        return padded.view(-1, self.block, values.shape[1]).transpose(1, 2).contiguous()

    def linear(
        self, x: torch.Tensor, weight: PackedWeight | CodedWeight, num_outputs: int, *, in_bfloat16: bool = False
    ) -> torch.Tensor:
        """x float32 [num_rows, depth] -> float32 [num_rows, num_outputs]. Beside bfloat16 weights x is rounded to
        bfloat16, beside int8 ones each row to -127 ... 127 on a scale of its own. Coded weights are decoded to float32,
        or with in_bfloat16, where the processor can, to bfloat16, to which x is rounded then. A row's result is the
        same to the last bit whatever rows stand beside it."""
        assert x.dtype is torch.float32
        x = x.contiguous()
        output = x.new_empty(x.shape[0], num_outputs)
        self._linear(
            self._pool,
            *(self.kind_of(weight, in_bfloat16=in_bfloat16), ctypes.byref(weight.structure)),
            *(x.data_ptr(), output.data_ptr(), x.shape[0], x.shape[1], num_outputs),
        )
        return output

    def kind_of(self, weight: PackedWeight | CodedWeight, *, in_bfloat16: bool) -> int:
        """What rows become beside this weight, as the kernels number it."""
        if isinstance(weight, PackedWeight):
            return weight.kind
        return KINDS[torch.bfloat16 if in_bfloat16 and torch.bfloat16 in self.dtypes else torch.float32]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: StepTables,
        scoring: Scoring,
        *,
        in_bfloat16: bool = False,
    ) -> torch.Tensor:
        """Store a step's key and value, then attend, as AttentionBackend.run, all float32: query [num_tokens,
        num_heads, dim], key and value [num_tokens, num_kv_heads, dim or value_dim], their last dimensions contiguous;
        keys and values the layer's cache, of one of CACHE_DTYPES -> [num_tokens, num_heads, value_dim]. Dimensions are
        multiples of HEAD_DIM_MULTIPLE. in_bfloat16: a cache of 8 bits is multiplied in bfloat16, where the processor
        can."""
        assert query.dtype is key.dtype is value.dtype is torch.float32
        assert query.stride(2) == key.stride(2) == value.stride(2) == 1 and query.shape[0] == step.num_tokens
        shape = shape_record(query.shape[1], keys, values, in_bfloat16=in_bfloat16)
        output = query.new_empty(query.shape[0], query.shape[1], values.shape[3])
        self._attend(
            self._pool,
            *(rows_record(tensor) for tensor in (query, key, value)),
            *(address(tensor) for tensor in (keys, values, output)),
            *(ctypes.byref(structure) for structure in (shape, step.structure, scoring_record(scoring))),
        )
        return output

    def layers(
        self,
        layers: GatedLayers,
        step: StepTables,
        x: torch.Tensor,
        rotary: Sequence[tuple[torch.Tensor, torch.Tensor]],
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """Whole layers one after another in one call: x [num_tokens, hidden], rotary: for each layer cos and sin
        [num_tokens, dim] of all rotary positions, all float32; keys and values: the cache's of all layers of the model,
        of one of CACHE_DTYPES -> [num_tokens, hidden], or [len(step.wanted_rows), hidden] where those are not all."""
        assert x.dtype is torch.float32 and len(rotary) == len(layers)
        x = x.contiguous()
        tables = {id(pair): tuple(table.contiguous() for table in pair) for pair in rotary}  # one pair for many layers
        for cos, sin in tables.values():
            assert x.shape[0] == cos.shape[0] == step.num_tokens and cos.dtype is sin.dtype is torch.float32
        wanted = step.wanted
        output = torch.empty_like(x) if wanted is None else x.new_empty(wanted.num_rows, x.shape[1])
        passed_on = output if wanted is None else torch.empty_like(x)
        self._layers(
            self._pool,
            *(layers.structures_for(keys, values), len(layers), ctypes.byref(step.structure)),
            *(None if wanted is None else ctypes.byref(wanted.structure), x.data_ptr()),
            *(addresses([tables[id(pair)][which] for pair in rotary]) for which in (0, 1)),
            *(layers.of(keys), layers.of(values), passed_on.data_ptr(), output.data_ptr()),
        )
        return output

    def largest(self, logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """sampling.filters.largest: logits float32 [n, vocab] -> values float32 and ids int64 [n, count], in order."""
        assert logits.dtype is torch.float32 and logits.stride(1) == 1
        num_rows, size = logits.shape
        values = logits.new_empty(num_rows, count)
        ids = torch.empty(num_rows, count, dtype=torch.int64)
        self._largest(
            self._pool,
            *(logits.data_ptr(), logits.stride(0), values.data_ptr(), ids.data_ptr()),
            *(num_rows, size, count),
        )
        return values, ids

    def finalists(
        self,
        logits: torch.Tensor,
        top: torch.Tensor,
        temperature: torch.Tensor,
        id_hashes: torch.Tensor,
        keys: torch.Tensor,
        count: int,
    ) -> torch.Tensor:
        """The ids int64 [n, count] with the largest (logits - top) / temperature + Gumbel noise in float32: logits
        float32 [n, vocab], top and temperature [n, 1], id_hashes int32 [vocab], keys int32 [n, 2]."""
        assert logits.dtype is torch.float32 and logits.stride(1) == 1
        assert id_hashes.dtype is torch.int32 and keys.dtype is torch.int32 and id_hashes.is_contiguous()
        num_rows, size = logits.shape
        top, temperature, keys = top.float().contiguous(), temperature.float().contiguous(), keys.contiguous()
        ids = torch.empty(num_rows, count, dtype=torch.int64)
        tensors = (top, temperature, id_hashes, keys, ids)
        self._finalists(
            self._pool,
            *(logits.data_ptr(), logits.stride(0)),
            *(tensor.data_ptr() for tensor in tensors),
            *(num_rows, size, count),
        )
        return ids

    def forbid(self, logits: torch.Tensor, row_ids: torch.Tensor, bits: torch.Tensor) -> None:
        """sampling.masks.MaskApplier.apply: -inf in logits float32 [n, vocab], in place, wherever a row of row_ids
        int64 [k] has no bit in bits int32 [k, num_words]."""
        assert logits.dtype is torch.float32 and logits.stride(1) == 1
        assert row_ids.dtype is torch.int64 and bits.dtype is torch.int32 and len(row_ids) == len(bits)
        row_ids, bits = row_ids.contiguous(), bits.contiguous()
        self._forbid(
            self._pool,
            *(logits.data_ptr(), logits.stride(0), row_ids.data_ptr(), bits.data_ptr()),
            *(bits.shape[1], len(row_ids), logits.shape[1]),
        )


def _types(letters: str) -> list[Any]:
    """Arguments of a C function: p a pointer, i an int64_t, f a float."""
    return [{"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}[letter] for letter in letters]


def load_kernels(num_threads: int) -> CpuKernels | None:
    """The kernels for this machine, compiled now (some seconds) if they never were; None where that is impossible."""
    try:
        return CpuKernels(ctypes.CDLL(str(build())), num_threads)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        logger.warning("no compiled CPU kernels, PyTorch's operations take their place: %s", error)
        return None
