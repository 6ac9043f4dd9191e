"""Starts the stock tritonserver with this model repository, says when it can be used, and stops it without leftovers.

Options of the engine have the names and defaults of Text Generation Inference's launcher, as flags or as environment
variables (MODEL_ID, MAX_INPUT_TOKENS, ...). Without a model id the demonstration model is served. What follows a lone
`--` is handed to tritonserver.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

_REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
_MODEL_REPOSITORY = _REPOSITORY_ROOT / "model_repository"
# The engine is not installed: it is found where Triton finds it.
sys.path.append(str(_MODEL_REPOSITORY / "textgen" / "1"))

from textgen_serve import options  # noqa: E402
from textgen_serve.errors import ServeError  # noqa: E402
from textgen_serve.launcher import Launcher, LaunchOptions  # noqa: E402
from textgen_serve.terminal import Terminal  # noqa: E402


def main(**given: Any) -> None:
    """Turn what click parsed into a server; every foreseen problem into one line and an exit status."""
    launch = LaunchOptions(**{name: given.pop(name) for name in LaunchOptions.__dataclass_fields__})
    terminal = Terminal()
    try:
        Launcher(launch, options.as_environment(given), terminal).run()
    except ServeError as error:
        terminal.error(str(error))
        sys.exit(1)


def _launch_flags() -> list[click.Parameter]:
    port = click.IntRange(0, 65535)
    seconds = click.IntRange(0, 86400)
    folder = click.Path(path_type=Path, file_okay=False)
    file = click.Path(path_type=Path, dir_okay=False)

    def option(flag: str, default: Any, help: str, **more: Any) -> click.Option:
        more.setdefault("show_default", default is not None)
        return click.Option([flag], default=default, help=help, **more)

    return [
        option("--host", "0.0.0.0", "Address to listen on.", envvar="HOST"),
        option("--http-port", 8000, "HTTP; 0 takes a free port.", type=port, envvar="HTTP_PORT"),
        option("--grpc-port", 8001, "gRPC; 0 takes a free port.", type=port, envvar="GRPC_PORT"),
        option("--metrics-port", 8002, "Prometheus metrics; 0 takes a free port.", type=port, envvar="METRICS_PORT"),
        option("--gateway/--no-gateway", True, "Serve TGI's and OpenAI's HTTP routes as well.", envvar="GATEWAY"),
        option(
            "--gateway-port",
            8080,
            "Those routes; 0 takes a free port.",
            type=port,
            envvar=["AIP_HTTP_PORT", "GATEWAY_PORT"],
        ),
        option("--ready-file", None, "JSON with ports and process ids; there while requests succeed.", type=file),
        option("--demo/--no-demo", True, "Show the answer to a first chat message.", envvar="DEMO"),
        option(
            "--graceful-termination-timeout",
            90,
            "Seconds that running requests get when the server is stopped.",
            type=seconds,
            envvar="GRACEFUL_TERMINATION_TIMEOUT",
        ),
        option(
            "--model-control-mode",
            "explicit",
            "Triton's. A tokenizer is replaced in place, and models are updated, in `explicit` only.",
            type=click.Choice(["none", "poll", "explicit"]),
        ),
        option(
            "--restricted-api-key",
            None,
            "Header `admin-key` that Triton's administrative calls need; default: random, in the ready file.",
            envvar="RESTRICTED_API_KEY",
        ),
        option(
            "--max-server-restarts",
            5,
            "Restarts of the server within ten minutes, when it or a process of its models dies; then it ends.",
            type=click.IntRange(0, 1000),
            envvar="MAX_SERVER_RESTARTS",
        ),
        option("--log-file", None, "The server's log, appended to; without it kept only on failure.", type=file),
        option("--verbose/--quiet", False, "Show the server's whole log."),
        option(
            "--cache-dir",
            _REPOSITORY_ROOT / ".cache",
            "Prepared model, backend folder, logs.",
            type=folder,
            show_default=".cache",
        ),
        option(
            "--model-repository",
            _MODEL_REPOSITORY,
            "Triton's model repository.",
            type=folder,
            show_default="model_repository",
        ),
        click.Argument(["triton_args"], nargs=-1, type=click.UNPROCESSED, metavar="[-- TRITON_ARGS...]"),
    ]


if __name__ == "__main__":
    click.Command("serve", params=[*_launch_flags(), *options.engine_flags()], callback=main, help=__doc__)()
