"""Mixed traffic on a real server for as long as you like, and whether anything leaks, is lost or goes wrong.

Starts scripts/serve.py, keeps a few clients busy with streams, whole answers, cancellations, grammars, long prompts,
bad requests and connections that are dropped, and pauses every so often. In each pause the server has to become idle
(no slot, no KV block in use), and memory, file descriptors and shared memory of each process are noted. At the end the
pauses of the last quarter are compared with those of the second. Any answer that is not what it should be counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import grpc
import psutil
from tritonclient.grpc import service_pb2, service_pb2_grpc

from textgen_serve import processes

_ROOT = Path(__file__).resolve().parent.parent
_SILENCE_S = 120.0
_IDLE_WITHIN_S = 120.0
# What a process may grow between the second and the last quarter without being called a leak: allocators do not give
# everything back, and which requests came when is chance.
_RSS_GROWTH_BYTES = 24 << 20
_FD_GROWTH = 8
_SHM_GROWTH_BYTES = 1 << 20
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "Input validation error: `temperature` must be"),
    ({"no_such_parameter": 1}, "Input validation error: "),
    ({"max_new_tokens": 10**9}, "Input validation error: "),
    ({"grammar": {"type": "regex", "value": "(("}}, "Input validation error: "),
]


@dataclass
class _Findings:
    """What went wrong, in words, and what was done. Thread safe."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, kind: str, tokens: int = 0) -> None:
        with self.lock:
            self.counts[kind] += 1
            self.tokens += tokens

    def problem(self, text: str) -> None:
        with self.lock:
            if len(self.problems) < 200:
                self.problems.append(text)


class _Server:
    """scripts/serve.py and what it says of itself."""

    def __init__(self, folder: Path, model: str | None) -> None:
        ready = folder / "ready.json"
        command = [sys.executable, str(_ROOT / "scripts" / "serve.py"), "--host=127.0.0.1", "--no-demo"]
        command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0", "--gateway-port=0", f"--ready-file={ready}"]
        command += ["--max-server-restarts=0", f"--log-file={folder / 'server.log'}"]
        environment = os.environ | {"MAX_TOTAL_TOKENS": "1024", "MAX_INPUT_TOKENS": "960", "LOG_LEVEL": "warning"}
        environment |= {"MAX_BATCH_TOTAL_TOKENS": "8192"} | ({"MODEL_ID": model} if model else {})
        self.launcher = subprocess.Popen(command, env=environment)
        while not ready.exists():
            if self.launcher.poll() is not None:
                raise click.ClickException("the server did not start")
            time.sleep(0.2)
        found = json.loads(ready.read_text())
        self.grpc_port: int = found["grpc_port"]
        self.http_port: int = found["http_port"]
        self.gateway_port: int = found["gateway_port"]
        self.metrics_port: int = found["metrics_port"]
        self.pids: dict[str, list[int]] = found["pids"]

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as response:
            text = response.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def sample(self) -> dict[str, dict[str, int]]:
        """Memory and descriptors by process, now."""
        found = processes.pids_by_role(self.pids["tritonserver"][0])
        with contextlib.suppress(psutil.NoSuchProcess):
            gateway = psutil.Process(self.pids["gateway"][0])
            found["gateway"] = [gateway.pid, *(child.pid for child in gateway.children())]
        sampled = {}
        for role, pids in found.items():
            for index, pid in enumerate(sorted(pids)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    name = role if len(pids) == 1 else f"{role} {index}"
                    sampled[name] = {
                        "rss_bytes": process.memory_info().rss,
                        "descriptors": process.num_fds(),
                        "threads": process.num_threads(),
                    }
        return sampled

    def shared_bytes(self) -> int:
        """Size of the server's regions in /dev/shm."""
        command = " ".join(psutil.Process(self.pids["tritonserver"][0]).cmdline())
        prefix = re.search(r"shm-region-prefix-name=(\S+)", command)
        assert prefix is not None
        return sum(path.stat().st_size for path in Path("/dev/shm").glob(f"{prefix[1]}*"))


class _Client:
    """One client: does one thing after another until it is told to stop."""

    def __init__(self, server: _Server, findings: _Findings, seed: int) -> None:
        self._server, self._findings, self._random = server, findings, random.Random(seed)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}")
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def run(self, until_s: float) -> None:
        kinds = [self.stream, self.whole, self.cancel, self.grammar, self.long, self.bad, self.gateway, self.connects]
        weights = [6, 3, 3, 2, 1, 3, 2, 1]
        while time.monotonic() < until_s:
            kind = self._random.choices(kinds, weights)[0]
            try:
                kind()
            except Exception as error:  # whatever it is, it is a finding
                self._findings.problem(f"{kind.__name__}: {type(error).__name__}: {str(error)[:300]}")

    def stream(self) -> None:
        length = self._random.randint(1, 60)
        sampling = {"max_new_tokens": length, "ignore_eos_token": True, "seed": self._random.randrange(1000)}
        texts, error = self._drain("stream", self._open(self._prompt(), sampling | {"temperature": 0.9}, stream=True))
        if error is not None:
            self._findings.problem(f"stream: {error}")
        self._findings.count("stream", length if texts else 0)

    def whole(self) -> None:
        length = self._random.randint(1, 30)
        sampling = {"max_new_tokens": length, "ignore_eos_token": True}
        texts, error = self._drain("whole", self._open(self._prompt(), sampling, stream=False))
        if error is not None or len(texts) != 1:
            self._findings.problem(f"whole: {error}, {len(texts)} responses")
        self._findings.count("whole", length)

    def cancel(self) -> None:
        call = self._open(self._prompt(), {"max_new_tokens": 800, "ignore_eos_token": True}, stream=True)
        for _ in range(self._random.randint(1, 10)):
            next(call)
        call.cancel()
        with contextlib.suppress(grpc.RpcError):
            for _ in call:
                pass
        self._findings.count("cancel")

    def grammar(self) -> None:
        sampling = {"max_new_tokens": 60, "grammar": {"type": "json", "value": _SCHEMA}}
        texts, error = self._drain("grammar", self._open("A person as JSON: ", sampling, stream=True))
        with contextlib.suppress(ValueError):
            answer = json.loads("".join(texts))
            if set(answer) != {"name", "age"}:
                error = f"not of the schema: {answer}"
        if error is not None:
            self._findings.problem(f"grammar: {error}")
        self._findings.count("grammar", len(texts))

    def long(self) -> None:
        prompt = self._prompt() + "word " * self._random.randint(300, 900)
        _, error = self._drain("long", self._open(prompt, {"max_new_tokens": 4}, stream=True))
        if error is not None:
            self._findings.problem(f"long: {error}")
        self._findings.count("long", 4)

    def bad(self) -> None:
        sampling, expected = self._random.choice(_BAD)
        _, error = self._drain("bad", self._open("Hello", sampling, stream=self._random.random() < 0.5))
        if error is None or not error.startswith(expected):
            self._findings.problem(f"bad: {sampling} was answered with {error}")
        self._findings.count("bad request")

    def gateway(self) -> None:
        body = json.dumps({"inputs": self._prompt(), "parameters": {"max_new_tokens": 5}}).encode()
        url = f"http://127.0.0.1:{self._server.gateway_port}/generate"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=_SILENCE_S) as response:
            json.loads(response.read())["generated_text"]
        self._findings.count("gateway", 5)

    def connects(self) -> None:
        ports = [self._server.grpc_port, self._server.http_port, self._server.gateway_port]
        for index in range(30):
            with socket.create_connection(("127.0.0.1", ports[index % 3]), timeout=10) as connection:
                if index % 2:
                    connection.send(b"POST /v2/models/textgen/generate HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        self._findings.count("connection dropped", 0)

    def _prompt(self) -> str:
        return f"Chapter {self._random.randrange(10**6)}. " + "It rained. " * self._random.randrange(8)

    def _open(self, prompt: str, sampling: dict[str, Any], *, stream: bool) -> Any:
        request = service_pb2.ModelInferRequest(model_name="textgen")
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        contents = {"text_input": prompt, "sampling_parameters": json.dumps(sampling)}
        for name, value in contents.items():
            request.inputs.add(name=name, datatype="BYTES", shape=[1]).contents.bytes_contents.append(value.encode())
        request.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(stream)
        return self._stub.ModelStreamInfer(iter((request,)), timeout=_SILENCE_S)

    def _drain(self, kind: str, call: Any) -> tuple[list[str], str | None]:
        """Texts and error of a stream; that its last response, and no other, has the final flag is checked here."""
        texts, finals, error = [], [], None
        for message in call:
            finals.append(message.infer_response.parameters["triton_final_response"].bool_param)
            if message.error_message:
                error = message.error_message
            elif message.infer_response.raw_output_contents:
                texts.append(message.infer_response.raw_output_contents[0][4:].decode())
        if finals != [False] * (len(finals) - 1) + [True]:
            self._findings.problem(f"{kind}: final flags {finals[-3:]}")
        return texts, error


@contextlib.contextmanager
def _running(model: str | None) -> Iterator[_Server]:
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        server = _Server(Path(folder), model)
        try:
            yield server
        finally:
            server.launcher.send_signal(signal.SIGTERM)
            server.launcher.wait(150)


def _traffic(server: _Server, findings: _Findings, streams: int, seconds: float, seed: int) -> None:
    until_s = time.monotonic() + seconds
    clients = [
        threading.Thread(target=_Client(server, findings, seed * 100 + index).run, args=(until_s,))
        for index in range(streams)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()


def _wait_until_idle(server: _Server, findings: _Findings) -> None:
    deadline = time.monotonic() + _IDLE_WITHIN_S
    names = ("tgi_batch_current_size", "tgi_queue_size", "tgi_kv_cache_usage_ratio")
    while any(server.metric(name) for name in names):
        if time.monotonic() > deadline:
            findings.problem(f"not idle: { ({name: server.metric(name) for name in names}) }")
            return
        time.sleep(0.2)
    time.sleep(2.0)  # the engine checks its books when it has been idle for a second


def _growth(samples: list[dict[str, Any]], findings: _Findings) -> dict[str, dict[str, float]]:
    """Medians of the second and the last quarter, by process; notes what grew too much."""
    quarter = max(len(samples) // 4, 1)
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    limits = {"rss_bytes": _RSS_GROWTH_BYTES, "descriptors": _FD_GROWTH, "threads": _FD_GROWTH}
    table: dict[str, dict[str, float]] = {}
    for name in samples[-1]["processes"]:
        table[name] = {}
        for what, limit in limits.items():
            before = statistics.median(s["processes"][name][what] for s in early if name in s["processes"])
            after = statistics.median(s["processes"][name][what] for s in late if name in s["processes"])
            table[name] |= {f"{what}_before": before, f"{what}_after": after}
            if after - before > limit:
                findings.problem(f"{name}: {what} grew from {before:g} to {after:g}")
    before = statistics.median(s["shared_bytes"] for s in early)
    after = statistics.median(s["shared_bytes"] for s in late)
    if after - before > _SHM_GROWTH_BYTES:
        findings.problem(f"shared memory grew from {before:g} to {after:g} bytes")
    table["/dev/shm"] = {"rss_bytes_before": before, "rss_bytes_after": after}
    return table


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Soak",
        "",
        f"`make soak MINUTES={report['minutes']:g} STREAMS={report['streams']}` on {report['machine']}. "
        f"{report['note']}".rstrip(),
        "",
        f"{sum(report['requests'].values())} requests, {report['tokens']} tokens, {report['pauses']} pauses in which "
        "the server became idle: no slot and no KV block in use.",
        "",
        "| what | how many |",
        "|---|---|",
        *(f"| {kind} | {number} |" for kind, number in sorted(report["requests"].items())),
        "",
        "Medians of the pauses of the second and of the last quarter:",
        "",
        "| process | memory, MiB | descriptors | threads |",
        "|---|---|---|---|",
    ]
    for name, row in report["growth"].items():
        memory = f"{row['rss_bytes_before'] / 2**20:.1f} → {row['rss_bytes_after'] / 2**20:.1f}"
        counts = [
            f"{row[f'{what}_before']:g} → {row[f'{what}_after']:g}" if f"{what}_before" in row else "-"
            for what in ("descriptors", "threads")
        ]
        lines.append(f"| {name} | {memory} | {' | '.join(counts)} |")
    lines += ["", "Allowed growth: 24 MiB, 8 descriptors, 8 threads per process, 1 MiB of shared memory.", ""]
    if report["problems"]:
        lines += ["Problems:", "", *(f"- {problem}" for problem in report["problems"])]
    else:
        lines.append("No final flag was missing or early, no answer was other than expected, nothing grew.")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--minutes", type=click.FloatRange(0.2), default=20.0, show_default=True, help="How long.")
@click.option("--streams", type=click.IntRange(1, 64), default=4, show_default=True, help="Clients at once.")
@click.option("--pause-every", type=click.FloatRange(2), default=45.0, show_default=True, help="Seconds of traffic.")
@click.option("--model", default=None, help="A checkpoint; the demonstration model without it.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON; the page beside it ends in .md.")
@click.option("--page", type=click.Path(path_type=Path), default=None, help="Where the page goes instead.")
@click.option("--note", default="", help="A sentence about the circumstances, for the page.")
def main(
    minutes: float, streams: int, pause_every: float, model: str | None, output: Path, page: Path | None, note: str
) -> None:
    """See the module's docstring."""
    findings = _Findings()
    samples: list[dict[str, Any]] = []
    with _running(model) as server:
        end_s = time.monotonic() + minutes * 60
        while time.monotonic() < end_s:
            _traffic(server, findings, streams, min(pause_every, end_s - time.monotonic()), len(samples))
            _wait_until_idle(server, findings)
            samples.append({"processes": server.sample(), "shared_bytes": server.shared_bytes()})
            click.echo(f"{len(samples)}: {sum(findings.counts.values())} requests, {len(findings.problems)} problems")
            if server.launcher.poll() is not None:
                findings.problem("the server ended")
                break
        restarts = server.metric("tgi_engine_restarts") if server.launcher.poll() is None else -1
        if restarts:
            findings.problem(f"the engine was restarted {restarts:g} times")
        growth = _growth(samples, findings)
    if server.launcher.returncode != 0:
        findings.problem(f"the server ended with {server.launcher.returncode}")
    report = {
        "minutes": minutes,
        "streams": streams,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "note": note,
        "requests": dict(findings.counts),
        "tokens": findings.tokens,
        "pauses": len(samples),
        "growth": growth,
        "problems": findings.problems,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report | {"samples": samples}, indent=1) + "\n")
    (page or output.with_suffix(".md")).write_text(_markdown(report))
    if findings.problems:
        raise click.ClickException(f"{len(findings.problems)} problems, the first: {findings.problems[0]}")


if __name__ == "__main__":
    main()
