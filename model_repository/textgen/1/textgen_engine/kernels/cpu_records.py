"""What the compiled CPU kernels are given: weights, layers, steps and caches as the records that cpu_kernels.cpp reads.

A record has addresses alone; the objects here keep the tensors that lie there.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch

from textgen_engine.attention.base import AttentionMetadata, Scoring

# Dimensions of heads are read in whole vectors of 16 floats.
HEAD_DIM_MULTIPLE = 16
# Of a cache, in the order of attention_kernels.h's enum.
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


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


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
# Neighbours in depth that lie together in a packed weight.
TOGETHER = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}


# Of coded weights neighbours in depth that are decoded together; groups are multiples of it.
CODES_TOGETHER = 8
HALF_BYTES = 1  # quantized_kernels.h's kNibble


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
        self.kind = KINDS[packed.dtype]
        offsets = None if sums is None else sums.float() * 128  # see linear_kernels.h
        self._kept = (bias, scales, offsets)  # for the structure has their addresses alone
        assert all(
            tensor is None or (tensor.is_contiguous() and tensor.dtype is torch.float32) for tensor in self._kept
        )
        assert (scales is None) == (offsets is None) == (packed.dtype is not torch.int8)
        self.structure = _Linear(address(packed), *(address(tensor) for tensor in self._kept))


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
        assert (table is not None) == (code == HALF_BYTES) and group_size % CODES_TOGETHER == 0
        self.structure = _Linear(
            address(codes),
            *(address(tensor) for tensor in self._kept),
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
            block_tables=address(metadata.block_tables),
            table_stride=metadata.block_tables.stride(0),
            lengths=address(self._lengths),
            chunk_starts=address(self._starts),
            slot_blocks=address(metadata.slot_blocks),
            slot_offsets=address(metadata.slot_offsets),
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
            rows=address(self._rows),
            step=_Step(
                num_decodes=len(rows),
                num_tokens=len(rows),
                block_tables=address(self._block_tables),
                table_stride=self._block_tables.stride(0),
                lengths=address(self._lengths),
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
                place: _Norm() if norm is None else _Norm(address(norm[0]), norm[1])
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
            scoring=scoring_record(scoring),
        )

    def structure_for(self, keys: torch.Tensor, values: torch.Tensor) -> ctypes.Structure:
        """With the shape of this cache."""
        in_bfloat16 = self._structure.kind == KINDS[torch.bfloat16]
        self._structure.shape = shape_record(self._num_heads, keys, values, in_bfloat16=in_bfloat16)
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
        return addresses([cache[index] for index, _ in self._layers])


def shape_record(num_heads: int, keys: torch.Tensor, values: torch.Tensor, *, in_bfloat16: bool) -> _Shape:
    assert keys.is_contiguous() and values.is_contiguous()
    assert keys.shape[3] % HEAD_DIM_MULTIPLE == 0 and values.shape[3] % HEAD_DIM_MULTIPLE == 0
    assert keys.dtype is values.dtype
    sizes = keys.shape[1], keys.shape[2], keys.shape[3], values.shape[3]
    return _Shape(num_heads, *sizes, CACHE_DTYPES.index(keys.dtype), in_bfloat16)


def scoring_record(scoring: Scoring) -> _Scoring:
    for tensor in (scoring.sinks, scoring.alibi_slopes):
        assert tensor is None or (tensor.is_contiguous() and tensor.dtype is torch.float32)
    return _Scoring(
        scoring.scale,
        scoring.soft_cap or 0.0,
        scoring.sliding_window or 0,
        scoring.chunk_size or 0,
        address(scoring.sinks),
        address(scoring.alibi_slopes),
    )


def rows_record(tensor: torch.Tensor) -> Any:
    return ctypes.byref(_Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1)))


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def addresses(tensors: list[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
