"""Float32 kernels for the CPU, compiled for the machine at hand from cpu_kernels.cpp, and the way to them.

`load_kernels()` answers None where no C++ compiler is found or the compiled code cannot be used; callers then take
PyTorch's operations, which are also what the tests compare with: `linear` with torch.nn.functional.linear, `store` and
`decode` with attention/paging.py and attention/sdpa.py, `layer_in` and `layer_out` with models/fusion.py, all up to
the order of float32 additions.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_INCLUDED = Path(__file__).with_name("quantized_kernels.h")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno")
_COMPILE_TIMEOUT_S = 120
# Dimensions of heads are read in whole vectors of 16 floats.
HEAD_DIM_MULTIPLE = 16


class CpuKernels:
    """The compiled functions, on a pool of num_threads threads that ends with this object.

    Tensors are float32 on the CPU; what must be contiguous is said per function and checked by assertion.
    """

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._linear, self._store, self._decode = (
            library.textgen_linear,
            library.textgen_store,
            library.textgen_decode,
        )
        self._linear.argtypes = _types("pppppiii")
        self._store.argtypes = _types("piipppiiiii")
        self._decode.argtypes = _types("ppiipppippiiiiiifiifpp")
        self._layer_in, self._layer_out = library.textgen_layer_in, library.textgen_layer_out
        self._layer_in.argtypes = _types("pppppppppiiiiif")
        self._layer_out.argtypes = _types("pppppppppppppppiiiif")
        for function in (self._linear, self._store, self._decode, self._layer_in, self._layer_out):
            function.restype = None
        self._coded_linear, self._integer_linear = library.textgen_coded_linear, library.textgen_integer_linear
        self._coded_linear.argtypes = _types("pippppppp" + "iiii")
        self._integer_linear.argtypes = _types("ppppppppp" + "iii")
        self._coded_linear.restype = self._integer_linear.restype = None
        library.textgen_pool.restype = ctypes.c_void_p
        library.textgen_free_pool.argtypes = _types("p")
        self._free_pool = library.textgen_free_pool
        self._pool: int | None = library.textgen_pool(ctypes.c_int(num_threads))

    def __del__(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            self._free_pool(pool)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [num_rows, depth], weight [num_outputs, depth], bias [num_outputs] -> [num_rows, num_outputs].

        The weight, contiguous as PyTorch stores it, is read once for up to 6 rows: the packing that fast products
        usually ask for, and the second copy of the weights it costs, are not needed.
        """
        assert weight.is_contiguous() and (bias is None or bias.is_contiguous())
        x = x.contiguous()
        output = x.new_empty(x.shape[0], weight.shape[0])
        self._linear(
            self._pool,
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            output.data_ptr(),
            x.shape[0],
            x.shape[1],
            weight.shape[0],
        )
        return output

    def coded_linear(
        self,
        x: torch.Tensor,
        code: int,
        table: torch.Tensor | None,
        weight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [num_rows, depth] times a coded weight (models/quantization/linear.py: code, table, weight [num_outputs,
        bytes], scales and offsets [num_outputs, groups]) -> [num_rows, num_outputs]."""
        assert weight.is_contiguous() and scales.is_contiguous() and (offsets is None or offsets.is_contiguous())
        x = x.contiguous()
        num_rows, depth = x.shape
        num_outputs, num_groups = scales.shape
        output = x.new_empty(num_rows, num_outputs)
        self._coded_linear(
            self._pool,
            code,
            *(_address(tensor) for tensor in (table, x, weight, scales, offsets, bias, output)),
            *(num_rows, depth, num_outputs, depth // num_groups),
        )
        return output

    def integer_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        weight_sums: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [num_rows, depth], each row rounded to 8 bits on its own scale, times weight int8 [num_outputs, depth] with
        scales [num_outputs] and the sums of its rows int32 [num_outputs] -> [num_rows, num_outputs]."""
        assert weight.is_contiguous() and scales.is_contiguous() and weight_sums.is_contiguous()
        x = x.contiguous()
        num_rows, depth = x.shape
        codes = torch.empty(num_rows, depth, dtype=torch.uint8)
        row_scales, output = x.new_empty(num_rows), x.new_empty(num_rows, weight.shape[0])
        tensors = (x, weight, scales, weight_sums, bias, codes, row_scales, output)
        self._integer_linear(self._pool, *(_address(tensor) for tensor in tensors), *(num_rows, depth, weight.shape[0]))
        return output

    def layer_in(
        self,
        x: torch.Tensor,
        norm: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        epsilon: float,
    ) -> torch.Tensor:
        """RMSNorm, the joined query, key and value layer, and rotary positions: x [num_rows, hidden], cos and sin
        [num_rows, dim] -> [num_rows, num_heads + 2 * num_kv_heads, dim]."""
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        num_rows, dim = cos.shape
        normed = torch.empty_like(x)
        qkv = x.new_empty(num_rows, num_heads + 2 * num_kv_heads, dim)
        self._layer_in(
            self._pool,
            *(_address(tensor) for tensor in (x, norm, weight, bias, cos, sin, normed, qkv)),
            *(num_rows, x.shape[1], num_heads, num_kv_heads, dim, epsilon),
        )
        return qkv

    def layer_out(
        self,
        attended: torch.Tensor,
        x: torch.Tensor,
        output: tuple[torch.Tensor, torch.Tensor | None],
        norm: torch.Tensor,
        gate_up: tuple[torch.Tensor, torch.Tensor | None],
        down: tuple[torch.Tensor, torch.Tensor | None],
        *,
        epsilon: float,
    ) -> torch.Tensor:
        """What follows attention [num_rows, heads * dim] in a layer: the output layer, RMSNorm, the gated SiLU layers
        and both residual sums, on x [num_rows, hidden]; layers as (weight, bias)."""
        attended, x = attended.contiguous(), x.contiguous()
        num_rows, hidden = x.shape
        intermediate = down[0].shape[1]
        h, normed, result = (torch.empty_like(x) for _ in range(3))
        both, activated = x.new_empty(num_rows, 2 * intermediate), x.new_empty(num_rows, intermediate)
        tensors = (attended, x, *output, norm, *gate_up, *down, h, normed, both, activated, result)
        self._layer_out(
            self._pool,
            *(_address(tensor) for tensor in tensors),
            *(num_rows, attended.shape[1], hidden, intermediate, epsilon),
        )
        return result

    def store(
        self, source: torch.Tensor, cache: torch.Tensor, blocks: torch.Tensor, offsets: torch.Tensor, *, finite: bool
    ) -> None:
        """Write source [num_tokens, heads, dim] (last dimension contiguous) to cache [num_blocks, heads, block_size,
        dim]; with `finite`, what is no number as 0 and infinities as the largest numbers."""
        assert source.stride(2) == 1 and cache.is_contiguous() and blocks.is_contiguous() and offsets.is_contiguous()
        self._store(
            source.data_ptr(),
            source.stride(0),
            source.stride(1),
            cache.data_ptr(),
            blocks.data_ptr(),
            offsets.data_ptr(),
            source.shape[0],
            source.shape[1],
            cache.shape[2],
            cache.shape[3],
            int(finite),
        )

    def decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
        output: torch.Tensor,
        *,
        scale: float,
        sliding_window: int | None = None,
        chunk_size: int | None = None,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> None:
        """One query per sequence: query [n, num_heads, dim] over block_tables int64 [>= n, max_blocks] and lengths
        int64 [n], into the first n rows of output [>= n, num_heads, value_dim], contiguous. Reads each block once.
        The options are those of attention.base.Scoring; sinks and slopes float32, contiguous."""
        assert sinks is None or (sinks.is_contiguous() and sinks.dtype is torch.float32)
        assert alibi_slopes is None or (alibi_slopes.is_contiguous() and alibi_slopes.dtype is torch.float32)
        assert query.stride(2) == 1 and keys.is_contiguous() and values.is_contiguous() and output.is_contiguous()
        assert block_tables.stride(1) == 1 and lengths.is_contiguous()
        assert query.shape[2] % HEAD_DIM_MULTIPLE == 0 and values.shape[3] % HEAD_DIM_MULTIPLE == 0
        self._decode(
            self._pool,
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            keys.data_ptr(),
            values.data_ptr(),
            block_tables.data_ptr(),
            block_tables.stride(0),
            lengths.data_ptr(),
            output.data_ptr(),
            len(lengths),
            query.shape[1],
            keys.shape[1],
            keys.shape[2],
            query.shape[2],
            values.shape[3],
            scale,
            sliding_window or 0,
            chunk_size or 0,
            soft_cap or 0.0,
            _address(sinks),
            _address(alibi_slopes),
        )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
    key = "\n".join((_SOURCE.read_text(), _INCLUDED.read_text(), *_FLAGS, platform.machine(), _processor_features()))
    name = f"cpu_kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = _SOURCE.parent / "build"
    if (folder / name).is_file():
        return folder / name
    if compiler is None:
        raise FileNotFoundError("neither g++ nor clang++ is installed")
    try:
        folder.mkdir(exist_ok=True)
        return _compile(compiler, folder / name)
    except OSError:  # a read-only model repository: for this process alone
        with tempfile.TemporaryDirectory() as temporary:
            library = _compile(compiler, Path(temporary) / name)
            ctypes.CDLL(str(library))  # stays mapped when its file is gone
            return library


def _compile(compiler: str, target: Path) -> Path:
    """Into a file of its own first: processes that start together may build at the same time."""
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
