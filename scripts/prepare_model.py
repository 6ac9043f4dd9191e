"""Prepares the demonstration model, SmolLM2-135M-Instruct, as a folder that MODEL_ID can name."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from textgen_serve import demo_model
from textgen_serve.errors import ServeError

_REPOSITORY_ROOT = Path(__file__).resolve().parent.parent


@click.command(help=__doc__)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=demo_model.default_folder(_REPOSITORY_ROOT / ".cache"),
    show_default=".cache/models/smollm2-135m-instruct",
    help="Folder to create; one that is complete is left as it is.",
)
def main(output: Path) -> None:
    started = time.monotonic()
    try:
        made = demo_model.prepare(output)
    except ServeError as error:
        sys.exit(f"error: {error}")
    click.echo(f"{output}: " + (f"prepared in {time.monotonic() - started:.0f} s" if made else "complete"))


if __name__ == "__main__":
    main()
