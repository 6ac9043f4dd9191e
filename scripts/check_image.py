"""Runs the instructions of docker/Dockerfile.cpu in a fresh folder, up to a healthy server and its orderly stop.

For machines without a container engine. It takes the place of a build as far as files, packages, environment,
entry point, health check and stop signal go; the base image, the user and the volumes are the machine's own.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
from dockerfile_parse import DockerfileParser

_ROOT = Path(__file__).resolve().parent.parent
# Where the image has its files; below the fresh folder here.
_PLACES = ("/opt/triton-textgen", "/cache", "/models")
_READY_WITHIN_S = 300.0


@dataclass
class _Image:
    """What the instructions have made so far. `folder` stands for the image's root."""

    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    stop_signal: signal.Signals = signal.SIGTERM

    def here(self, text: str) -> str:
        """The text with the image's places moved below the folder."""
        for place in _PLACES:
            text = text.replace(place, f"{self.folder}{place}")
        return text

    def apply(self, instruction: str, value: str) -> None:
        """Follow one instruction, or say that it is left out."""
        if instruction == "WORKDIR":
            self.workdir = self.here(value)
            Path(self.workdir).mkdir(parents=True, exist_ok=True)
        elif instruction == "ENV":
            for pair in shlex.split(value):
                name, _, content = pair.partition("=")
                self.environment[name] = self.here(content).replace("$PATH", self.environment["PATH"])
        elif instruction == "COPY" and not value.startswith("--from"):
            *sources, target = value.split()
            for source in sources:
                _copy(_ROOT / source, Path(self.workdir) / target)
        elif instruction == "RUN" and "useradd" not in value:
            command = self.here(value)
            if command.startswith("python "):  # the image's python is the one that runs this
                command = f"{sys.executable} {command.removeprefix('python ')}"
            subprocess.run(["sh", "-ec", command], cwd=self.workdir, env=self.environment, check=True)
        elif instruction == "ENTRYPOINT":
            self.entrypoint = [self.here(part) for part in json.loads(value)]
        elif instruction == "HEALTHCHECK":
            self.health = json.loads(value[value.index("[") :])
        elif instruction == "STOPSIGNAL":
            self.stop_signal = signal.Signals[value]
        else:
            click.echo(f"left out: {instruction} {value.splitlines()[0][:80]}")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    else:
        shutil.copy(source, target)


def _serve(image: _Image, model: Path) -> None:
    """Start the entry point, ask the health check, stop; ClickException where one of them fails."""
    for place in _PLACES:
        Path(f"{image.folder}{place}").mkdir(parents=True, exist_ok=True)
    ready = image.folder / "ready.json"
    command = [*image.entrypoint, "--host", "127.0.0.1", "--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    environment = image.environment | {"MODEL_ID": str(model)}
    server = subprocess.Popen([*command, f"--ready-file={ready}"], cwd=image.workdir, env=environment)
    try:
        deadline = time.monotonic() + _READY_WITHIN_S
        while not ready.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException("the server did not become ready")
            time.sleep(0.2)
        ports = json.loads(ready.read_text())
        metrics_url = f"http://127.0.0.1:{ports['metrics_port']}/metrics"
        command = [*image.health, "--url", f"127.0.0.1:{ports['grpc_port']}", "--metrics-url", metrics_url]
        healthy = subprocess.run(command, env=environment, cwd=image.workdir)
        if healthy.returncode != 0:
            raise click.ClickException(f"the health check ended with {healthy.returncode}")
        server.send_signal(image.stop_signal)
        code = server.wait(60)
        if code != 0:
            raise click.ClickException(f"the server ended with {code}")
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="A folder to make; it must not exist.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True, help="A checkpoint to serve.")
def main(folder: Path, model: Path) -> None:
    """See the module's docstring."""
    folder = folder.resolve()
    folder.mkdir(parents=True)
    parser = DockerfileParser(fileobj=io.BytesIO((_ROOT / "docker" / "Dockerfile.cpu").read_bytes()))
    image = _Image(folder)
    for step in parser.structure:
        if step["instruction"] not in ("COMMENT", "FROM"):
            click.echo(f"--- {step['instruction']} {step['value'].splitlines()[0][:100]}")
            image.apply(step["instruction"], step["value"])
    _serve(image, model.resolve())
    click.echo("built, served, healthy, stopped")


if __name__ == "__main__":
    main()
