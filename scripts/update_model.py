"""Changes the model of a running server without a gap: the new version is loaded beside the old one, new requests go to
it as soon as it answers, and requests of the old one end undisturbed.

The server is one that scripts/serve.py started with --ready-file (which holds the key that this needs), in its default
--model-control-mode explicit, on this machine, from a model repository that can be written to. Memory for both versions
is needed for as long as the old one has requests, and checked first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import psutil

_REPOSITORY = Path(__file__).resolve().parent.parent / "model_repository"
sys.path.append(str(_REPOSITORY / "textgen" / "1"))

from textgen_serve import updates  # noqa: E402
from textgen_serve.control import ControlError, ModelControl  # noqa: E402
from textgen_serve.errors import ServeError  # noqa: E402


@click.command(help=__doc__)
@click.option("--ready-file", type=click.Path(path_type=Path), required=True, help="As given to scripts/serve.py.")
@click.option(
    "--model-repository", type=click.Path(path_type=Path), default=_REPOSITORY, help="The one that the server serves."
)
@click.option("--code", type=click.Path(path_type=Path), default=None, help="A repository with newer code to take.")
@click.option("--model-id", default=None, help="Folder of the new checkpoint; without it the served one.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another option of the new version.")
@click.option("--rollback", is_flag=True, help="Back to the version before the latest.")
@click.option("--load-timeout", type=click.FloatRange(1), default=1800.0, show_default=True, help="Seconds.")
@click.option("--drain-timeout", type=click.FloatRange(0), default=600.0, show_default=True, help="Seconds.")
def main(
    ready_file: Path,
    model_repository: Path,
    code: Path | None,
    model_id: str | None,
    settings: tuple[str, ...],
    rollback: bool,
    load_timeout: float,
    drain_timeout: float,
) -> None:
    """See the module's docstring."""
    patience = updates.Patience(load_timeout, drain_timeout)
    try:
        ready = json.loads(ready_file.read_text())
        control = ModelControl("127.0.0.1", ready["http_port"], ready["restricted_api_key"])
        folders = updates.VersionFolders(model_repository)
        if rollback:
            done = updates.roll_back(control, folders, patience=patience, say=click.echo)
        else:
            own = folders.options_of(folders.latest)
            served = _environment(ready) | own
            own |= dict(_pair(setting) for setting in settings)
            if model_id is not None:
                own["MODEL_ID"] = str(Path(model_id).resolve())
            new = updates.check_fits(updates.checked_config(served | own))
            version = folders.add(code or model_repository, own)
            same = _tokenizer(new.folder) == _tokenizer(Path(served["MODEL_ID"]))
            done = updates.load_beside(
                control, folders, version, same_tokenizer=same, patience=patience, say=click.echo
            )
    except (ServeError, ControlError) as error:
        raise click.ClickException(str(error)) from error
    except (OSError, KeyError, ValueError) as error:
        raise click.ClickException(f"no server can be read from {ready_file}: {error!r}") from error
    rest = "" if done.drained else f"; version {done.previous} still has requests, which go on"
    click.echo(f"version {done.version} serves{rest}")


def _environment(ready: dict[str, Any]) -> dict[str, str]:
    """The options that the server was started with: those of its process."""
    try:
        return dict(psutil.Process(ready["pids"]["tritonserver"][0]).environ())
    except psutil.Error as error:
        raise ServeError(f"the server of the ready file is not there ({error})") from error


def _pair(setting: str) -> tuple[str, str]:
    name, equals, value = setting.partition("=")
    if not equals:
        raise ServeError(f"--set: NAME=VALUE, not {setting!r}")
    return name, value


def _tokenizer(folder: Path) -> bytes | None:
    path = folder / "tokenizer.json"
    return path.read_bytes() if path.is_file() else None


if __name__ == "__main__":
    main()
