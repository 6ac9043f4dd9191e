"""Loads a checkpoint's tokenizer and the few numbers of its config that bound token ids and prompt lengths.

With config.py's record in and `LoadedTokenizer` out; transformers is imported here, when `load` is called, and
nowhere else in the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgen_tokenizer.config import TokenizerConfig
from textgen_tokenizer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The names under which configs of different families write the longest sequence they were made for.
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx", "seq_length")
_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """A tokenizer with its limits.

    vocab_size: token ids from 0 to vocab_size - 1 may go into the model (the model's vocabulary, which is often padded
    beyond the tokenizer's). max_input_tokens: longest prompt, None when neither options nor checkpoint bound it.
    max_chars_per_token: no token stands for more characters than this; None where that cannot be known.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_input_tokens: int | None
    max_chars_per_token: int | None


def load(config: TokenizerConfig) -> LoadedTokenizer:
    """Load the tokenizer. Raises ConfigError, or what transformers raises for a folder that it cannot read."""
    from transformers import AutoTokenizer

    config, gguf_file = _locate(config)
    tokenizer = AutoTokenizer.from_pretrained(
        config.model_id,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        **({} if gguf_file is None else {"gguf_file": gguf_file}),
    )
    if config.tokenizer_config_path is not None:
        _override(tokenizer, Path(config.tokenizer_config_path))
    model_config = _read_model_config(config)
    max_input_tokens = config.max_input_tokens
    if max_input_tokens is None:
        max_positions = _first_number(model_config, _LENGTH_NAMES)
        max_input_tokens = None if max_positions is None else max_positions - 1
    return LoadedTokenizer(
        tokenizer=tokenizer,
        vocab_size=_first_number(model_config, ("vocab_size",)) or len(tokenizer),
        max_input_tokens=max_input_tokens,
        max_chars_per_token=_max_chars_per_token(tokenizer),
    )


def _locate(config: TokenizerConfig) -> tuple[TokenizerConfig, str | None]:
    """The configuration with the folder that really holds the tokenizer, and the GGUF file to read it from, if any.

    Goes by the same rules as the engine: a .gguf file or a folder with one, a folder laid out like the hub's cache
    (`snapshots/`, `refs/`), else a folder or a name as it stands.
    """
    path = Path(config.model_id).expanduser()
    gguf_file = None
    if path.suffix == ".gguf" and path.is_file():
        path, gguf_file = path.parent, path.name
    elif not path.is_dir():
        return config, None
    elif (path / "snapshots").is_dir():
        reference = path / "refs" / (config.revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else config.revision or "main"
        path = path / "snapshots" / commit
    elif not any(path.glob("tokenizer*")):
        gguf_file = next((file.name for file in sorted(path.glob("*.gguf"))), None)
    if any(path.glob("tokenizer*")):
        gguf_file = None
    return replace(config, model_id=str(path), revision=None), gguf_file


def _override(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Chat template and special tokens from another tokenizer_config.json, or a chat template from a Jinja file."""
    try:
        text = path.read_text(encoding="utf-8")
        values = {"chat_template": text} if path.suffix in (".jinja", ".j2") else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"TOKENIZER_CONFIG_PATH: cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"TOKENIZER_CONFIG_PATH: {path} does not hold a JSON object")
    template = values.get("chat_template")
    if isinstance(template, list):  # the older way to write several named templates
        template = {entry["name"]: entry["template"] for entry in template}
    if template is not None:
        tokenizer.chat_template = template
    for name in _SPECIAL_TOKEN_NAMES:
        token = values.get(name)
        if isinstance(token, dict):  # an AddedToken written out
            token = token.get("content")
        if isinstance(token, str):
            setattr(tokenizer, name, token)


def _read_model_config(config: TokenizerConfig) -> dict[str, Any]:
    """The checkpoint's config.json; {} where there is none."""
    from transformers.utils.hub import cached_file

    folder = Path(config.model_id)
    path: Path | str | None = folder / "config.json"
    if not folder.is_dir():
        path = cached_file(config.model_id, "config.json", revision=config.revision)
    if path is None or not Path(path).is_file():
        return {}
    values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return values


def _first_number(model_config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    # Models of several modalities nest the language model's config.
    for part in (model_config, model_config.get("text_config"), model_config.get("llm_config")):
        for name in names:
            value = part.get(name) if isinstance(part, dict) else None
            if isinstance(value, int) and value > 0:
                return value
    return None


def _max_chars_per_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest token's length, where every character of a text ends up in some token.

    That holds for byte-level vocabularies that do not rewrite the text first; elsewhere a normalizer, an unknown
    token or an added token that swallows spaces may make one token of any number of characters.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is not None or type(backend.decoder).__name__ != "ByteLevel":
        return None
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):
        return None
    return max(map(len, backend.get_vocab()), default=None)
