"""Measure every method of quantization on the demonstration model; writes the table of docs/quantization.md.

Perplexity of a fixed text (scripts/textgen_quantization/alice.txt: the first two chapters of Lewis Carroll's "Alice's
Adventures in Wonderland", 1865, in the public domain), memory, an answer, and the speed of a decode step beside
float32's, the two engines taking turns in one process. Each measurement is a process of its own and is written to
benchmarks/results/quantization.json when it is done. Without names everything is measured anew; --resume measures what
an interrupted run left out.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "model_repository/textgen/1")]

import torch  # noqa: E402

from textgen_coverage.shapes import processor  # noqa: E402
from textgen_quantization.measure import METHODS, folder_of, measure_quality, measure_speed  # noqa: E402
from textgen_quantization.page import PAGE, RESULTS, write_page  # noqa: E402

BATCHES = (1, 8)
CONTEXT = 200


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True), default=ROOT / ".cache/models/smollm2-135m-instruct"
)
@click.option("--rounds", default=6, show_default=True, help="of each speed's measurement")
@click.option("--tokens", default=2048, show_default=True, help="of the text that are scored")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--page-only", is_flag=True, help=f"write {PAGE.name} from what was measured before")
@click.option("--resume", is_flag=True, help="leave alone what was measured before")
@click.option("--only", type=click.Choice(["quality", "speed"]), help="one of the two measurements")
@click.option("--child", hidden=True, help="the folder of this process's checkpoint")
def main(
    names: tuple[str, ...],
    model: Path,
    rounds: int,
    tokens: int,
    threads: int,
    page_only: bool,
    resume: bool,
    only: str | None,
    child: str | None,
) -> None:
    """Measure the methods NAMES, or all of them."""
    logging.disable(logging.WARNING)
    unknown = set(names) - METHODS.keys()
    if unknown:
        raise click.ClickException(f"no such method: {', '.join(sorted(unknown))}; known: {', '.join(METHODS)}")
    if child is not None:
        assert only is not None
        click.echo(json.dumps(_measure(names[0], model, Path(child), threads, rounds, tokens, only)))
        return
    if not page_only:
        setting = {
            "model": model.name,
            "text_tokens": tokens,
            "rounds": rounds,
            "context": CONTEXT,
            "machine": {"cpu": processor(), "threads": threads},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        results = _results_so_far(setting, anew=not (names or resume))
        for name in names or METHODS:
            known = results["methods"].get(name, {})
            pieces = ["quality"] if name == "float32" else ["quality", "speed"]
            pieces = [piece for piece in pieces if only in (None, piece) and not (resume and _SHOWS[piece] in known)]
            with tempfile.TemporaryDirectory() as scratch:
                folder = folder_of(METHODS[name], model, Path(scratch)) if pieces else model
                for piece in pieces:
                    _record(results, name, _in_process(name, model, folder, threads, rounds, tokens, piece))
    write_page()


# A measurement that is done shows this in the results.
_SHOWS = {"quality": "perplexity", "speed": f"speed_{BATCHES[0]}"}


def _results_so_far(setting: dict[str, Any], *, anew: bool) -> dict[str, Any]:
    """What was measured before, in the same setting: figures of different ones do not belong into one table."""
    if anew or not RESULTS.is_file():
        return {**setting, "methods": {}}
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    if {key: results.get(key) for key in setting} != setting:
        raise click.ClickException(f"{RESULTS.name} was measured in another setting; without names all is done anew")
    return results


def _measure(name: str, model: Path, folder: Path, threads: int, rounds: int, tokens: int, what: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    method = METHODS[name]
    if what == "quality":
        return measure_quality(folder, model, method, threads, num_tokens=tokens).as_json()
    found = measure_speed(model, folder, method, threads, batches=BATCHES, context=CONTEXT, rounds=rounds)
    return {f"speed_{batch}": [round(ratio, 3) for ratio in ratios] for batch, ratios in found.items()}


def _in_process(
    name: str, model: Path, folder: Path, threads: int, rounds: int, tokens: int, what: str
) -> dict[str, Any]:
    options = ["--model", str(model), "--threads", str(threads), "--rounds", str(rounds), "--only", what]
    options += ["--tokens", str(tokens)]
    command = [sys.executable, __file__, name, *options, "--child", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{name}: {what} could not be measured")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _record(results: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    results["methods"].setdefault(name, {}).update(found)
    results["methods"] = {known: results["methods"][known] for known in METHODS if known in results["methods"]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    shown = {key: statistics.median(value) if isinstance(value, list) else value for key, value in found.items()}
    click.echo(f"{name}: {shown}")


if __name__ == "__main__":
    main()
