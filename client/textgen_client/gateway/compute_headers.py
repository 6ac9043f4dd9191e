"""TGI's headers about what an answer cost: `x-compute-type`, `x-total-time`, `x-prompt-tokens` and their like."""

from __future__ import annotations

from collections.abc import Sequence

from textgen_client.gateway.backend import Backend
from textgen_client.results import Generation

# TGI's order; the server's details have these under the same names, with underscores and in seconds.
_TIMES = ("validation-time", "queue-time", "inference-time", "time-per-token")


async def stream_headers(backend: Backend, num_characters: int) -> dict[str, str]:
    """Those that are known before anything is generated. num_characters: of the prompt."""
    return {"x-compute-type": await backend.served.compute_type(), "x-compute-characters": str(num_characters)}


async def whole_headers(
    backend: Backend, num_characters: int, generations: Sequence[Generation], elapsed_s: float
) -> dict[str, str]:
    """All of them, as sums over the prompts of the request; the generations must have been asked for details."""
    timings = [(generation.details or {}).get("timings", {}) for generation in generations]

    def sum_s(name: str) -> float:
        return float(sum(found.get(name.replace("-", "_"), 0.0) for found in timings))

    times = {f"x-{name}": _ms(sum_s(name)) for name in _TIMES}
    return {
        **await stream_headers(backend, num_characters),
        "x-compute-time": f"{elapsed_s:.6f}",
        "x-total-time": _ms(max(elapsed_s, sum_s("total-time"))),
        **times,
        "x-prompt-tokens": str(sum(generation.num_input_tokens or 0 for generation in generations)),
        "x-generated-tokens": str(sum(generation.num_output_tokens or 0 for generation in generations)),
    }


def _ms(seconds: float) -> str:
    return str(int(seconds * 1000))
