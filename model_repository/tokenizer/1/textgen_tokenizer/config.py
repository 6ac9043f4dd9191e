"""The tokenizer's options: which checkpoint, how long a prompt may be. Read once, while the model loads.

Each option is an environment variable or, in lower case, a parameter of config.pbtxt; the environment wins and an
empty value counts as unset. The names are those of Text Generation Inference's launcher. Its `validation_workers` is
the instance count of config.pbtxt: each instance is a process of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from textgen_tokenizer.errors import ConfigError

_OPTIONS = (
    "model_id",
    "revision",
    "tokenizer_config_path",
    "trust_remote_code",
    "max_input_tokens",
    "max_input_length",
    "max_total_tokens",
)


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What to load and what to allow.

    model_id: folder of a checkpoint (or its name, where a model hub can be reached). revision: of a named checkpoint.
    tokenizer_config_path: a tokenizer_config.json (or a Jinja file) whose chat template and special tokens replace the
    checkpoint's. max_input_tokens: longest prompt; None follows the model's position limit.
    """

    model_id: str
    revision: str | None = None
    tokenizer_config_path: str | None = None
    trust_remote_code: bool = False
    max_input_tokens: int | None = None


def read_config(parameters: Mapping[str, str], environ: Mapping[str, str]) -> TokenizerConfig:
    """The configuration from config.pbtxt's parameters and the environment. Raises ConfigError."""
    for name in parameters:
        # Upper-case parameters (EXECUTION_ENV_PATH, ...) belong to Triton's Python backend.
        if name not in _OPTIONS and name.upper() != name:
            raise ConfigError(f"unknown parameter {name!r} in config.pbtxt; known: {', '.join(_OPTIONS)}")
    values = {name: (environ.get(name.upper()) or parameters.get(name, "")).strip() for name in _OPTIONS}
    if not values["model_id"]:
        raise ConfigError("MODEL_ID is not set: give the folder of a Hugging Face checkpoint")
    if values["max_input_tokens"] and values["max_input_length"]:
        raise ConfigError("MAX_INPUT_LENGTH is the older name of MAX_INPUT_TOKENS: set only one of them")
    max_input = _read_length("max_input_tokens", values["max_input_tokens"] or values["max_input_length"], minimum=1)
    max_total = _read_length("max_total_tokens", values["max_total_tokens"], minimum=2)
    if max_input is None and max_total is not None:
        max_input = max_total - 1
    return TokenizerConfig(
        model_id=values["model_id"],
        revision=values["revision"] or None,
        tokenizer_config_path=values["tokenizer_config_path"] or None,
        trust_remote_code=_read_flag("trust_remote_code", values["trust_remote_code"]),
        max_input_tokens=max_input,
    )


def _read_length(name: str, text: str, minimum: int) -> int | None:
    if not text:
        return None
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise ConfigError(f"{name.upper()} must be a whole number of at least {minimum}; given: {text!r}")
    return value


def _read_flag(name: str, text: str) -> bool:
    lowered = text.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(f"{name.upper()} must be true or false; given: {text!r}")
