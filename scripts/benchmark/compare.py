"""Our whole server and every installed rival on the same prompts, taking turns; what `make bench-compare` runs.

Each round starts every engine, measures it at each concurrency, and stops it before the next, so that all have the
machine to themselves and noise of minutes falls on all alike. Writes compare.json, compare.md and compare.png.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.perf_analyzer import describe_machine

from textgen_compare.engines import Engine, EngineError, Setting, TransformersEngine, all_engines
from textgen_compare.figures import Record, common_prefix, figures, prefill_tokens_per_s
from textgen_compare.machine import MemoryWatch, ProcessorTime, wait_for_calm
from textgen_compare.prompts import Prompt, make_prompts, prompts_of
from textgen_compare.report import as_markdown, plot

_ROOT = Path(__file__).resolve().parents[2]
_MODEL = _ROOT / ".cache" / "models" / "smollm2-135m-instruct"


def measure(
    engine: Engine, prompts: list[Prompt], levels: list[int], new_tokens: int, calm_s: float
) -> tuple[dict[str, Any], str, dict[int, list[int]]]:
    """One turn of one engine: its figures, its version, and the tokens it gave to one stream."""
    began = time.perf_counter()
    version = engine.start()
    watch = MemoryWatch(engine.roots())
    try:
        engine.run(prompts[:1], 1, 1)
        turn: dict[str, Any] = {"cold_start_s": time.perf_counter() - began, "levels": {}}
        engine.run(prompts[:2], 1, 8)  # warm
        tokens: dict[int, list[int]] = {}
        for level in levels:
            if level > 1 and engine.name == "CTranslate2":
                continue  # static batches of unlike lengths are not the same work
            asked = prompts_of(level, prompts)
            if isinstance(engine, TransformersEngine) and level > 8:
                asked = prompts[:8]  # its step is by far the slowest; a whole set takes minutes
            wait_for_calm(calm_s)
            before = ProcessorTime.now(engine.roots())
            records = engine.run(asked, level, new_tokens)
            stolen, foreign = ProcessorTime.now(engine.roots()).since(before)
            _check(engine, records, new_tokens)
            level_figures = figures(records, stolen_percent=stolen, foreign_percent=foreign)
            turn["levels"][str(level)] = asdict(level_figures)
            if level == 1:
                tokens = {prompt.number: record.token_ids for prompt, record in zip(asked, records, strict=True)}
            click.echo(
                f"{engine.name:22s} {level:3d} streams: {level_figures.output_tokens_per_s:7.1f} tokens/s, "
                f"first {level_figures.ttft_p50_ms:6.0f} ms, gap {level_figures.inter_token_p50_ms:6.1f} ms, "
                f"stolen {stolen:.0f} %, foreign {foreign:.0f} %"
            )
        if engine.name != "CTranslate2" and not isinstance(engine, TransformersEngine):
            turn["prefill_tokens_per_s"] = prefill_tokens_per_s(engine.run(prompts, len(prompts), 1))
    finally:
        peak = watch.stop()
        engine.stop()
    turn["peak_memory_mib"] = peak
    return turn, version, tokens


def _check(engine: Engine, records: list[Record], new_tokens: int) -> None:
    wrong = [len(record.times) for record in records if len(record.times) != new_tokens]
    if wrong:
        raise EngineError(f"{engine.name} gave {wrong[0]} tokens instead of {new_tokens}")


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), default=_MODEL)
@click.option("--rivals", type=click.Path(path_type=Path, file_okay=False), default=_ROOT / ".cache" / "rivals")
@click.option("--only", default="", help="Names of engines, separated by semicolons; ours is always there.")
@click.option("--concurrency", default="1,8,32", show_default=True, help="Streams at once; a list.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--calm", type=float, default=20.0, show_default=True, help="Seconds to wait for an idle machine.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=_ROOT / "benchmarks" / "results")
def main(
    model: Path, rivals: Path, only: str, concurrency: str, rounds: int, new_tokens: int, calm: float, output: Path
) -> None:
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    rivals.mkdir(parents=True, exist_ok=True)
    setting = Setting(model, rivals, rivals / "engines.log", len(os.sched_getaffinity(0)))
    levels = [int(word) for word in concurrency.split(",")]
    wanted = [word.strip().lower() for word in only.split(";") if word.strip()]
    engines, skipped = [], {}
    for engine in all_engines(setting):
        if wanted and engine.name.lower() not in wanted and engine.name != "triton-textgen":
            continue
        reason = engine.missing()
        if reason:
            skipped[engine.name] = reason
            click.echo(f"{engine.name}: skipped: {reason}")
        else:
            engines.append(engine)
    machine = describe_machine()
    prompts = make_prompts(model)
    runs: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    outputs: dict[str, dict[int, list[int]]] = {}
    for number in range(rounds):
        shift = number % len(engines)
        for engine in [*engines[shift:], *engines[:shift]]:
            if engine.name in skipped:
                continue
            try:
                turn, versions[engine.name], tokens = measure(engine, prompts, levels, new_tokens, calm)
            except (EngineError, OSError, httpx.HTTPError) as error:
                engine.stop()
                if engine.name == "triton-textgen":
                    sys.exit(f"error: {error}")
                skipped[engine.name] = str(error)
                versions.pop(engine.name, None)
                click.echo(f"{engine.name}: left out: {error}")
                continue
            runs.append({"engine": engine.name, "round": number, **turn})
            outputs.setdefault(engine.name, tokens)
    ours = outputs["triton-textgen"]
    report = {
        "date": datetime.date.today().isoformat(),
        "model": f"{model.name}",
        "machine": machine,
        "rounds": rounds,
        "concurrency": levels,
        "new_tokens": new_tokens,
        "prompts": [len(prompt.ids) for prompt in prompts],
        "versions": {engine.name: versions[engine.name] for engine in engines if engine.name in versions},
        "precisions": {engine.name: engine.precision for engine in engines},
        "skipped": skipped,
        "common_prefix": {
            name: statistics.fmean(common_prefix(ours[number], tokens[number]) for number in tokens)
            for name, tokens in outputs.items()
            if tokens and ours and name != "triton-textgen"
        },
        "runs": runs,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "compare.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "compare.md").write_text(as_markdown(report))
    click.echo(f"written: {output / 'compare.md'}")
    plot(report, output / "compare.png", click.echo)


if __name__ == "__main__":
    main()
