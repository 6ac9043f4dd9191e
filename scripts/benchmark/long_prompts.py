"""Long prompts beside running streams, and prefixes that were seen before; against a server of our own.

1. Gaps between the tokens of eight streams: undisturbed, and while a prompt of nearly the model's context is read, with
   TEXTGEN_MAX_STEP_STRETCH at its default and at 1 (no limit), taking turns.
2. Time to the first token of a prompt of 4,000 tokens, cold and repeated.
3. A chat of ten turns: prompt tokens that each turn really computed.

Writes long_prompts.json and prints what docs/performance.md quotes.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import json
import os
import pydoc_data.topics
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.perf_analyzer import describe_machine, running_server

from textgen_client import AsyncClient

_ROOT = Path(__file__).resolve().parents[2]
_NUM_STREAMS = 8
_WORDS = " ".join(" ".join(text.split()) for _, text in sorted(pydoc_data.topics.topics.items()))


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def _summary(gaps_s: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(1e3 * statistics.median(gaps_s), 1),
        "p99_ms": round(1e3 * _percentile(gaps_s, 0.99), 1),
        "count": len(gaps_s),
    }


async def gaps_beside_a_long_prompt(url: str, ids: list[int]) -> dict[str, Any]:
    """Gaps of eight streams before a long prompt comes and until its first token, and that token's time."""
    arrivals: list[list[float]] = [[] for _ in range(_NUM_STREAMS)]
    async with AsyncClient(url) as client:

        async def stream(number: int) -> None:
            prompt = f"{number} streams run: {_WORDS[number * 500 : number * 500 + 200]}"
            async for _ in client.stream(prompt, max_new_tokens=4000, ignore_eos_token=True):
                arrivals[number].append(time.perf_counter())

        tasks = [asyncio.create_task(stream(number)) for number in range(_NUM_STREAMS)]
        while min(map(len, arrivals)) < 80:
            await asyncio.sleep(0.05)
        asked = time.perf_counter()
        async for _ in client.stream(input_ids=ids, max_new_tokens=1):
            break
        first = time.perf_counter()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    # The streams' own prompts disturb the first tokens.
    pairs = [pair for times in arrivals for pair in itertools.pairwise(times[20:])]
    idle = [later - sooner for sooner, later in pairs if later < asked]
    beside = [later - sooner for sooner, later in pairs if asked <= later <= first]
    return {"idle": _summary(idle), "beside": _summary(beside), "long_prompt_first_token_s": round(first - asked, 2)}


async def repeated_prefix(url: str, ids: list[int]) -> dict[str, float]:
    """Seconds to the first token of one prompt, first and second time."""
    times = []
    async with AsyncClient(url) as client:
        await client.generate("warm", max_new_tokens=2)
        for _ in range(2):
            begin = time.perf_counter()
            async for _ in client.stream(input_ids=ids, max_new_tokens=1):
                times.append(time.perf_counter() - begin)
                break
            await asyncio.sleep(0.5)
    return {"cold_s": round(times[0], 3), "repeated_s": round(times[1], 3), "share": round(times[1] / times[0], 3)}


async def chat(url: str) -> list[dict[str, int]]:
    """Ten turns: tokens of the prompt, and of them those that were computed anew."""
    turns: list[dict[str, int]] = []
    messages: list[dict[str, str]] = []
    async with AsyncClient(url) as client:
        for number in range(10):
            messages.append({"role": "user", "content": f"{number}. {_WORDS[number * 800 : number * 800 + 200]}"})
            answer = await client.generate(messages=messages, max_new_tokens=40, details=True)
            messages.append({"role": "assistant", "content": answer.text})
            assert answer.details is not None
            cached = answer.details["cached_tokens"]
            turns.append({"prompt_tokens": answer.details["input_length"], "cached_tokens": cached})
    return turns


@click.command(help=__doc__)
@click.option("--context", type=int, default=4096, show_default=True, help="Tokens of the long prompt.")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=None)
def main(context: int, rounds: int, output: Path | None) -> None:
    model = _ROOT / ".cache" / "models" / "smollm2-135m-instruct"
    os.environ.setdefault("MODEL_ID", str(model))
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(os.environ["MODEL_ID"])(_WORDS[: context * 8])["input_ids"]
    machine = describe_machine()
    report: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine, "context": context}
    report["gaps"] = []
    for number, stretch in itertools.product(range(rounds), ("", "1")):
        os.environ.pop("TEXTGEN_MAX_STEP_STRETCH", None)
        if stretch:
            os.environ["TEXTGEN_MAX_STEP_STRETCH"] = stretch
        with running_server(()) as (url, _):
            part = ids[number : number + context]
            found = asyncio.run(gaps_beside_a_long_prompt(url, part))
        report["gaps"].append({"max_step_stretch": stretch or "default", **found})
        click.echo(json.dumps(report["gaps"][-1]))
    os.environ.pop("TEXTGEN_MAX_STEP_STRETCH", None)
    with running_server(()) as (url, _):
        report["prefix"] = asyncio.run(repeated_prefix(url, ids[:4000]))
        report["chat"] = asyncio.run(chat(url))
    click.echo(json.dumps({"prefix": report["prefix"], "chat": report["chat"]}))
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
