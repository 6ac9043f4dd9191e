"""Tables and a plot of a comparison. Ratios are made within a round, where the engines ran close in time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# What each table shows: title, key in a run's figures, and whether more is better.
_TABLES = (
    ("Output tokens/s, prompts included", "output_tokens_per_s", True),
    ("Time to the first token, median, ms", "ttft_p50_ms", False),
    ("Gap between tokens, median, ms", "inter_token_p50_ms", False),
    ("Gap between tokens, 99th percentile, ms", "inter_token_p99_ms", False),
    ("Decode step (lower quartile of the gaps), ms", "decode_step_ms", False),
)
_ONCE = (
    ("Prompt tokens/s of all prompts together", "prefill_tokens_per_s", True),
    ("Start of the process to the first token, s", "cold_start_s", False),
    ("Peak memory, MiB", "peak_memory_mib", False),
)
_OURS = "triton-textgen"


def as_markdown(report: dict[str, Any]) -> str:
    """The page: conditions, one table for each figure, ratios beside the absolute values."""
    machine = report["machine"]
    lines = [
        "# Beside other engines, in one run",
        "",
        f"{report['model']}, {len(report['prompts'])} prompts ({sum(report['prompts'])} tokens), "
        f"{report['new_tokens']} new tokens each, greedy, end of sequence ignored, no kept prefixes.",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {report['date']}.",
        f"{report['rounds']} rounds; in each every engine was started, measured and stopped in turn. Where an engine "
        "has a server, it was asked over the network (ours: tritonserver, gRPC); libraries ran in a process of their "
        "own without one. A cell: median (smallest to largest of the rounds). *Ratio*: how many times better our "
        "figure is than this engine's in the same round; below 1 the other is better.",
        "",
        *(f"- {name}: {version}" for name, version in report["versions"].items()),
        *(f"- {name}: skipped: {reason}" for name, reason in report["skipped"].items()),
        "",
    ]
    for title, key, more_is_better in _TABLES:
        lines += _table(report, title, key, more_is_better, report["concurrency"])
    for title, key, more_is_better in _ONCE:
        lines += _table(report, title, key, more_is_better, None)
    lines += ["## How far the rounds can be trusted", ""]
    for percent, word in (("stolen_percent", "withheld by the host"), ("foreign_percent", "used by other processes")):
        values = [figures[percent] for run in report["runs"] for figures in run["levels"].values()]
        lines.append(
            f"- Processor time {word}: median {statistics.median(values):.1f} %, at most {max(values):.1f} % of a run."
        )
    lines += ["", "Same greedy tokens as ours, leading tokens of 64 in the mean over the prompts of one stream:", ""]
    lines += [f"- {name}: {value:.1f}" for name, value in report["common_prefix"].items()]
    return "\n".join([*lines, ""])


def _table(
    report: dict[str, Any], title: str, key: str, more_is_better: bool, levels: Iterable[int] | None
) -> list[str]:
    columns = list(levels) if levels is not None else [None]
    heads = [f"{level} streams" if level else "" for level in columns]
    lines = [f"## {title}", "", "| engine | " + " | ".join(f"{head} | ratio" for head in heads) + " |"]
    lines.append("|---" * (1 + 2 * len(columns)) + "|")
    for name in report["versions"]:
        cells = []
        for level in columns:
            values = _by_round(report, name, key, level)
            ours = _by_round(report, _reference(report, name), key, level)
            shared = sorted(values.keys() & ours.keys())
            quotients = [
                ours[number] / values[number] if more_is_better else values[number] / ours[number]
                for number in shared
                if values[number] and ours[number]
            ]
            cells += [
                _spread(values.values(), ".1f"),
                _spread(quotients, ".2f") if name not in _ourselves(report) else "",
            ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _ourselves(report: dict[str, Any]) -> list[str]:
    return [name for name in report["versions"] if name.startswith(_OURS)]


def _reference(report: dict[str, Any], name: str) -> str:
    """Which of our own servers a rival is held against: the one with weights of its precision."""
    precision = report["precisions"][name]
    return next((ours for ours in _ourselves(report) if report["precisions"][ours] == precision), _OURS)


def _by_round(report: dict[str, Any], name: str, key: str, level: int | None) -> dict[int, float]:
    found: dict[int, float] = {}
    for run in report["runs"]:
        if run["engine"] == name:
            place = run if level is None else run["levels"].get(str(level), {})
            if place.get(key) is not None:
                found[run["round"]] = place[key]
    return found


def _spread(values: Iterable[float], form: str) -> str:
    ordered = sorted(values)
    if not ordered:
        return "-"
    middle = format(statistics.median(ordered), form)
    if len(ordered) == 1:
        return middle
    return f"{middle} ({format(ordered[0], form)} to {format(ordered[-1], form)})"


def plot(report: dict[str, Any], target: Path, say: Callable[[str], None]) -> None:
    """Bars of output tokens/s for each concurrency; without matplotlib a line says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plot: matplotlib is not installed (make bench-compare installs it)")
        return
    levels, names = report["concurrency"], list(report["versions"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for place, level in enumerate(levels, start=1):
        axes = figure.add_subplot(1, len(levels), place)
        by_name = {name: list(_by_round(report, name, "output_tokens_per_s", level).values()) for name in names}
        by_name = {name: values for name, values in by_name.items() if values}
        medians = [statistics.median(values) for values in by_name.values()]
        spread = [
            [median - min(values) for median, values in zip(medians, by_name.values(), strict=True)],
            [max(values) - median for median, values in zip(medians, by_name.values(), strict=True)],
        ]
        colors = ["#2a6fbb" if name.startswith(_OURS) else "#b8bcc2" for name in by_name]
        axes.barh(list(by_name), medians, xerr=spread, color=colors, error_kw={"lw": 1})
        axes.invert_yaxis()
        axes.set_title(f"{level} stream{'s' if level > 1 else ''}", fontsize=10)
        axes.set_xlabel("output tokens/s", fontsize=9)
        axes.tick_params(labelsize=8)
        if place > 1:
            axes.set_yticklabels([])
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(target, dpi=110)
    say(f"written: {target}")
