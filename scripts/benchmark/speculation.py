#!/usr/bin/env python3
"""Time generation with and without guessed tokens (SPECULATE), on prompts whose answers copy much and on free ones.

    speculation.py [--model FOLDER] [--guesses 5] [--streams 1,4] [--tokens 120] [--rounds 2] [--json results.json]

Both engines are built in one process and take turns, prompt set by prompt set, so that what else the machine does falls
on both. Every answer is greedy and must be the same with and without guesses.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_repository" / "textgen" / "1"))

# As the engine's process has it: PyTorch's threads that spin would take the cores from the kernels' own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

from textgen_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from textgen_engine.engine import Engine
from textgen_engine.messages import StepReport
from textgen_engine.request import GenerationRequest, StoppingParams

ROOT = Path(__file__).resolve().parents[2]

_CODE = """def total_price(items, discount):
    total = 0
    for item in items:
        total = total + item.price * item.quantity
    if discount is not None:
        total = total - total * discount
    return total
"""
_RECORDS = """name: Ada Lovelace, born: 1815, city: London, field: mathematics
name: Grace Hopper, born: 1906, city: New York, field: computing
name: Alan Turing, born: 1912, city: London, field: computing
name: Emmy Noether, born: 1882, city: Erlangen, field: mathematics
"""
_STORY = (
    "The lighthouse keeper climbed the stairs every evening at six. He carried a lamp, a book and a flask of tea. From "
    "the top he counted the boats that came home, and wrote their names into the book. When the last boat was in, he "
    "drank his tea and watched the moon rise over the water. On the day of the storm one boat was missing."
)
PROMPTS = {
    "copying": (
        f"Repeat the following text exactly, word for word:\n\n{_STORY}",
        f"Rename the variable `total` to `amount` in this function and show the whole function:\n\n{_CODE}",
        f"Convert each line into a JSON object, one per line:\n\n{_RECORDS}",
        f"Correct the spelling where needed and give back the whole text:\n\n{_STORY.replace('counted', 'countd')}",
    ),
    "free": (
        "Write a short poem about the sea.",
        "Explain in a few sentences how a bicycle stays upright.",
        "What would you pack for a week in the mountains, and why?",
        "Tell me something interesting about octopuses.",
    ),
}


class Driver:
    """An engine stepped by this thread; knows every answer by its request's id."""

    def __init__(self, model: Path, num_guesses: int, threads: int, streams: int) -> None:
        self.answers: dict[str, list[int]] = {}
        self.num_guessed = self.num_steps = self.num_right = 0
        self._live: set[str] = set()
        config = EngineConfig(
            model=ModelConfig(str(model), dtype="float32", num_threads=threads),
            cache=CacheConfig(num_blocks=64 * max(streams, 4), prefix_caching=False),
            scheduler=SchedulerConfig(max(streams, 4), 512, num_guesses=num_guesses),
            log_level="error",
        )
        self.engine = Engine(config, self._on_report)

    def _on_report(self, report: StepReport) -> None:
        for output in report.outputs:
            assert output.error is None, output.error
            self.answers[output.request_id] += output.token_ids
            if output.is_last:
                self._live.discard(output.request_id)
        if report.metrics is not None and report.metrics.batch_size:
            self.num_steps += 1
            self.num_guessed += report.metrics.num_guessed_tokens
            self.num_right += report.metrics.num_guessed_right

    def run(self, prompts: list[tuple[int, ...]], num_tokens: int, streams: int, name: str) -> float:
        """Seconds to answer the prompts, `streams` at a time."""
        begin = time.perf_counter()
        stopping = StoppingParams(max_new_tokens=num_tokens)
        waiting = list(enumerate(prompts))
        while waiting or self._live:
            while waiting and len(self._live) < streams:
                index, prompt = waiting.pop(0)
                request_id = f"{name} {index}"
                self.answers[request_id] = []
                self._live.add(request_id)
                self.engine.submit(GenerationRequest(request_id, prompt, stopping=stopping))
            self.engine.step()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m-instruct")
    parser.add_argument("--guesses", type=int, default=5)
    parser.add_argument("--streams", default="1,4")
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)

    def as_ids(messages: list[dict[str, str]]) -> tuple[int, ...]:
        return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])

    prompts = {kind: [as_ids([{"role": "user", "content": text}]) for text in texts] for kind, texts in PROMPTS.items()}
    all_streams = [int(number) for number in options.streams.split(",")]
    drivers = [Driver(options.model, guesses, options.threads, max(all_streams)) for guesses in (0, options.guesses)]
    results: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": options.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "guesses": options.guesses,
        "tokens": options.tokens,
        "cases": [],
    }
    print("| prompts | streams | tokens/s without | with | ratio | steps without to with | guesses right |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind, ids in prompts.items():
        for streams in all_streams:
            seconds: list[list[float]] = [[], []]
            before = (drivers[1].num_guessed, drivers[1].num_right, drivers[0].num_steps, drivers[1].num_steps)
            for round_number in range(options.rounds):
                for which in (0, 1) if round_number % 2 == 0 else (1, 0):
                    name = f"{kind} {streams} {round_number}"
                    seconds[which].append(drivers[which].run(ids, options.tokens, streams, name))
            assert drivers[0].answers == drivers[1].answers, "guesses changed an answer"
            name = f"{kind} {streams} 0"
            num_tokens = sum(len(drivers[0].answers[f"{name} {index}"]) for index in range(len(ids)))
            num_guessed, num_right = drivers[1].num_guessed - before[0], drivers[1].num_right - before[1]
            steps = [drivers[0].num_steps - before[2], drivers[1].num_steps - before[3]]
            case = {
                "prompts": kind,
                "streams": streams,
                "num_tokens": num_tokens,
                "seconds_without": [round(value, 3) for value in seconds[0]],
                "seconds_with": [round(value, 3) for value in seconds[1]],
                "ratio": round(statistics.median(seconds[0]) / statistics.median(seconds[1]), 3),
                "steps_without": steps[0],
                "steps_with": steps[1],
                "guessed": num_guessed,
                "guessed_right": num_right,
            }
            results["cases"].append(case)
            rates = [num_tokens / statistics.median(values) for values in seconds]
            share = num_right / num_guessed if num_guessed else 0.0
            print(
                f"| {kind} | {streams} | {rates[0]:.1f} | {rates[1]:.1f} | {case['ratio']:.2f} "
                f"| {steps[0] / steps[1]:.2f} | {share:.0%} |",
                flush=True,
            )
    for driver in drivers:
        driver.engine.stop()
        driver.engine.run()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
