"""What the way from the engine to the client costs: the real tritonserver and stub, with an engine that has no model.

Serves a copy of the model repository whose engine gives every stream a token a step (transport_engine.py), and lets
perf_analyzer read 64 and 256 streams: at the pace of a real engine that makes 20,000 tokens/s together, with gathering
and without, and as fast as it goes. Says tokens/s and the processor time of a token in every process.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.perf_analyzer import BenchmarkError, describe_machine, find_tool, measure, prompts

_ROOT = Path(__file__).resolve().parents[2]
_ROLES = ("tritonserver", "textgen", "engine")


@contextlib.contextmanager
def server(gather: bool, step_ms: float) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """The gRPC address and the processes by role of a server without a model."""
    with tempfile.TemporaryDirectory(prefix="textgen-transport-") as folder:
        repository = Path(folder) / "model_repository"
        shutil.copytree(_ROOT / "model_repository", repository, ignore=shutil.ignore_patterns("__pycache__", "build"))
        engine = repository / "textgen" / "1" / "textgen_engine" / "engine.py"
        shutil.copy(Path(__file__).with_name("transport_engine.py"), engine)
        ready = Path(folder) / "ready.json"
        command = [sys.executable, str(_ROOT / "scripts" / "serve.py"), "--no-demo", "--no-gateway"]
        command += ["--host=127.0.0.1", "--http-port=0", "--grpc-port=0", "--metrics-port=0", f"--ready-file={ready}"]
        command += [f"--model-repository={repository}"]
        environment = {"MAX_CONCURRENT_REQUESTS": "1024", "LOG_LEVEL": "warning", "TRANSPORT_STEP_MS": str(step_ms)}
        if not gather:
            environment["GATHER_STREAMS"] = "1000000"
        process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise BenchmarkError("the server did not start")
                time.sleep(0.05)
            found = json.loads(ready.read_text())
            yield f"127.0.0.1:{found['grpc_port']}", found["pids"]
        finally:
            process.terminate()
            process.wait()


def processor_s(pids: dict[str, list[int]]) -> dict[str, float]:
    """Seconds of processor time that each role's processes have used."""
    used = {}
    for role in _ROLES:
        times = [psutil.Process(pid).cpu_times() for pid in pids[role]]
        used[role] = sum(each.user + each.system for each in times)
    return used


def measure_level(streams: int, gather: bool, pace: int | None, tokens: int, rounds: int) -> dict[str, Any]:
    """One server, one number of streams. pace: tokens/s that the engine makes at most; None: all it can."""
    tool, environment = find_tool(_ROOT / ".cache")
    texts = [f"{number} {text[:80]}" for number, text in zip(range(streams * (rounds + 1)), itertools.cycle(prompts()))]
    with server(gather, 1000 * streams / pace if pace else 0) as (url, pids):
        before = processor_s(pids)
        level, _ = measure(tool, environment, url, "textgen", streams, texts, tokens)
        used = {role: seconds - before[role] for role, seconds in processor_s(pids).items()}
    total = len(texts) * tokens  # the warm-up's tokens cost as much as the measured ones
    return {
        "streams": streams,
        "gathering": gather,
        "pace": pace,
        "tokens_per_s": round(level.output_tokens_per_s),
        "responses_per_s": round(level.output_tokens_per_s / level.tokens_per_response),
        "tokens_per_response": round(level.tokens_per_response, 2),
        "first_token_p50_ms": round(level.time_to_first_token.p50_ms, 1),
        "first_token_p99_ms": round(level.time_to_first_token.p99_ms, 1),
        "processor_us_per_token": {role: round(1e6 * seconds / total, 1) for role, seconds in used.items()},
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    machine = report["machine"]
    lines = [
        "# From the engine to the client",
        "",
        f"An engine without a model, {report['tokens']} tokens a request, read by perf_analyzer on the same machine "
        f"({machine['processor']}, {machine['cores']} cores; load before the run {machine['load_before']}; "
        f"{report['date']}). Processor time is per token; 10 µs is 1 % of a core at 1,000 tokens/s.",
        "",
        "| streams | engine's pace | gathering | tokens/s | responses/s | first token p50 / p99 ms "
        "| stub µs | tritonserver µs | engine's process µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for level in report["levels"]:
        pace = f"{level['pace']:,}" if level["pace"] else "none"
        cost = level["processor_us_per_token"]
        lines.append(
            f"| {level['streams']} | {pace} | {'on' if level['gathering'] else 'off'} | {level['tokens_per_s']:,} "
            f"| {level['responses_per_s']:,} | {level['first_token_p50_ms']} / {level['first_token_p99_ms']} "
            f"| {cost['textgen']} | {cost['tritonserver']} | {cost['engine']} |"
        )
    return "\n".join([*lines, "", "Command: `scripts/benchmark/transport.py`", ""])


@click.command(help=__doc__)
@click.option("--streams", default="64,256", show_default=True, help="Streams at once; a list.")
@click.option("--tokens", type=click.IntRange(2), default=256, show_default=True, help="Tokens of each request.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Measured requests per stream.")
@click.option("--pace", type=click.IntRange(1), default=20_000, show_default=True, help="Tokens/s of all streams.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=_ROOT / "benchmarks" / "results")
def main(streams: str, tokens: int, rounds: int, pace: int, output: Path) -> None:
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    os.environ.setdefault("MODEL_ID", str(_ROOT / ".cache" / "models" / "smollm2-135m-instruct"))
    machine = describe_machine()
    levels = []
    try:
        forms = ((True, pace), (False, pace), (True, None))
        for count, (gather, limit) in itertools.product((int(word) for word in streams.split(",")), forms):
            levels.append(measure_level(count, gather, limit, tokens, rounds))
            click.echo(json.dumps(levels[-1]))
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    report = {"date": datetime.date.today().isoformat(), "machine": machine, "tokens": tokens, "levels": levels}
    output.mkdir(parents=True, exist_ok=True)
    (output / "transport.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "transport.md").write_text(as_markdown(report))
    click.echo(f"written: {output / 'transport.md'}")


if __name__ == "__main__":
    main()
