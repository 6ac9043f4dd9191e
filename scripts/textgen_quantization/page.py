"""The table of docs/quantization.md from benchmarks/results/quantization.json."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "quantization.md"
RESULTS = ROOT / "benchmarks" / "results" / "quantization.json"
_PLACE = re.compile(r"(<!-- measured: [^>]*-->\n).*(<!-- /measured -->)", re.DOTALL)


def write_page() -> None:
    """Rewrite what is between the marks of the page."""
    text = PAGE.read_text()
    results = json.loads(RESULTS.read_text())
    assert _PLACE.search(text), f"{PAGE} has no marks for the table"
    PAGE.write_text(_PLACE.sub(lambda place: place[1] + table(results) + place[2], text))


def table(results: dict[str, Any]) -> str:
    """Markdown: one row a method, float32 first, and what each answered."""
    methods: dict[str, dict[str, Any]] = results["methods"]
    plain = methods["float32"]
    rows = [
        f"Over {plain['num_tokens']} predicted tokens:",
        "",
        "| method | perplexity | against float32 | layers, MiB | process, MiB | KV cache, bytes a token "
        "| speed, 1 stream | speed, 8 streams |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in methods.items():
        if "perplexity" not in found:
            continue
        more = 100 * (found["perplexity"] / plain["perplexity"] - 1)
        sizes = f"{found['layer_mib']:.0f} | {_mebibytes(found.get('rss_mib'))} | {found['kv_bytes_per_token']}"
        speeds = f"{_speed(name, found, 1)} | {_speed(name, found, 8)}"
        rows.append(f"| {name} | {found['perplexity']:.3f} | {more:+.2f} % | {sizes} | {speeds} |")
    answers = ["", "| method | answer to “What is the capital of France? Answer in one sentence.” |", "|---|---|"]
    answers += [f"| {name} | {found['answer']} |" for name, found in methods.items() if "answer" in found]
    return "\n".join(rows + answers) + "\n"


def _mebibytes(size: float | None) -> str:
    return "not measured" if size is None else f"{size:.0f}"


def _speed(name: str, found: dict[str, Any], batch: int) -> str:
    ratios = found.get(f"speed_{batch}")
    if not ratios:
        return "1" if name == "float32" else "not measured"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
