"""Reads weights out of safetensors files, one tensor at a time, and hands them to transformers' own loader.

transformers renames, joins and ties weights; this file decides how bytes get into memory. A `StoredTensor` knows where
a tensor lies and reads it when it is asked for: straight into the memory where it stays, converted to the type it will
have, whole or only the part that a rank needs. `WeightHooks` lets a quantizer or a tensor-parallel plan change the
model before weights are read, and each weight after it is. So the memory of a load stays that of the finished weights
and the tensor in hand. Knows nothing of quantization methods.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from textgen_engine.errors import ModelLoadError
from textgen_engine.mapped_memory import MappedFiles, WeightMemory

logger = logging.getLogger(__name__)

# As safetensors names them.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# What is read and converted at a time: small enough to stay in the processor's cache.
_PIECE_BYTES = 1 << 20
# What a thread reads at least: a huge page. Beyond four threads memory is the limit.
_THREAD_BYTES = 2 << 20
_MOST_THREADS = 4
_PROGRESS_S = 5.0
_HEADER_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, or a part of one: reads itself at `tensor[...]`.

    offset: of its first byte in the file. stored_shape: of the whole tensor. part: (dimension, start, length), or None
    for all of it.
    """

    name: str
    path: Path
    dtype: torch.dtype
    stored_shape: tuple[int, ...]
    offset: int
    reader: WeightReader
    part: tuple[int, int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if self.part is None:
            return self.stored_shape
        dim, _, length = self.part
        return (*self.stored_shape[:dim], length, *self.stored_shape[dim + 1 :])

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor in its file."""
        return _product(self.stored_shape) * self.dtype.itemsize

    def narrow(self, dim: int, start: int, length: int) -> StoredTensor:
        """The part [start, start + length) of one dimension; nothing else of it will be read into memory."""
        assert self.part is None, "a part of a part"
        assert 0 <= dim < len(self.stored_shape) and start >= 0 and start + length <= self.stored_shape[dim]
        return replace(self, part=(dim, start, length))

    def __getitem__(self, index: EllipsisType | slice | tuple[slice, ...]) -> torch.Tensor:
        tensor = self.reader.read(self)
        return tensor if index is ... else tensor[index]

    # The two that transformers asks a safetensors slice for.

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return _NAMES[self.dtype]


@dataclass(frozen=True)
class StoredParts:
    """Several parts of one tensor, one behind the other along `dim`: reads them at `parts[...]`."""

    parts: tuple[StoredTensor, ...]
    dim: int

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        parts = [part[...] for part in self.parts]
        if parts[0].dtype.itemsize == 1:  # 8-bit floats cannot be joined as what they are
            return torch.cat([part.view(torch.uint8) for part in parts], self.dim).view(parts[0].dtype)
        return torch.cat(parts, self.dim)

    def get_shape(self) -> list[int]:
        shape = self.parts[0].get_shape()
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return shape

    def get_dtype(self) -> str:
        return self.parts[0].get_dtype()


class WeightReader:
    """The files of one checkpoint, opened while it loads. Use as a context.

    widen: read 16-bit floats as this type, where that loses nothing. mapped: shows tensors that need no change where
    they lie, and is to be settled once the model is loaded. num_bytes_read counts what came from the files.
    """

    def __init__(
        self, shards: list[Path], *, widen: torch.dtype | None = None, mapped: MappedFiles | None = None
    ) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.num_bytes_read = 0
        self.memory = WeightMemory()
        self._mapped = mapped
        self._widen = widen if widen in (torch.float32, torch.float64) else None
        self._files: dict[Path, int] = {}
        self._num_bytes = 0
        self._num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._pool: ThreadPoolExecutor | None = None
        self._started = self._said = time.monotonic()
        for shard in shards:
            for tensor in _read_header(shard, self):
                self.tensors[tensor.name] = tensor
                self._num_bytes += tensor.num_bytes

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        seconds = max(time.monotonic() - self._started, 1e-6)
        gib = self.num_bytes_read / 2**30
        logger.info("weights: %.2f GiB read in %.1f s (%.2f GiB/s)", gib, seconds, gib / seconds)

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor in memory of its own. Raises ModelLoadError with the file's and the tensor's name."""
        dtype = tensor.dtype
        if self._widen is not None and dtype in (torch.float16, torch.bfloat16):
            dtype = self._widen
        try:
            if tensor.path not in self._files:
                self._files[tensor.path] = os.open(tensor.path, os.O_RDONLY)
            result = self._read(self._files[tensor.path], tensor, dtype)
        except (OSError, EOFError, MemoryError) as error:
            raise ModelLoadError(f"{tensor.path} is damaged: tensor {tensor.name}: {error}") from error
        self._report()
        return result

    def _read(self, file: int, tensor: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
        stored, offset = tensor.stored_shape, tensor.offset
        if tensor.part is not None and tensor.part[0] == 0:  # whole rows: bytes in one piece
            _, start, length = tensor.part
            row_bytes = _product(stored[1:]) * tensor.dtype.itemsize
            stored, offset = (length, *stored[1:]), offset + start * row_bytes
            tensor = replace(tensor, part=None)
        if self._mapped is not None and dtype is tensor.dtype and tensor.part is None:
            shown = self._mapped.show(tensor.path, offset, stored, dtype)
            if shown is not None:
                self.num_bytes_read += shown.numel() * shown.itemsize
                return shown
        target = self.memory.empty(tensor.shape if tensor.part else stored, dtype)
        if dtype is tensor.dtype and tensor.part is None:
            self._fill(file, _bytes_of(target), offset)
            return target
        num_rows = stored[0] if stored else 1
        row_shape = stored[1:]
        row_bytes = _product(row_shape) * tensor.dtype.itemsize
        if not num_rows or not row_bytes:
            return target
        # A row may be as long as the tensor, if it has but one dimension: then it is read in pieces of elements.
        if len(stored) <= 1:
            row_shape, num_rows, row_bytes = (), max(num_rows, 1), tensor.dtype.itemsize
        rows = target.view(num_rows) if len(stored) <= 1 else target
        step = max(1, _PIECE_BYTES // row_bytes)
        buffer = torch.empty(min(step, num_rows) * row_bytes, dtype=torch.uint8)
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            raw = buffer[: count * row_bytes]
            self._fill(file, raw.numpy().data, offset + first * row_bytes)
            piece = raw.view(tensor.dtype).view(count, *row_shape)
            if tensor.part is not None:
                piece = piece.narrow(*tensor.part)
            rows[first : first + count].copy_(piece)
        return target

    def _fill(self, file: int, memory: memoryview, offset: int) -> None:
        """Large tensors by several threads: most of the time goes into the first touch of fresh pages, and into the
        copy out of the page cache, and neither of the two keeps the interpreter."""
        num_threads = min(self._num_threads, len(memory) // _THREAD_BYTES)
        if num_threads < 2:
            _fill_part(file, memory, offset)
        else:
            self._pool = self._pool or ThreadPoolExecutor(self._num_threads, thread_name_prefix="weights")
            size = -(-len(memory) // num_threads // _THREAD_BYTES) * _THREAD_BYTES  # in whole huge pages
            parts = [
                self._pool.submit(_fill_part, file, memory[start : start + size], offset + start)
                for start in range(0, len(memory), size)
            ]
            wait(parts)  # all: a thread must not write into memory that is given back
            for part in parts:
                part.result()
        self.num_bytes_read += len(memory)

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._said >= _PROGRESS_S:
            self._said = now
            read, whole = self.num_bytes_read, max(self._num_bytes, 1)
            logger.info("weights: %.0f %% of %.2f GiB read", 100 * read / whole, whole / 2**30)


def _fill_part(file: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset + done}, {len(memory) - done} bytes early")
        done += count


def stored_shapes(shards: list[Path]) -> dict[str, tuple[int, ...]]:
    """All tensors of these files by name."""
    return {name: tensor.shape for name, tensor in WeightReader(shards).tensors.items()}


def check_shard(path: Path) -> None:
    """Raise ModelLoadError unless the file's header can be read and all the tensors it names lie within the file."""
    _read_header(path, None)


def _read_header(path: Path, reader: WeightReader | None) -> list[StoredTensor]:
    """What a safetensors file holds: eight bytes with the length of a JSON object, the object, the tensors' bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
            if size < _HEADER_LENGTH_BYTES or length > min(size - _HEADER_LENGTH_BYTES, _MOST_HEADER_BYTES):
                raise ModelLoadError(f"{path} is damaged: its header is cut off, or it is no safetensors file")
            header = json.loads(file.read(length))
        begin = _HEADER_LENGTH_BYTES + length
        tensors, end = [], begin
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise ModelLoadError(f"{path}: tensor {name} is of type {entry['dtype']}, which cannot be served")
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if not 0 <= first <= last or last - first != _product(shape) * dtype.itemsize:
                raise ModelLoadError(
                    f"{path} is damaged: tensor {name} of shape {list(shape)} has {last - first} bytes"
                )
            if begin + last > size:
                raise ModelLoadError(
                    f"{path} is damaged: it ends at byte {size}, within tensor {name}, which ends at {begin + last}"
                )
            end = max(end, begin + last)
            if reader is not None:
                tensors.append(StoredTensor(name, path, dtype, shape, begin + first, reader))
        if end != size:
            raise ModelLoadError(f"{path} is damaged: {size - end} bytes behind its last tensor")
        return tensors
    except ModelLoadError:
        raise
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path} is damaged: its header is no table of tensors ({error!r})") from error


class WeightHooks:
    """What may change a model on its way into memory; this one changes nothing.

    Called in this order: `prepare` once, `takes` for each stored tensor and `select` for those not taken, then for each
    parameter of the model in turn `wants` and, if that says so, `convert`, and in the end `complete`.
    """

    def prepare(self, model: torch.nn.Module) -> None:
        """Change the model, all of whose tensors are on the meta device still: modules may be replaced."""

    def name_in_model(self, name: str) -> str:
        """What the model knows the checkpoint's tensor `name` by, before transformers renames it."""
        return name

    def takes(self, tensor: StoredTensor) -> bool:
        """Whether transformers is not to see this tensor, which `complete` reads."""
        return False

    def select(self, tensor: StoredTensor) -> StoredTensor | StoredParts:
        """The part of a stored tensor that is to be read; its name is the checkpoint's."""
        return tensor

    def wants(self, model: torch.nn.Module, name: str) -> bool:
        """Whether the parameter or buffer `name` of the model goes through `convert`."""
        return False

    def convert(self, model: torch.nn.Module, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model gets in place of `tensor`: full names of its parameters and buffers, and their values."""
        raise NotImplementedError

    def complete(self, model: torch.nn.Module, device: torch.device) -> None:
        """Read what was taken. The reader is still open."""


def stored_tensors(reader: WeightReader, hooks: WeightHooks) -> dict[str, Any]:
    """The reader's tensors as a state dict whose values are read when transformers takes them."""
    return {
        hooks.name_in_model(name): hooks.select(tensor)
        for name, tensor in reader.tensors.items()
        if not hooks.takes(tensor)
    }


@contextlib.contextmanager
def as_quantizer(hooks: WeightHooks) -> Iterator[QuantizationConfigMixin]:
    """A `quantization_config` for from_pretrained that has it call the hooks, and read one weight after another.

    transformers calls a quantizer at just these places; its table of quantizers holds ours while the context lasts.
    """
    name = f"textgen-{next(_numbers)}"
    AUTO_QUANTIZER_MAPPING[name] = lambda config, **_: _HooksQuantizer(config, hooks)
    try:
        yield _HooksConfig(name)
    finally:
        del AUTO_QUANTIZER_MAPPING[name]


_numbers = itertools.count()


class _HooksConfig(QuantizationConfigMixin):
    """transformers copies configurations, so the hooks themselves are not in it."""

    def __init__(self, quant_method: str) -> None:
        self.quant_method = quant_method
        self.dequantize = False


class _HooksQuantizer(HfQuantizer):
    def __init__(self, config: _HooksConfig, hooks: WeightHooks) -> None:
        super().__init__(config, pre_quantized=False)
        self._hooks = hooks

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **_: Any) -> None:
        self._hooks.prepare(model)

    def param_needs_quantization(self, model: torch.nn.Module, param_name: str, **_: Any) -> bool:
        return self._hooks.wants(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _HooksOperation(self._hooks)

    def postprocess_model(self, model: torch.nn.Module, **_: Any) -> None:
        self.remove_quantization_config(model)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _HooksOperation(ConversionOps):
    def __init__(self, hooks: WeightHooks) -> None:
        self._hooks = hooks

    def convert(self, input_dict: dict[str, Any], *, model: torch.nn.Module, **_: Any) -> dict[str, torch.Tensor]:
        converted: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            converted |= self._hooks.convert(model, name, tensor) if self._hooks.wants(model, name) else {name: tensor}
        return converted


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
