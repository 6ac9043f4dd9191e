"""Flags of `scripts/serve.py` that belong to the engine: one per row of the engine's own table of options.

The models read their options from the environment, under TGI's names. So a flag that is given becomes the variable of
that name for the server; ranges and meanings stay with the engine, which is found by path, as Triton finds it, and
whose table imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from textgen_engine.config import EngineConfig
from textgen_engine.configure import build_config
from textgen_engine.errors import ConfigError
from textgen_engine.options import OPTIONS, UNSUPPORTED_OPTIONS, Option
from textgen_serve.errors import ServeError


def engine_flags() -> list[click.Option]:
    """One flag per option, None unless given; TGI's flags that this version refuses are known, but not shown."""
    refused = [
        click.Option([_flag(name), name], type=str, default=None, hidden=True) for name in sorted(UNSUPPORTED_OPTIONS)
    ]
    return [_shown(option) for option in OPTIONS] + refused


def as_environment(flags: Mapping[str, Any]) -> dict[str, str]:
    """The environment variables that stand for the flags given."""
    variables = {option.name: option.env for option in OPTIONS} | {name: name.upper() for name in UNSUPPORTED_OPTIONS}
    return {variables[name]: _text(value) for name, value in flags.items() if value is not None and name in variables}


def check(environment: Mapping[str, str], num_gpus: int) -> EngineConfig:
    """What the engine will make of `environment`; its refusal, if any, becomes a ServeError before a server starts."""
    try:
        return build_config({}, environment, has_gpu=num_gpus > 0, num_gpus=num_gpus or None)
    except ConfigError as error:
        raise ServeError(str(error)) from error


def _shown(option: Option) -> click.Option:
    help_text = option.help if option.default is None else f"{option.help}  [default: {_text(option.default)}]"
    if option.type is bool:
        return click.Option(
            [f"{_flag(option.name)}/{_flag('no_' + option.name)}", option.name], default=None, help=help_text
        )
    # Values stay text: the engine parses and checks them, with the same words wherever they came from.
    return click.Option([_flag(option.name), option.name], type=str, default=None, metavar="VALUE", help=help_text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
