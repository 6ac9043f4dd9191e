"""docker/: the Dockerfiles by hadolint; alert rules, dashboard and compose file against what the server really has."""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from triton_metric_names import FAMILIES

from textgen_engine.options import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([str(hadolint), str(DOCKER / name)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_run_as_nobody_special_and_copy_what_exists(name: str) -> None:
    text = (DOCKER / name).read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert bases and all(re.search(r":\S*\d", base) for base in bases)
    assert re.search(r"^USER 1000", text, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM", text, re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (?!--)(.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"\n!{source}\n" in ignored, f"{source} never reaches the build"


def metric_names() -> set[str]:
    """Every metric that the server publishes."""
    return set(FAMILIES)


def expressions() -> list[str]:
    """What alerts and panels compute."""
    rules = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())
    found: list[str] = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboard.json").read_text())
    found += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found


def test_alerts_and_panels_ask_for_metrics_that_exist() -> None:
    known = metric_names()
    assert "tgi_generated_tokens" in known
    asked = {name for text in expressions() for name in re.findall(r"\btgi_\w+", text)}
    assert (
        asked and {re.sub(r"_(bucket|sum|count)$", "", name) if name not in known else name for name in asked} <= known
    )


def test_every_alert_is_explained() -> None:
    """What it means, what to look at and what to do, each under the alert's own heading; and no other."""
    operations = (ROOT / "docs" / "operations.md").read_text()
    rules = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", operations, re.MULTILINE | re.DOTALL))
    assert list(sections) == alerts
    for text in sections.values():
        assert "- Look at" in text and ("- Do:" in text or "and do:" in text)


def test_the_documentation_names_options_and_metrics_that_exist() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text()
    names = set(re.findall(r"`(tgi_\w+)`", operations))
    assert names <= set(FAMILIES)
    launcher = set(re.findall(r'envvar="(\w+)"', (ROOT / "scripts" / "serve.py").read_text()))
    known = {option.env for option in OPTIONS} | launcher | {"OTEL_EXPORTER_OTLP_HEADERS"}
    asked = set(re.findall(r"`([A-Z][A-Z_]{5,})(?:=\w+)?`", operations)) - {"OTEL_RESOURCE_ATTRIBUTES", "_CERTIFICATE"}
    assert asked <= known


def test_the_compose_file_sets_options_that_exist() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    known = {option.env for option in OPTIONS} | {"GRACEFUL_TERMINATION_TIMEOUT"}
    assert set(services["textgen"]["environment"]) <= known
    drain = int(services["textgen"]["environment"]["GRACEFUL_TERMINATION_TIMEOUT"])
    assert int(services["textgen"]["stop_grace_period"].removesuffix("s")) > drain
    assert (DOCKER / services["textgen"]["build"]["dockerfile"]).name in DOCKERFILES
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DOCKER / source).exists()
