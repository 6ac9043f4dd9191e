"""Kernels for the CPU, in float32 or with weights and caches in smaller types: compiled for the machine at hand from
cpu_kernels.cpp, and the way to them.

`load_kernels()` answers None where no C++ compiler is found or the compiled code cannot be used; callers then take
PyTorch's operations, which are also what the tests compare with: `linear` with torch.nn.functional.linear, `attend`
with attention/paging.py and attention/sdpa.py, `layer` with models/fusion.py, all up to the order of float32 additions,
and, over a cache in bfloat16 (or one of 8 bits in a model of bfloat16), up to the rounding of queries and softmax
weights to it.
"""

from __future__ import annotations

import bisect
import ctypes
import fcntl
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from textgen_engine.attention.base import AttentionMetadata, Scoring

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_INCLUDED = tuple(sorted(_SOURCE.parent.glob("*_kernels.h")))
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno")
_COMPILE_TIMEOUT_S = 120
# Dimensions of heads are read in whole vectors of 16 floats.
HEAD_DIM_MULTIPLE = 16
# Of a cache, in the order of attention_kernels.h's enum.
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


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
        kind = _KINDS[weight.dtype]
        num_outputs, depth = weight.shape
        num_blocks = -(-num_outputs // self.block)
        together = _TOGETHER[weight.dtype]
        shape: tuple[int, ...] = (num_blocks, -(-depth // together), self.block, together)
        packed = weight.new_empty(shape) if empty is None else empty(shape, weight.dtype)
        self._pack(self._pool, kind, weight.data_ptr(), packed.data_ptr(), depth, num_outputs)
        return packed

    def take(self, packed: torch.Tensor, ids: torch.Tensor, depth: int) -> torch.Tensor:
        """Rows of a packed weight of floats: ids int64 [num_ids], each below its number of outputs -> [num_ids, depth],
        in its type."""
        ids = ids.contiguous()
        rows = packed.new_empty(len(ids), depth)
        kind = _KINDS[packed.dtype]
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
        depth = 2 * width if code == _HALF_BYTES else width
        assert depth % CODES_TOGETHER == 0
        shape = (num_blocks, depth // 8, self.block, 4) if code == _HALF_BYTES else (num_blocks, depth, self.block)
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
        return _KINDS[torch.bfloat16 if in_bfloat16 and torch.bfloat16 in self.dtypes else torch.float32]

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
        shape = _shape(query.shape[1], keys, values, in_bfloat16=in_bfloat16)
        output = query.new_empty(query.shape[0], query.shape[1], values.shape[3])
        self._attend(
            self._pool,
            *(_rows(tensor) for tensor in (query, key, value)),
            *(_address(tensor) for tensor in (keys, values, output)),
            *(ctypes.byref(structure) for structure in (shape, step.structure, _scoring(scoring))),
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
            *(_addresses([tables[id(pair)][which] for pair in rotary]) for which in (0, 1)),
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


class _Scoring(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("scale", "soft_cap")),
        *((name, ctypes.c_int64) for name in ("window", "chunk")),
        *((name, ctypes.c_void_p) for name in ("sinks", "alibi_slopes")),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("num_heads", "num_kv_heads", "block_size", "dim", "value_dim", "cache", "in_pairs")
    ]


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("token_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64)]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_decodes", "num_chunks", "num_tokens")),
        ("block_tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("lengths", "chunk_starts", "slot_blocks", "slot_offsets")),
    ]


class _Wanted(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p), ("step", _Step)]


_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Neighbours in depth that lie together in a packed weight.
_TOGETHER = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}


# Of coded weights neighbours in depth that are decoded together; groups are multiples of it.
CODES_TOGETHER = 8
_HALF_BYTES = 1  # quantized_kernels.h's kNibble


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "bias", "scales", "offsets", "table", "order")),
        *((name, ctypes.c_int64) for name in ("code", "group", "depth")),
    ]


class PackedWeight:
    """A linear layer for the kernels. packed: see CpuKernels.pack. bias float32 [num_outputs]. Of int8 weights also,
    both [num_outputs]: scales float32, and sums int32 of each output's weights."""

    def __init__(
        self,
        packed: torch.Tensor,
        bias: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> None:
        self.packed = packed
        self.kind = _KINDS[packed.dtype]
        offsets = None if sums is None else sums.float() * 128  # see linear_kernels.h
        self._kept = (bias, scales, offsets)  # for the structure has their addresses alone
        assert all(
            tensor is None or (tensor.is_contiguous() and tensor.dtype is torch.float32) for tensor in self._kept
        )
        assert (scales is None) == (offsets is None) == (packed.dtype is not torch.int8)
        self.structure = _Linear(_address(packed), *(_address(tensor) for tensor in self._kept))


class CodedWeight:
    """A linear layer of coded weights for the kernels: what models/quantization/linear.py's CodedLinear says, with
    codes as CpuKernels.pack_codes gives them, and scales and offsets as pack_groups does. bias float32
    [num_outputs]."""

    def __init__(
        self,
        codes: torch.Tensor,
        code: int,
        group_size: int,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        *,
        bias: torch.Tensor | None,
        table: torch.Tensor | None,
        order: torch.Tensor | None,
    ) -> None:
        self.packed = codes
        self._kept = (bias, scales, offsets, table, order)  # for the structure has their addresses alone
        assert all(
            tensor is None or (tensor.is_contiguous() and tensor.dtype is torch.float32) for tensor in self._kept[:-1]
        )
        assert order is None or (order.is_contiguous() and order.dtype is torch.int64)
        assert (table is not None) == (code == _HALF_BYTES) and group_size % CODES_TOGETHER == 0
        self.structure = _Linear(
            _address(codes),
            *(_address(tensor) for tensor in self._kept),
            *(code, group_size, scales.shape[1] * group_size),
        )


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("input_norm", "query_norm", "key_norm")),
        *((name, _Norm) for name in ("attention_norm", "mlp_norm", "output_norm")),
        *((name, _Linear) for name in ("qkv", "output", "gate_up", "down")),
        *((name, ctypes.c_int64) for name in ("hidden", "intermediate", "activation", "kind")),
        ("shape", _Shape),
        ("scoring", _Scoring),
    ]


class Activation(IntEnum):
    """What a gated MLP does to its gate."""

    SILU = 0
    GELU_TANH = 1


class StepTables:
    """What all layers of a step share: where keys and values go, and what each sequence sees.

    wanted: where the last layer need not give all rows, those of metadata.wanted_rows.
    """

    def __init__(self, metadata: AttentionMetadata) -> None:
        starts = list(itertools.accumulate(metadata.query_lens[metadata.num_decodes :], initial=metadata.num_decodes))
        self.num_tokens = len(metadata.slot_blocks)
        # Kept, for the structure has their addresses alone.
        self._lengths = torch.tensor(metadata.seq_lens, dtype=torch.int64)
        self._starts = torch.tensor(starts, dtype=torch.int64)
        self._tensors = (metadata.block_tables, metadata.slot_blocks, metadata.slot_offsets)
        assert metadata.block_tables.stride(1) == 1
        assert all(tensor.is_contiguous() and tensor.dtype is torch.int64 for tensor in self._tensors[1:])
        self.structure = _Step(
            num_decodes=metadata.num_decodes,
            num_chunks=len(starts) - 1,
            num_tokens=self.num_tokens,
            block_tables=_address(metadata.block_tables),
            table_stride=metadata.block_tables.stride(0),
            lengths=_address(self._lengths),
            chunk_starts=_address(self._starts),
            slot_blocks=_address(metadata.slot_blocks),
            slot_offsets=_address(metadata.slot_offsets),
        )
        self.wanted = None if metadata.wanted_rows is None else _WantedRows(metadata, metadata.wanted_rows, starts)


class _WantedRows:
    """Rows of a step, each as a sequence of its own that ends with this row's token."""

    def __init__(self, metadata: AttentionMetadata, rows: list[int], chunk_starts: list[int]) -> None:
        """rows: in ascending order, none twice."""
        self.num_rows = len(rows)
        num_decodes = metadata.num_decodes
        sequences = [
            row if row < num_decodes else num_decodes + bisect.bisect_right(chunk_starts, row) - 1 for row in rows
        ]
        ends = [*range(1, num_decodes + 1), *chunk_starts[1:]]
        lengths = [
            metadata.seq_lens[sequence] - (ends[sequence] - 1 - row)
            for row, sequence in zip(rows, sequences, strict=True)
        ]
        # Kept, for the structure has their addresses alone.
        self._rows = torch.tensor(rows, dtype=torch.int64)
        self._lengths = torch.tensor(lengths, dtype=torch.int64)
        self._block_tables = metadata.block_tables[torch.tensor(sequences)]
        self.structure = _Wanted(
            rows=_address(self._rows),
            step=_Step(
                num_decodes=len(rows),
                num_tokens=len(rows),
                block_tables=_address(self._block_tables),
                table_stride=self._block_tables.stride(0),
                lengths=_address(self._lengths),
            ),
        )


class GatedLayer:
    """A decoder layer with rotary positions, RMSNorms and a gated MLP, its weights all of one type, or all coded:
    query, key and value joined, gate and up joined, each of the latter a multiple of `CpuKernels.block` wide.

    kind: CpuKernels.kind_of its weights. norms: (weight, epsilon) or None, before the layer, of each query head, of
    each key head, of what attention gives, before the MLP, of what the MLP gives; the first and the fifth are always
    there.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        intermediate: int,
        scoring: Scoring,
        activation: Activation,
        norms: list[tuple[torch.Tensor, float] | None],
        kind: int,
        qkv: PackedWeight | CodedWeight,
        output: PackedWeight | CodedWeight,
        gate_up: PackedWeight | CodedWeight,
        down: PackedWeight | CodedWeight,
    ) -> None:
        assert norms[0] is not None and norms[4] is not None
        assert all(norm is None or norm[0].dtype is torch.float32 for norm in norms)
        weights = (qkv, output, gate_up, down)
        assert all(kind == weight.kind for weight in weights if isinstance(weight, PackedWeight))
        self._num_heads = num_heads
        self._kept = (scoring, norms, qkv, output, gate_up, down)  # for the structure has their addresses alone
        places = ("input_norm", "query_norm", "key_norm", "attention_norm", "mlp_norm", "output_norm")
        self._structure = _Layer(
            **{
                place: _Norm() if norm is None else _Norm(_address(norm[0]), norm[1])
                for place, norm in zip(places, norms, strict=True)
            },
            qkv=qkv.structure,
            output=output.structure,
            gate_up=gate_up.structure,
            down=down.structure,
            hidden=len(norms[0][0]),
            intermediate=intermediate,
            activation=activation,
            kind=kind,
            scoring=_scoring(scoring),
        )

    def structure_for(self, keys: torch.Tensor, values: torch.Tensor) -> ctypes.Structure:
        """With the shape of this cache."""
        in_bfloat16 = self._structure.kind == _KINDS[torch.bfloat16]
        self._structure.shape = _shape(self._num_heads, keys, values, in_bfloat16=in_bfloat16)
        return self._structure


class GatedLayers:
    """Layers that follow one another, each with its place in the cache."""

    def __init__(self, layers: Sequence[tuple[int, GatedLayer]]) -> None:
        """Pairs of a layer's index in the cache and the layer."""
        self._layers = layers
        self._shapes: list[Any] = []
        self._addresses: Any = None

    def __len__(self) -> int:
        return len(self._layers)

    def structures_for(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> Any:
        """The layers' addresses, with the shapes of this cache, which are looked up anew only when they change."""
        shapes = [(tensor.shape, tensor.dtype) for tensor in itertools.chain(keys, values)]
        if shapes != self._shapes:
            structures = [layer.structure_for(keys[index], values[index]) for index, layer in self._layers]
            self._addresses = (ctypes.c_void_p * len(structures))(*(ctypes.addressof(one) for one in structures))
            self._shapes = shapes
        return self._addresses

    def of(self, cache: list[torch.Tensor]) -> Any:
        """The addresses of these layers' parts of the cache."""
        return _addresses([cache[index] for index, _ in self._layers])


def _shape(num_heads: int, keys: torch.Tensor, values: torch.Tensor, *, in_bfloat16: bool) -> _Shape:
    assert keys.is_contiguous() and values.is_contiguous()
    assert keys.shape[3] % HEAD_DIM_MULTIPLE == 0 and values.shape[3] % HEAD_DIM_MULTIPLE == 0
    assert keys.dtype is values.dtype
    sizes = keys.shape[1], keys.shape[2], keys.shape[3], values.shape[3]
    return _Shape(num_heads, *sizes, CACHE_DTYPES.index(keys.dtype), in_bfloat16)


def _scoring(scoring: Scoring) -> _Scoring:
    for tensor in (scoring.sinks, scoring.alibi_slopes):
        assert tensor is None or (tensor.is_contiguous() and tensor.dtype is torch.float32)
    return _Scoring(
        scoring.scale,
        scoring.soft_cap or 0.0,
        scoring.sliding_window or 0,
        scoring.chunk_size or 0,
        _address(scoring.sinks),
        _address(scoring.alibi_slopes),
    )


def _rows(tensor: torch.Tensor) -> Any:
    return ctypes.byref(_Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1)))


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(tensors: list[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


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


def build() -> Path:
    """Compile unless it was done before; returns the library. Raises OSError or SubprocessError.

    The file's name holds a digest of source, flags and the processor's features: a library is never loaded by a
    machine that may lack an instruction in it.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    key = "\n".join(
        (
            _SOURCE.read_text(),
            *(path.read_text() for path in _INCLUDED),
            *_FLAGS,
            platform.machine(),
            _processor_features(),
        )
    )
    name = f"cpu_kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = _SOURCE.parent / "build"
    if (folder / name).is_file():
        return folder / name
    if compiler is None:
        raise FileNotFoundError("neither g++ nor clang++ is installed")
    try:
        folder.mkdir(exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            # Of processes that start together (ranks do), one compiles and the others wait for it. The system frees the
            # lock of one that is killed.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / name).is_file():
                return folder / name
            logger.info("compiling the CPU kernels, which this processor has not run before")
            return _compile(compiler, folder / name)
    except OSError:  # a read-only model repository: for this process alone
        with tempfile.TemporaryDirectory() as temporary:
            library = _compile(compiler, Path(temporary) / name)
            ctypes.CDLL(str(library))  # stays mapped when its file is gone
            return library


def _compile(compiler: str, target: Path) -> Path:
    """Into a file of its own first: the target is whole as soon as it is there."""
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(unfinished)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))


if __name__ == "__main__":
    print(build())
