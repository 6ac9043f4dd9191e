"""The results as JSON and as a Markdown table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

GOALS = (
    "Goals (one H200): decode batch 1 at 80 % of the bandwidth bound, batch 64 with 1k of context at 75 %; prefill at "
    "60 % of the matrix rate; host gap at most 5 % of a step."
)


def write(folder: Path, device_name: str, results: dict[str, Any]) -> tuple[Path, Path]:
    """benchmarks/results/<gpu>.json and .md."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") or "gpu"
    paths = folder / f"{stem}.json", folder / f"{stem}.md"
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    paths[1].write_text(markdown(device_name, results))
    return paths


def markdown(device_name: str, results: dict[str, Any]) -> str:
    checks = results["checks"]
    counts = {verdict: sum(check["passed"] is verdict for check in checks) for verdict in (True, False, None)}
    lines = [
        f"# {device_name}",
        "",
        f"{counts[True]} checks passed, {counts[False]} failed, {counts[None]} not run. "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ".",
        "",
    ]
    lines += [f"- FAILED: {check['name']} {check['note']}" for check in checks if check["passed"] is False]
    lines += [f"- not run: {check['name']}: {check['note']}" for check in checks if check["passed"] is None]
    rates = results["figures"].get("rates")
    if rates:
        lines += [
            "",
            f"Measured: {rates['bytes_per_s'] / 1e12:.2f} TB/s (copy), {rates['flops_per_s'] / 1e12:.0f} TFLOP/s "
            f"(bf16 product). {GOALS}",
        ]
    for name, figures in results["figures"].get("models", {}).items():
        lines += [
            "",
            f"## {name}, random weights, bf16",
            "",
            "| sequences, 1k context | step ms | tokens/s | share of bandwidth | host gap | transformers step ms |",
            "|---|---|---|---|---|---|",
        ]
        rivals = results["figures"].get("rivals", {}).get(name, {})
        for batch, row in figures["decode"].items():
            rival = rivals.get(batch)
            lines.append(
                f"| {batch} | {row['step_ms']:.2f} | {row['tokens_per_s']:.0f} | {row['share_of_bandwidth']:.0%} | "
                f"{row['host_gap_share']:.1%} | {'' if rival is None else format(rival['step_ms'], '.2f')} |"
            )
        lines += ["", "| prompt tokens | ms | tokens/s | share of the matrix rate |", "|---|---|---|---|"]
        for length, row in figures["prefill"].items():
            lines.append(f"| {length} | {row['ms']:.1f} | {row['tokens_per_s']:.0f} | {row['share_of_flops']:.0%} |")
        lines += ["", *(f"{choice}." for choice in figures["attention"])]
    return "\n".join(lines) + "\n"
