"""Measures a server with NVIDIA's perf_analyzer over gRPC streams: time to first token, inter-token latency, tokens/s.

Starts scripts/serve.py unless a server is named. Prompts are questions about this project's licence text, every one
different, so that neither random tokens nor the prefix cache flatter the figures. Each request generates exactly the
same number of tokens. What perf_analyzer records of every response is read from its profile export: its own summary
knows requests, not tokens.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil

_REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
_RESULTS = _REPOSITORY_ROOT / "benchmarks" / "results"
_QUESTIONS = (
    "Explain this part of a licence in plain words:",
    "What must a company do to comply with the following?",
    "Rewrite this paragraph for a school class:",
    "Which rights does the reader receive here?",
    "Give an example of a case to which this applies:",
    "What would a lawyer criticise about this text?",
    "Summarise in one sentence:",
    "Turn this into a list of short points:",
)
_NS_PER_MS = 1e6


class BenchmarkError(Exception):
    """The measurement is not valid; one line for the user."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds: median, 99th percentile, largest of `count` samples."""

    p50_ms: float
    p99_ms: float
    max_ms: float
    count: int


@dataclass(frozen=True)
class Level:
    """One concurrency. inter_token: each gap between responses spread over the tokens it brought, one sample a token;
    response_gap: the gaps themselves, which a reader of the stream sees."""

    concurrency: int
    num_requests: int
    num_output_tokens: int
    output_tokens_per_s: float
    time_to_first_token: Latency
    inter_token: Latency
    response_gap: Latency
    tokens_per_response: float


def prompts() -> Iterator[str]:
    """Different prompts of 40 to 300 tokens, the question in front so that no two share a beginning of blocks."""
    text = (_REPOSITORY_ROOT / "LICENSE").read_text()
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    paragraphs = [part[:1200] for part in paragraphs if len(part) > 150]
    # All questions about one paragraph would follow each other; the diagonal mixes lengths.
    for offset, (number, paragraph) in itertools.product(range(len(_QUESTIONS)), enumerate(paragraphs)):
        yield f"{_QUESTIONS[(number + offset) % len(_QUESTIONS)]} {paragraph}\n\n"


def evaluate(export: dict[str, Any], concurrency: int, output_tokens: int) -> Level:
    """The figures of one profile export. Raises BenchmarkError when a request did not give `output_tokens` tokens."""
    requests = export["experiments"][0]["requests"]
    if not requests:
        raise BenchmarkError("perf_analyzer recorded no request")
    first_ms: list[float] = []
    token_ms: list[float] = []
    gap_ms: list[float] = []
    num_responses = 0
    for request in requests:
        times = request["response_timestamps"]
        counts = [int(output.get("num_output_tokens", 0)) for output in request["response_outputs"]]
        if sum(counts) != output_tokens:
            raise BenchmarkError(f"a request gave {sum(counts)} tokens instead of {output_tokens}: {str(counts)[:80]}")
        arrivals = [(when, count) for when, count in zip(times, counts, strict=True) if count]
        num_responses += len(arrivals)
        first_ms.append((arrivals[0][0] - request["timestamp"]) / _NS_PER_MS)
        for (before, _), (when, count) in itertools.pairwise(arrivals):
            gap = (when - before) / _NS_PER_MS
            gap_ms.append(gap)
            token_ms += [gap / count] * count
    began = min(request["timestamp"] for request in requests)
    ended = max(request["response_timestamps"][-1] for request in requests)
    total = len(requests) * output_tokens
    return Level(
        concurrency=concurrency,
        num_requests=len(requests),
        num_output_tokens=total,
        output_tokens_per_s=total / ((ended - began) / 1e9),
        time_to_first_token=_latency(first_ms),
        inter_token=_latency(token_ms),
        response_gap=_latency(gap_ms),
        tokens_per_response=total / num_responses,
    )


def _latency(samples_ms: Sequence[float]) -> Latency:
    if not samples_ms:
        return Latency(0.0, 0.0, 0.0, 0)
    ordered = sorted(samples_ms)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return Latency(statistics.median(ordered), p99, ordered[-1], len(ordered))


@contextlib.contextmanager
def running_server(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The gRPC and HTTP addresses of a server of our own on free ports; it is stopped on leaving."""
    with tempfile.TemporaryDirectory(prefix="textgen-bench-") as folder:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, str(_REPOSITORY_ROOT / "scripts" / "serve.py"), "--no-demo", "--host", "127.0.0.1"]
        command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0", "--no-gateway"]
        command += [f"--ready-file={ready}", *arguments]
        server = subprocess.Popen(command)
        try:
            while not ready.exists():
                if server.poll() is not None:
                    raise BenchmarkError("the server did not start")
                time.sleep(0.1)
            ports = json.loads(ready.read_text())
            yield f"127.0.0.1:{ports['grpc_port']}", f"127.0.0.1:{ports['http_port']}"
        finally:
            server.terminate()
            server.wait()


def measure(
    tool: list[str], environment: dict[str, str], url: str, model: str, concurrency: int, texts: list[str], tokens: int
) -> tuple[Level, str]:
    """Run perf_analyzer once: the first `concurrency` texts warm up, the rest is measured. Returns its command, too."""
    parameters = json.dumps({"max_new_tokens": tokens, "ignore_eos_token": True})
    steps = [
        {
            "text_input": [text],
            "stream": [True],
            "sampling_parameters": [parameters],
            "return_num_output_tokens": [True],
        }
        for text in texts
    ]
    with tempfile.TemporaryDirectory(prefix="textgen-bench-") as folder:
        (Path(folder) / "input.json").write_text(json.dumps({"data": steps}))
        arguments = ["-m", model, "-i", "grpc", "-u", url, "--streaming", "--input-data", "input.json"]
        arguments += ["--concurrency-range", str(concurrency), "--request-count", str(len(texts) - concurrency)]
        # Fewer warm-up requests than streams make perf_analyzer wait for ever.
        arguments += ["--warmup-request-count", str(concurrency), "--profile-export-file", "profile.json"]
        ended = subprocess.run(tool + arguments, cwd=folder, env=environment, capture_output=True, text=True)
        if ended.returncode != 0:
            reason = (ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1:]
            raise BenchmarkError(f"perf_analyzer failed with exit code {ended.returncode}: {' '.join(reason)}")
        export = json.loads((Path(folder) / "profile.json").read_text())
    shown = ["perf_analyzer", *("HOST:PORT" if argument == url else argument for argument in arguments)]
    return evaluate(export, concurrency, tokens), shlex.join(shown)


def find_tool(cache_dir: Path) -> tuple[list[str], dict[str, str]]:
    """perf_analyzer and the environment it starts in.

    The binary in tritonclient's wheel wants two libraries by their plain names; the server's wheel has them with a
    hash in the name. Links in the cache folder make them one.
    """
    tool = Path(sysconfig.get_path("scripts")) / "perf_analyzer"
    if not tool.exists():
        found = shutil.which("perf_analyzer")
        if found is None:
            raise BenchmarkError("there is no perf_analyzer: it comes with tritonclient; run `make setup`")
        return [found], dict(os.environ)
    links = cache_dir / "perf_analyzer"
    links.mkdir(parents=True, exist_ok=True)
    libraries = Path(sysconfig.get_path("purelib")) / "nvidia_pytriton.libs"
    for name, pattern in (("libb64.so.0d", "libb64-*.so.0d"), ("libcudart.so.12", "libcudart-*.so.12*")):
        for library in libraries.glob(pattern):
            (links / name).unlink(missing_ok=True)
            (links / name).symlink_to(library)
    path = ":".join(filter(None, [str(links), os.environ.get("LD_LIBRARY_PATH")]))
    return [str(tool)], os.environ | {"LD_LIBRARY_PATH": path}


def describe_machine() -> dict[str, Any]:
    """Processor, memory and GPUs, without the machine's name."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": gpus,
        "load_before": round(os.getloadavg()[0], 1),
    }


def describe_versions(http_url: str) -> dict[str, str]:
    """Versions of everything that takes part, and the commit that was measured."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tritonclient"):
        versions[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{http_url}/v2", timeout=10) as response:
        versions["tritonserver"] = json.load(response)["version"]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_REPOSITORY_ROOT, capture_output=True, text=True
    )
    if commit.returncode == 0:
        versions["commit"] = commit.stdout.strip()
    return versions


def as_markdown(report: dict[str, Any], levels: Sequence[Level]) -> str:
    """The report as a page."""
    machine = report["machine"]
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    hardware += "".join(f", {gpu}" for gpu in machine["gpus"])
    lines = [
        "# perf_analyzer, gRPC streams",
        "",
        f"Model: {report['model']}, {report['output_tokens']} tokens for each request, prompts all different.",
        f"Machine: {hardware}; load before the run {machine['load_before']}; {report['date']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
        "",
        "| streams | requests | output tokens/s | first token p50 / p99 ms | inter-token p50 / p99 ms "
        "| gap between responses p99 ms | tokens per response |",
        "|---|---|---|---|---|---|---|",
    ]
    for level in levels:
        first, token = level.time_to_first_token, level.inter_token
        lines.append(
            f"| {level.concurrency} | {level.num_requests} | {level.output_tokens_per_s:.1f} "
            f"| {first.p50_ms:.0f} / {first.p99_ms:.0f} | {token.p50_ms:.1f} / {token.p99_ms:.1f} "
            f"| {level.response_gap.p99_ms:.0f} | {level.tokens_per_response:.2f} |"
        )
    lines += [
        "",
        "Server and tool share the machine. Inter-token: a gap between responses divided by the tokens it brought.",
        "",
        "Command: `make bench`, which ran",
        "",
        *(f"    {command}" for command in report["commands"]),
        "",
    ]
    return "\n".join(lines)


@click.command(help=__doc__, context_settings={"ignore_unknown_options": True})
@click.option("--concurrency", default="1,4,16", show_default=True, help="Streams at once; a list.")
@click.option("--output-tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens of each request.")
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True, help="Measured requests per stream.")
@click.option("--model", default="textgen", show_default=True, help="`textgen` or `ensemble`.")
@click.option("--grpc-url", default=None, help="A running server, host:port, instead of one of our own.")
@click.option("--http-url", default="127.0.0.1:8000", show_default=True, help="The same server's HTTP port.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=_RESULTS,
    show_default="benchmarks/results",
    help="Folder for the report.",
)
@click.argument("serve_args", nargs=-1, type=click.UNPROCESSED, metavar="[SERVE_ARGS...]")
def main(
    concurrency: str,
    output_tokens: int,
    rounds: int,
    model: str,
    grpc_url: str | None,
    http_url: str,
    output: Path,
    serve_args: tuple[str, ...],
) -> None:
    # So that the server started here is stopped when this process is told to end.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        tool, environment = find_tool(_REPOSITORY_ROOT / ".cache")
        machine = describe_machine()
        place: contextlib.AbstractContextManager[tuple[str, str]] = (
            running_server(serve_args) if grpc_url is None else contextlib.nullcontext((grpc_url, http_url))
        )
        levels: list[Level] = []
        commands: list[str] = []
        source = itertools.cycle(prompts())
        with place as (grpc, http):
            versions = describe_versions(http)
            for streams in (int(word) for word in concurrency.split(",")):
                # At least eight measured requests, so that one stream gives a median worth the name.
                texts = list(itertools.islice(source, streams + max(8, streams * rounds)))
                click.echo(f"{streams:3d} streams: {len(texts)} requests of {output_tokens} tokens ...")
                level, command = measure(tool, environment, grpc, model, streams, texts, output_tokens)
                levels.append(level)
                commands.append(command)
                click.echo(
                    f"{streams:3d} streams: {level.output_tokens_per_s:7.1f} tokens/s, first token p50 "
                    f"{level.time_to_first_token.p50_ms:.0f} ms, inter-token p50 {level.inter_token.p50_ms:.1f} ms"
                )
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    report = {
        "date": datetime.date.today().isoformat(),
        "model": Path(os.environ.get("MODEL_ID") or "SmolLM2-135M-Instruct (float32)").name,
        "addressed": model,
        "output_tokens": output_tokens,
        "machine": machine,
        "versions": versions,
        "commands": commands,
        "levels": [asdict(level) for level in levels],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "perf_analyzer.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "perf_analyzer.md").write_text(as_markdown(report, levels))
    click.echo(f"written: {output / 'perf_analyzer.md'}")


if __name__ == "__main__":
    main()
