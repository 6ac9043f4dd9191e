"""What a rank costs: its memory while it loads, and what a step sends."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import textgen_engine
from textgen_engine.config import ModelConfig
from textgen_engine.errors import ModelLoadError, RankFailure
from textgen_engine.parallel.group import Traffic
from textgen_engine.parallel.split import CannotSplit, Shard, split_heads, split_units
from textgen_engine.parallel.worker import prepare

from ..tiny import VOCAB_SIZE, Harness, make_config, make_request, save_checkpoint
from .threads import RankThreads

MIB = 2**20
# What a load takes beside weights: pieces of files on their way, outlines of modules, what libraries keep.
CONSTANT_BYTES = 40 * MIB


def peak_of_load(folder: Path, shard: Shard | None) -> int:
    """By how much the memory of a fresh process grows at its peak while it loads."""
    code = f"""
        import json, pathlib, re, sys
        from textgen_engine.config import ModelConfig
        from textgen_engine.parallel.split import Shard
        from textgen_engine.parallel.worker import prepare

        def kib(name):
            return int(re.search(name + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

        shard = {None if shard is None else (shard.rank, shard.world_size)}
        prepare(ModelConfig({str(folder / "small")!r}, num_threads=1), shard and Shard(*shard))  # imports and buffers
        before = kib("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        kept = prepare(ModelConfig({str(folder / "large")!r}, num_threads=1), shard and Shard(*shard))
        print(json.dumps(1024 * (kib("VmHWM") - before)))
    """
    environment = {"PYTHONPATH": str(Path(textgen_engine.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak: int = json.loads(result.stdout)
    return peak


def test_a_rank_takes_its_share_of_memory_and_one_tensor(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 8}
    save_checkpoint(tmp_path / "small")
    large = save_checkpoint(tmp_path / "large", intermediate_size=2048, vocab_size=16384, **sizes)
    num_bytes = (large / "model.safetensors").stat().st_size
    largest = 16384 * 512 * 4
    assert num_bytes > 4 * CONSTANT_BYTES, "or the constant would hide the weights"
    peak = peak_of_load(large.parent, Shard(1, 4))
    assert peak < num_bytes / 4 + largest + CONSTANT_BYTES, f"{peak / MIB:.0f} of {num_bytes / MIB:.0f} MiB"


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_sends_what_theory_says(llama: Path, world_size: int) -> None:
    """One broadcast; a sum for the embedding, and two for each layer, of all rows; logits of sampled rows only."""
    config = make_config(llama)
    ranks = RankThreads(config, world_size)
    harness = Harness(config, ranks)
    harness.run_alone(make_request("first", range(40, 50), 2))  # after which every rank has read what came before
    harness.submit(*(make_request(f"r{index}", range(10, 30), 8, ignore_eos_token=True) for index in range(3)))
    assert ranks.collectives is not None
    hidden, num_layers, width = 64, 3, -(-VOCAB_SIZE // world_size)
    for num_tokens, num_rows in ((60, 3), (3, 3)):  # the prompts, then a decode step
        for collectives in (ranks.collectives, *ranks.others):
            collectives.take_traffic()
        harness.step()
        sums = 1 + 2 * num_layers
        expected = Traffic(sums, sums * num_tokens * hidden * 4, 1, 0, 1, 16384)
        assert ranks.collectives.take_traffic() == expected
        for collectives in ranks.others:
            expected.gather_bytes = num_rows * width * 4
            assert collectives.take_traffic() == expected
    harness.until_idle()
    harness.close()


def test_a_rank_that_does_not_answer_fails_the_step_within_the_time_out(llama: Path) -> None:
    config = make_config(llama)
    ranks = RankThreads(config, 2, timeout_s=1.0)
    harness = Harness(config, ranks)
    ranks.pause()
    harness.submit(make_request("r", range(10, 30), 8))
    with pytest.raises(RankFailure, match="gone or does not answer"):
        harness.step()
    ranks.abandon()


def test_ranks_hold_everything_once() -> None:
    """Uneven groups of heads, key-value heads on several ranks, widths in round numbers."""
    for num_query, num_kv, world_size in ((9, 3, 2), (9, 3, 3), (32, 8, 8), (9, 3, 4), (8, 1, 4), (6, 2, 5)):
        parts = [split_heads(num_query, num_kv, Shard(rank, world_size)) for rank in range(world_size)]
        assert [head for part in parts for head in range(*part.query)] == list(range(num_query))
        assert {head for part in parts for head in range(*part.kv)} == set(range(num_kv))
        for part in parts:
            assert part.num_local_query % part.num_local_kv == 0
            group = num_query // num_kv
            assert {head // group for head in range(*part.query)} == set(range(*part.kv))
    for size, world_size in ((1536, 2), (14336, 8), (96, 4), (100, 3), (11008, 6), (7, 7)):
        ranges = [split_units(size, Shard(rank, world_size)) for rank in range(world_size)]
        assert [unit for part in ranges for unit in range(*part)] == list(range(size))
    assert [split_units(14336, Shard(rank, 8))[0] % 128 for rank in range(8)] == [0] * 8
    with pytest.raises(CannotSplit):
        split_heads(4, 2, Shard(0, 5))


def test_a_model_nobody_can_split_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "mamba", "mamba")
    with pytest.raises(ModelLoadError, match=r"^mamba of .* cannot be split over 2 ranks: neither transformers nor"):
        prepare(ModelConfig(str(folder), num_threads=1), Shard(0, 2))
