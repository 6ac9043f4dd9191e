"""What the gateway costs: time to the first token through it and beside it, in alternation, and tokens/s of 64 streams.

Needs a running server with its gateway (`make serve`) on this machine; prints one JSON object. Run it against a small
model: only then is the difference not lost in the model's own time. Tokens/s per core are those of a second of the
gateway's processor time, which says what it could sustain whatever the model and the client can.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import http.client
import json
import platform
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from textgen_client import Client

PROMPT = "the quick"


def first_token_direct_s(client: Client) -> float:
    """Seconds from asking over gRPC to the first chunk."""
    start_s = time.perf_counter()
    stream = client.stream(PROMPT, max_new_tokens=2)
    next(iter(stream))
    elapsed_s = time.perf_counter() - start_s
    for _ in stream:
        pass
    return elapsed_s


def first_token_through_s(connection: http.client.HTTPConnection) -> float:
    """The same through the gateway's /v1/completions. The client is Python's plainest, which keeps its connection:
    what it takes itself is in the figure."""
    asked = json.dumps({"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "stream": True})
    start_s = time.perf_counter()
    connection.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
    response = connection.getresponse()
    line = response.readline()
    elapsed_s = time.perf_counter() - start_s
    assert line.startswith(b"data:"), line
    response.read()
    return elapsed_s


async def tokens_per_s(url: str, num_streams: int, num_tokens: int) -> float:
    """Rate of all streams together, each of `num_tokens` tokens."""
    asked = {"prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:

        async def read_all() -> None:
            async with client.stream("POST", "/v1/completions", json=asked) as response:
                response.raise_for_status()
                async for _ in response.aiter_lines():
                    pass

        start_s = time.perf_counter()
        await asyncio.gather(*(read_all() for _ in range(num_streams)))
        return num_streams * num_tokens / (time.perf_counter() - start_s)


def quantiles_ms(times_s: list[float]) -> dict[str, float]:
    """The median, and the lowest tenth, which what else the machine does moves less."""
    return {
        "median": round(statistics.median(times_s) * 1e3, 2),
        "lowest tenth": round(statistics.quantiles(times_s, n=10)[0] * 1e3, 2),
    }


def processes_of(url: str) -> list[psutil.Process]:
    """The gateway that listens there, with its workers."""
    port = urlsplit(url).port
    found = []
    for process in psutil.process_iter():
        try:
            ports = {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            continue
        if port in ports:
            found.append(process)
    return found


def processor_s(processes: list[psutil.Process]) -> float:
    """Seconds of processor time that they have used."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc-url", default="127.0.0.1:8001", help="host:port of Triton's gRPC port")
    parser.add_argument("--gateway-url", default="http://127.0.0.1:8080")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    given = parser.parse_args()
    gateway = processes_of(given.gateway_url)
    if not gateway:
        parser.error(f"nothing of this machine listens at {given.gateway_url}")
    direct, through = [], []
    connection = http.client.HTTPConnection(urlsplit(given.gateway_url).netloc, timeout=60)
    with Client(given.grpc_url) as client, contextlib.closing(connection):
        model = client.model_info().model_id
        first_token_direct_s(client)
        first_token_through_s(connection)
        for _ in range(given.rounds):
            direct.append(first_token_direct_s(client))
            through.append(first_token_through_s(connection))
    before_s = processor_s(gateway)
    rate = asyncio.run(tokens_per_s(given.gateway_url, given.streams, given.tokens))
    used_s = processor_s(gateway) - before_s
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "model": Path(model).name,
        "rounds": given.rounds,
        "first_token_direct_ms": quantiles_ms(direct),
        "first_token_through_gateway_ms": quantiles_ms(through),
        "streams": given.streams,
        "tokens_per_stream": given.tokens,
        "tokens_per_s": round(rate),
        "gateway_processor_s": round(used_s, 2),
        "tokens_per_s_of_a_core": round(given.streams * given.tokens / used_s),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
