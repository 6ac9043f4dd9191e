"""What the gateway costs: time to the first token through it and beside it, in alternation, and tokens/s of 64 streams.

Needs a running server with its gateway (`make serve`); prints one JSON object. Run it against a small model: only then
is the difference not lost in the model's own time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

import httpx

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


def first_token_through_s(client: httpx.Client) -> float:
    """The same through the gateway's /v1/completions."""
    asked = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "stream": True}
    start_s = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=asked) as response:
        lines = response.iter_lines()
        next(lines)
        elapsed_s = time.perf_counter() - start_s
        for _ in lines:
            pass
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc-url", default="127.0.0.1:8001", help="host:port of Triton's gRPC port")
    parser.add_argument("--gateway-url", default="http://127.0.0.1:8080")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=150)
    given = parser.parse_args()
    direct, through = [], []
    with Client(given.grpc_url) as client, httpx.Client(base_url=given.gateway_url, timeout=60) as http:
        for _ in range(given.rounds):
            direct.append(first_token_direct_s(client))
            through.append(first_token_through_s(http))
    print(
        json.dumps(
            {
                "first_token_direct_ms": round(statistics.median(direct) * 1e3, 2),
                "first_token_through_gateway_ms": round(statistics.median(through) * 1e3, 2),
                "tokens_per_s": round(asyncio.run(tokens_per_s(given.gateway_url, given.streams, given.tokens))),
            }
        )
    )


if __name__ == "__main__":
    main()
