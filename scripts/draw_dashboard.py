#!/usr/bin/env python3
"""Draw the dashboard's panels from a real Prometheus over a real server, while mixed traffic runs.

    draw_dashboard.py [--minutes 4] [--output docs/dashboard.png]

Starts scripts/serve.py with MODEL_ID (default: the demonstration model), a Prometheus that scrapes it, and clients:
chats and completions of several lengths, some with a grammar, some cancelled, some refused, more and fewer of them in
turn. Needs matplotlib (`pip install '.[benchmark]'`) and Prometheus (`make monitoring-tools`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "client"))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter
from monitoring import ROOT, Panel, Prometheus, Series, panels, plain, prometheus
from PIL import Image

from textgen_client import Client, TextgenError

_WINDOW = "20s"
_MAX_BYTES = 200_000
_COLUMNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "dashboard.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server, ready = _start_server(folder)
        try:
            with prometheus(folder, f"127.0.0.1:{ready['metrics_port']}", "2s") as running:
                start_s = time.time()
                _make_traffic(f"127.0.0.1:{ready['grpc_port']}", options.minutes * 60)
                time.sleep(5)
                _draw(running, start_s, time.time(), options.output)
        finally:
            server.terminate()
            server.wait()
    size = options.output.stat().st_size
    print(f"{options.output}: {size} bytes")
    if size > _MAX_BYTES:
        raise SystemExit(f"larger than {_MAX_BYTES} bytes")


def _start_server(folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    model = ROOT / ".cache" / "models" / "smollm2-135m-instruct"
    environment = {"MODEL_ID": str(model), "MAX_TOTAL_TOKENS": "1024", "MAX_BATCH_TOTAL_TOKENS": "4096"} | os.environ
    ready_file = folder / "ready.json"
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--no-demo", "--no-gateway", "--host", "127.0.0.1"]
    command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0", f"--ready-file={ready_file}"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not ready_file.exists():
        if server.poll() is not None:
            raise SystemExit("the server did not start")
        time.sleep(0.2)
    return server, json.loads(ready_file.read_text())


# ---- traffic --------------------------------------------------------------------------------------------------------


def _make_traffic(url: str, seconds: float) -> None:
    """Clients that come and go like a tide: one at first, eight in the middle."""
    end_s = time.monotonic() + seconds
    start_s = time.monotonic()
    threads = [
        threading.Thread(target=_one_client, args=(url, number, start_s, end_s), daemon=True) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _one_client(url: str, number: int, start_s: float, end_s: float) -> None:
    dice = random.Random(number)
    with Client(url) as client:
        while time.monotonic() < end_s:
            share = (time.monotonic() - start_s) / (end_s - start_s)
            if number >= 1 + 7 * math.sin(math.pi * share):
                time.sleep(0.5)
                continue
            try:
                _one_request(client, dice)
            except TextgenError:
                time.sleep(0.2)  # refused on purpose, or too many at once: both belong into the picture


def _one_request(client: Client, dice: random.Random) -> None:
    kind = dice.random()
    length = dice.choice((8, 24, 60))
    if kind < 0.5:
        system = {"role": "system", "content": "You are a patient teller of tales. " * 8}
        question = {"role": "user", "content": f"Tell me of the year {dice.randrange(2000)}."}
        for _ in client.stream(messages=[system, question], max_new_tokens=length):
            pass
    elif kind < 0.7:
        list(client.stream("word " * dice.randrange(50, 500), max_new_tokens=length))
    elif kind < 0.85:
        grammar = {"type": "json", "value": _schema(dice)}
        client.generate("A person:", grammar=grammar, max_new_tokens=60)
    elif kind < 0.93:
        with client.stream("A long story:", max_new_tokens=300) as stream:
            for _ in range(5):
                next(stream)
    else:
        client.generate("refused", temperature=-1)


def _schema(dice: random.Random) -> dict[str, Any]:
    names = {"type": "string", "maxLength": dice.randrange(5, 12)}
    return {"type": "object", "properties": {"name": names, "age": {"type": "integer"}}, "required": ["name", "age"]}


# ---- the picture ----------------------------------------------------------------------------------------------------


def _draw(running: Prometheus, start_s: float, end_s: float, output: Path) -> None:
    shown = [panel for panel in panels() if panel.title != "GPU"]
    rows = -(-len(shown) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(13, 2.3 * rows), layout="constrained")
    for axis, panel in zip(axes.flat, shown, strict=False):
        _draw_panel(
            axis,
            panel,
            lambda text: running.query_range(plain(text, _WINDOW), start_s, end_s, 2),
            start_s,
            (end_s - start_s) / 60,
        )
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("minutes", fontsize=8)
    figure.savefig(output, dpi=70)
    with Image.open(output) as picture:
        picture.convert("RGB").quantize(64).save(output, optimize=True)


def _draw_panel(
    axis: Any, panel: Panel, ask: Callable[[str], list[Series]], start_s: float, minutes_shown: float
) -> None:
    axis.set_title(panel.title, fontsize=10, loc="left")
    for expression, legend in panel.queries:
        found = ask(expression)
        for series in found:
            if len(found) > 4 and not any(value for _, value in series.points):
                continue  # of many reasons, only those that happened
            minutes = [(when - start_s) / 60 for when, _ in series.points]
            values = [value for _, value in series.points]
            axis.plot(minutes, values, linewidth=1.3, label=_label(legend, series.labels) or None)
    axis.set_xlim(0, minutes_shown)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _with_unit(value, panel.unit)))
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=6.5, ncols=2, framealpha=0.6)


def _label(legend: str, labels: dict[str, str]) -> str:
    """Grafana's legend of one series. There is one instance, and its port is chance."""
    for name in re.findall(r"\{\{(\w+)\}\}", legend):
        legend = legend.replace(f"{{{{{name}}}}}", "" if name == "instance" else labels.get(name, ""))
    return legend.strip()


def _with_unit(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1000:g} ms" if value < 1 else f"{value:g} s"
    if unit == "percentunit":
        return f"{value * 100:g} %"
    return f"{value:g}/s" if unit == "reqps" else f"{value:g}"


if __name__ == "__main__":
    main()
