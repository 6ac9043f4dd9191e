"""Alert rules and dashboard in a real Prometheus (Debian's) that scrapes a real server."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import yaml
from monitoring import DASHBOARD, RULES, Prometheus, find_tool, panels, plain, prometheus
from triton_metric_names import FAMILIES

from .wire import Wire, wait_until

if TYPE_CHECKING:
    from ..running_server import RunningServer

MISSING = "there is no {}: install Debian's package prometheus, or run `make monitoring-tools`"
# These say something only with a GPU, under pressure, or after an accident.
MAY_BE_EMPTY = {"GPU"}


@pytest.fixture(scope="module")
def scraped(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen the shared server before, while and after it answered a few requests."""
    if find_tool("prometheus") is None:
        pytest.skip(MISSING.format("prometheus"))
    target = urllib.parse.urlsplit(server.metrics_url).netloc
    with prometheus(tmp_path_factory.mktemp("prometheus"), target, "1s") as running:
        wait_until(lambda: bool(running.query("tgi_engine_ready")), "a first scrape")
        wire = Wire(server)
        try:
            for number in range(3):
                free = {"max_new_tokens": 4, "ignore_eos_token": True}
                bound = {"max_new_tokens": 4, "grammar": {"type": "regex", "value": f"monitored {number}[a-z]{{3}}"}}
                for sampling in (free, bound):
                    assert wire.ask(text_input="Hi", stream=True, sampling_parameters=sampling).errors == []
                assert wire.error_of(text_input="Hi", sampling_parameters={"temperature": -1})
        finally:
            wire.close()
        wait_until(lambda: increase(running, "tgi_request_success") >= 6, "a scrape of what was answered")
        yield running


def increase(running: Prometheus, name: str) -> float:
    found = running.query(f"sum(max_over_time({name}[10m]) - min_over_time({name}[10m]))")
    return found[0].points[0][1] if found else 0.0


def test_promtool_accepts_configuration_and_rules() -> None:
    """The rules' own test has series that must raise each alert, and series that must not."""
    promtool = find_tool("promtool")
    if promtool is None:
        pytest.skip(MISSING.format("promtool"))
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run([promtool, *arguments], cwd=RULES.parent, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_raised_by_some_series_of_the_rules_test() -> None:
    tested = set()
    for case in yaml.safe_load((RULES.parent / "rules_test.yml").read_text())["tests"]:
        tested |= {check["alertname"] for check in case["alert_rule_test"] if check["exp_alerts"]}
    assert tested == {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}


def test_prometheus_has_every_series(scraped: Prometheus) -> None:
    (target,) = scraped.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    names = set(scraped.get("label/__name__/values"))
    for name, family in FAMILIES.items():
        parts = [f"{name}_{part}" for part in ("bucket", "count", "sum")] if family.buckets else [name]
        assert set(parts) <= names
    types = {name: entries[0]["type"] for name, entries in scraped.get("metadata").items()}
    assert {name: types[name] for name in FAMILIES} == {name: family.kind for name, family in FAMILIES.items()}


def test_every_panel_shows_something(scraped: Prometheus) -> None:
    empty = set()
    for panel in panels():
        for expression, _ in panel.queries:
            series = scraped.query(plain(expression, "10m"))
            if not any(entry.points for entry in series):
                empty.add(panel.title)
    assert empty <= MAY_BE_EMPTY
    (variable,) = (v for v in json.loads(DASHBOARD.read_text())["templating"]["list"] if v["name"] == "instance")
    asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert asked is not None
    assert scraped.get(f"label/{asked[2]}/values", **{"match[]": asked[1]})


def test_rules_evaluate_and_a_healthy_server_raises_no_alarm(scraped: Prometheus) -> None:
    def rules() -> list[dict[str, str]]:
        return [rule for group in scraped.get("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] == "ok" for rule in rules()), "every rule evaluated")
    assert {rule["name"] for rule in rules() if rule["state"] == "firing"} == set()
