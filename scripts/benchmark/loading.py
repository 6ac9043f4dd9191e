"""How fast weights get into memory, beside the rate at which the page cache gives its bytes away.

Reads a checkpoint's weights through the loader's own reader (all tensors, as stored or widened), through a plain read
of the same files into one small buffer (the page cache's rate: every byte copied once, nothing kept), and through
plain reads into fresh memory, in huge pages and in ordinary ones. Rounds alternate; the first is left out, since it
fills the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "model_repository" / "textgen" / "1"))

import torch

from textgen_engine.models.checkpoint import find_checkpoint
from textgen_engine.models.memory import WeightMemory
from textgen_engine.models.weights import WeightReader

_BUFFER_BYTES = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="MODEL_ID of a checkpoint of safetensors")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    shards = list(find_checkpoint(arguments.model).shards)
    num_bytes = sum(shard.stat().st_size for shard in shards)
    ways: dict[str, Callable[[], object]] = {
        "page cache into one buffer": lambda: _read_plainly(shards),
        "loader, as stored": lambda: _read_all(shards, None),
        "loader, widened to float32": lambda: _read_all(shards, torch.float32),
        "fresh memory, huge pages": lambda: _read_into_huge_pages(shards),
        "fresh memory, ordinary pages": lambda: [shard.read_bytes() for shard in shards],
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):
        for name, read in ways.items():
            started = time.perf_counter()
            kept = read()
            rates[name].append(num_bytes / (time.perf_counter() - started) / 1e9)
            del kept
    cache = statistics.median(rates["page cache into one buffer"][1:])
    print(f"{arguments.model}: {num_bytes / 1e9:.2f} GB in {len(shards)} files, {arguments.rounds} rounds")
    for name, values in rates.items():
        median = statistics.median(values[1:])
        print(f"{name:30} {median:6.2f} GB/s  {100 * median / cache:4.0f} % of the page cache's rate")


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
