"""A real Prometheus over a running server, and the dashboard's panels as its queries; for tests and pictures.

Prometheus is Debian's: installed, or fetched by `make monitoring-tools` into .cache/tools.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "docker" / "prometheus" / "rules.yml"
CONFIGURATION = ROOT / "docker" / "prometheus" / "prometheus.yml"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboard.json"
_TOOLS = ROOT / ".cache" / "tools" / "usr" / "bin"
_START_S = 60.0


class QueryError(Exception):
    """Prometheus refused a query, or cannot be asked."""


@dataclass(frozen=True)
class Panel:
    """One panel of the dashboard. queries: (expression, legend), with Grafana's variables still in them."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    column: int
    row: int
    width: int


@dataclass(frozen=True)
class Series:
    """One line of an answer: its labels, and (seconds, value) where there is a number."""

    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]


def find_tool(name: str) -> str | None:
    """Path of `prometheus` or `promtool`; None where neither the machine nor .cache/tools has it."""
    return shutil.which(name) or shutil.which(name, path=str(_TOOLS))


def panels() -> list[Panel]:
    """The dashboard's panels, from top to bottom."""
    found = []
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        queries = tuple((target["expr"], target["legendFormat"]) for target in panel["targets"])
        place = panel["gridPos"]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        found.append(Panel(panel["title"], unit, queries, place["x"], place["y"], place["w"]))
    return sorted(found, key=lambda panel: (panel.row, panel.column))


def plain(expression: str, window: str) -> str:
    """A panel's expression without Grafana's variables: all instances, rates over `window`."""
    return expression.replace("$__rate_interval", window).replace("$instance", ".*")


class Prometheus:
    """A running Prometheus with the project's configuration and rules."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process = process
        self.url = url

    def get(self, path: str, **parameters: str | float) -> Any:
        """The `data` of an answer of the HTTP API. Raises QueryError with Prometheus' own text."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise QueryError(json.load(error).get("error", str(error))) from None
        except OSError as error:
            raise QueryError(str(error)) from None

    def query(self, expression: str) -> list[Series]:
        """The present value of an expression."""
        found = self.get("query", query=expression)["result"]
        return [Series(entry["metric"], _points([entry["value"]])) for entry in found]

    def query_range(self, expression: str, start_s: float, end_s: float, step_s: float) -> list[Series]:
        """An expression over time."""
        found = self.get("query_range", query=expression, start=start_s, end=end_s, step=step_s)["result"]
        return [Series(entry["metric"], _points(entry["values"])) for entry in found]


def _points(pairs: list[list[Any]]) -> tuple[tuple[float, float], ...]:
    return tuple((when, value) for when, value in ((pair[0], float(pair[1])) for pair in pairs) if math.isfinite(value))


@contextmanager
def prometheus(folder: Path, target: str, interval: str) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `target` (host:port) as the project's configuration says, but every `interval`, and
    evaluates the rules as often. Its data and its log are below `folder`."""
    binary = find_tool("prometheus")
    if binary is None:
        raise QueryError("there is no prometheus: install Debian's package, or run `make monitoring-tools`")
    configuration = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
    configuration["global"] = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    configuration["rule_files"] = [str(RULES)]
    (job,) = configuration["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [binary, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=output, stderr=subprocess.STDOUT
        )
    running = Prometheus(process, f"http://{address}")
    try:
        deadline = time.monotonic() + _START_S
        while not _is_ready(running.url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise QueryError(f"Prometheus did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
