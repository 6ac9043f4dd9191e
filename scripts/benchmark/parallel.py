#!/usr/bin/env python3
"""What tensor parallelism costs and gives on this machine's cores: step time, and the time and bytes of what is sent.

    parallel.py [--model FOLDER] [--ranks 1,2] [--batches 1,8] [--context 200] [--rounds 4] [--json results.json]

Every rank is a process with one thread, the real ranks of a server. All groups live at once and take turns, a few
steps each, so that what else the machine does falls on all. Beside each measured step stands what the model in
docs/parallel.md predicts: the step of one rank divided by the number of ranks, plus each collective at the time that
its size took when nothing but collectives ran.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_repository" / "textgen" / "1"))

import torch

from textgen_engine.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from textgen_engine.engine import Engine
from textgen_engine.parallel.group import Collectives
from textgen_engine.parallel.launch import RankProcesses
from textgen_engine.parallel.worker import Echo
from textgen_engine.request import GenerationRequest, StoppingParams

ROOT = Path(__file__).resolve().parents[2]
STEPS_A_ROUND = 4
ECHOES = 200


class Group:
    """An engine over so many ranks in which `batch` sequences are decoding."""

    def __init__(self, model: Path, num_ranks: int, batch: int, context: int, steps: int) -> None:
        config = EngineConfig(
            model=ModelConfig(str(model), dtype="float32", num_threads=1),
            parallel=ParallelConfig(num_ranks),
            cache=CacheConfig(num_blocks=batch * (-(-(context + steps) // 16) + 2), prefix_caching=False),
            scheduler=SchedulerConfig(batch, 512),
            log_level="error",
        )
        self.ranks = RankProcesses(config, on_loss=_fail) if num_ranks > 1 else None
        self.engine = Engine(config, lambda report: None, self.ranks)
        generator = torch.Generator().manual_seed(0)
        stopping = StoppingParams(max_new_tokens=steps, ignore_eos_token=True)
        for number in range(batch):
            prompt = torch.randint(3, self.engine.info.vocab_size, (context,), generator=generator).tolist()
            self.engine.submit(GenerationRequest(str(number), tuple(prompt), stopping=stopping))
        choices = self.engine._requests.choice_of
        while len(choices) < batch or any(not sequence.num_output_tokens for sequence in choices):
            self.engine.step()
        self.times_ms: list[float] = []

    @property
    def collectives(self) -> Collectives | None:
        return None if self.ranks is None else self.ranks.collectives

    def round(self) -> None:
        """Some steps, timed."""
        for _ in range(STEPS_A_ROUND):
            begin = time.perf_counter()
            self.engine.step()
            self.times_ms.append((time.perf_counter() - begin) * 1000)

    def sum_ms(self, num_numbers: int) -> float:
        """One sum over the ranks of so many float32 numbers, with nothing between one and the next."""
        assert self.collectives is not None
        self.collectives.send(Echo(num_numbers, ECHOES))
        tensor = torch.zeros(num_numbers)
        begin = time.perf_counter()
        for _ in range(ECHOES):
            self.collectives.all_reduce(tensor)
        return (time.perf_counter() - begin) * 1000 / ECHOES

    def close(self) -> None:
        self.engine.stop()
        self.engine.run()


def measure(model: Path, ranks: list[int], batch: int, context: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each number of ranks."""
    steps = (rounds + 4) * STEPS_A_ROUND
    groups = {num_ranks: Group(model, num_ranks, batch, context, steps) for num_ranks in ranks}
    hidden = _hidden_size(model)
    try:
        for group in groups.values():
            group.round()
            group.times_ms.clear()
            if group.collectives is not None:
                group.collectives.take_traffic()
        for _ in range(rounds):
            for group in groups.values():
                group.round()
        one_ms = statistics.median(groups[1].times_ms) if 1 in groups else None
        rows = []
        for num_ranks, group in groups.items():
            row: dict[str, Any] = {"ranks": num_ranks, "batch": batch}
            row["step_ms"] = round(statistics.median(group.times_ms), 2)
            if group.collectives is not None:
                traffic = group.collectives.take_traffic()
                row |= {name: round(count / len(group.times_ms)) for name, count in asdict(traffic).items()}
                row["sum_ms"] = round(group.sum_ms(batch * hidden), 3)
                if one_ms is not None:
                    row["predicted_ms"] = round(one_ms / num_ranks + row["num_all_reduces"] * row["sum_ms"], 2)
            rows.append(row)
        return rows
    finally:
        for group in groups.values():
            group.close()


def _hidden_size(model: Path) -> int:
    size: int = json.loads((model / "config.json").read_text())["hidden_size"]
    return size


def _fail(reason: str) -> None:
    sys.exit(f"lost {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m-instruct")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    ranks = [int(text) for text in given.ranks.split(",")]
    rows = []
    for batch in given.batches.split(","):
        rows += measure(given.model, ranks, int(batch), given.context, given.rounds)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if given.json is not None:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
