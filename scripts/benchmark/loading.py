"""How fast weights get into memory, beside the rates at which the page cache and the disk give their bytes away.

From the page cache, all ways taking turns, the first round (which fills the cache) left out: a plain read of the files
into one small buffer (the cache's rate: every byte copied once, nothing kept), plain reads into fresh memory (what
anybody who keeps the bytes has to pay), the loader's reader, and the loader's whole way of a matrix to the form in
which kernels read it, of weights read and of weights mapped. From the disk, the cache emptied before each: a plain read
by as many threads as the loader has, and the loader's whole way. --write puts the figures into
benchmarks/results/loading.json and docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "model_repository/textgen/1")]

import torch  # noqa: E402

from textgen_coverage.page import LOADING, PAGE, render  # noqa: E402
from textgen_coverage.shapes import processor  # noqa: E402
from textgen_engine.kernels.cpu import CpuKernels, load_kernels  # noqa: E402
from textgen_engine.mapped_memory import MappedFiles, WeightMemory  # noqa: E402
from textgen_engine.models.checkpoint import find_checkpoint  # noqa: E402
from textgen_engine.models.weights import WeightReader  # noqa: E402

_BUFFER_BYTES = 4 << 20
_CACHE, _DISK = "page cache into one buffer", "disk into one buffer a thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="MODEL_ID of a checkpoint of safetensors")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = load_kernels(options.threads)
    shards = list(find_checkpoint(options.model).shards)
    num_bytes = sum(shard.stat().st_size for shard in shards)
    cached: dict[str, Callable[[], object]] = {
        _CACHE: lambda: _read_plainly(shards),
        "fresh memory, ordinary pages": lambda: [shard.read_bytes() for shard in shards],
        "fresh memory, huge pages": lambda: _read_into_huge_pages(shards),
        "loader, read as stored": lambda: _read_all(shards, None),
        "loader, read and widened to float32": lambda: _read_all(shards, torch.float32),
    }
    cold: dict[str, Callable[[], object]] = {_DISK: lambda: _read_by_threads(shards, options.threads)}
    if kernels is not None:
        packed = kernels
        cached["loader, read and packed"] = lambda: _pack_all(shards, packed, None)
        cached["loader, mapped and packed"] = lambda: _pack_all(shards, packed, MappedFiles())
        cold["loader, mapped and packed, from disk"] = lambda: _pack_all(shards, packed, MappedFiles())
    rates: dict[str, list[float]] = {name: [] for name in (*cached, *cold)}
    for _ in range(options.rounds + 1):
        for name, read in cached.items():
            rates[name].append(num_bytes / _seconds(read) / 1e9)
        for name, read in cold.items():
            _forget(shards)
            rates[name].append(num_bytes / _seconds(read) / 1e9)
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    percent = {name: round(100 * rate / medians[_CACHE if name in cached else _DISK]) for name, rate in medians.items()}
    print(f"{options.model}: {num_bytes / 1e9:.2f} GB in {len(shards)} files, {options.rounds} rounds")
    for name, median in medians.items():
        whose = "page cache's" if name in cached else "disk's"
        print(f"{name:38} {median:6.2f} GB/s  {percent[name]:4d} % of the {whose} rate")
    if options.write:
        results: dict[str, Any] = {
            "checkpoint_gb": round(num_bytes / 1e9, 3),
            "machine": {"cpu": processor(), "threads": options.threads},
            "percent": percent,
            "gb_per_s": {name: [round(rate, 3) for rate in values[1:]] for name, values in rates.items()},
        }
        LOADING.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(render(), encoding="utf-8")


def _seconds(read: Callable[[], object]) -> float:
    started = time.perf_counter()
    kept = read()
    seconds = time.perf_counter() - started
    del kept
    return seconds


def _forget(shards: list[Path]) -> None:
    """Have the system drop these files from the page cache."""
    for shard in shards:
        file = os.open(shard, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _read_by_threads(shards: list[Path], num_threads: int) -> None:
    def read(part: tuple[Path, int, int]) -> None:
        path, begin, end = part
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        file = os.open(path, os.O_RDONLY)
        while begin < end:
            begin += os.preadv(file, [buffer[: min(_BUFFER_BYTES, end - begin)]], begin)
        os.close(file)

    parts = []
    for shard in shards:
        size = shard.stat().st_size
        step = -(-size // num_threads)
        parts += [(shard, begin, min(size, begin + step)) for begin in range(0, size, step)]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, parts))


def _pack_all(shards: list[Path], kernels: CpuKernels, mapped: MappedFiles | None) -> list[torch.Tensor]:
    """Every matrix in the form that kernels read, everything else as it is."""
    memory, kept = WeightMemory(), []
    with WeightReader(shards, mapped=mapped) as reader:
        for stored in reader.tensors.values():
            tensor = stored[...]
            packs = tensor.dim() == 2 and tensor.dtype in kernels.dtypes
            kept.append(kernels.pack(tensor, memory.empty) if packs else tensor)
    return kept


def _read_plainly(shards: list[Path]) -> None:
    buffer = bytearray(_BUFFER_BYTES)
    for shard in shards:
        file = os.open(shard, os.O_RDONLY)
        while os.readv(file, [buffer]):
            pass
        os.close(file)


def _read_all(shards: list[Path], widen: torch.dtype | None) -> list[torch.Tensor]:
    with WeightReader(shards, widen=widen) as reader:
        return [tensor[...] for tensor in reader.tensors.values()]


def _read_into_huge_pages(shards: list[Path]) -> list[torch.Tensor]:
    memory = WeightMemory()
    read = []
    for shard in shards:
        read.append(memory.empty((shard.stat().st_size,), torch.uint8))
        with shard.open("rb", buffering=0) as file:
            file.readinto(read[-1].numpy().data)
    return read


if __name__ == "__main__":
    main()
