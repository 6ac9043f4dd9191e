"""A new version of the served model beside the old one: its folders, whether it fits into memory, and the change over.

A version is a folder `<model>/<number>/` of Triton's model repository, with the code and, in `options.json`, the
options that are this version's own (above all MODEL_ID); they win over the server's environment. `textgen` and
`tokenizer` get the same number, and a version of textgen asks the tokenizer of its own number.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from textgen_engine import host_memory
from textgen_engine.config import EngineConfig
from textgen_engine.host_devices import visible_gpus
from textgen_serve import checkpoint, options
from textgen_serve.control import ControlError, ModelControl
from textgen_serve.errors import ServeError

MODELS = ("tokenizer", "textgen")
_POLL_S = 0.5


@dataclass(frozen=True)
class Update:
    """What was done. version: now serves; previous: served before; drained: its last request had ended in time."""

    version: int
    previous: int
    drained: bool


@dataclass(frozen=True)
class Patience:
    """Seconds: for a version to load and answer, and for the requests of the one before to end."""

    load_s: float
    drain_s: float


class VersionFolders:
    """The version folders of a model repository."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository

    @property
    def latest(self) -> int:
        """The highest version of textgen. Raises ServeError where there is none."""
        folder = self._repository / "textgen"
        numbers = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        if not numbers:
            raise ServeError(f"{folder} has no version")
        return max(numbers)

    def options_of(self, version: int) -> dict[str, str]:
        """What the version has of its own."""
        path = self._repository / "textgen" / str(version) / "options.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def add(self, code_of: Path, own_options: Mapping[str, str]) -> int:
        """Make the next version, with the code of the latest version in the repository `code_of`."""
        version, source = self.latest + 1, VersionFolders(code_of).latest
        try:
            for model in MODELS:
                staging = self._repository / model / f".{version}"
                shutil.rmtree(staging, ignore_errors=True)
                ignore = shutil.ignore_patterns("__pycache__", "options.json")
                shutil.copytree(code_of / model / str(source), staging, ignore=ignore)
                (staging / "options.json").write_text(json.dumps(dict(own_options), indent=2, sort_keys=True) + "\n")
                staging.rename(self._repository / model / str(version))
        except OSError as error:
            self.remove(version)
            raise ServeError(f"cannot make version {version} in {self._repository}: {error}") from error
        return version

    def remove(self, version: int) -> None:
        """Delete the version's folders; Triton notices at the next load."""
        for model in MODELS:
            for name in (str(version), f".{version}"):
                shutil.rmtree(self._repository / model / name, ignore_errors=True)


def check_fits(config: EngineConfig) -> checkpoint.Checkpoint:
    """The checkpoint of the new version. Raises ServeError unless it is one, and its weights and KV cache fit into what
    the running version leaves. (A GPU's memory is checked by the engine as it loads, with the same outcome: an error,
    and the running version goes on.)"""
    model = config.model
    found = checkpoint.inspect(model.model_id, trust_remote_code=model.trust_remote_code)
    if not visible_gpus():
        available = host_memory.available_bytes()
        weights = found.bytes_in_memory("float32" if model.dtype == "auto" else model.dtype)
        cache = _cache_bytes(found.folder, config)
        if weights + cache > available:
            raise ServeError(
                f"not enough memory for two versions at once: the new one needs {weights / 2**30:.1f} GiB for its "
                f"weights and {cache / 2**30:.1f} GiB for its KV cache, {available / 2**30:.1f} GiB are available "
                f"beside the running one; give it a smaller MAX_BATCH_TOTAL_TOKENS, or replace the whole server instead"
            )
    return found


def checked_config(environment: Mapping[str, str]) -> EngineConfig:
    """What the new version will make of its options. Raises ServeError."""
    return options.check(environment, visible_gpus())


def load_beside(
    control: ModelControl,
    folders: VersionFolders,
    version: int,
    *,
    same_tokenizer: bool,
    patience: Patience,
    say: Callable[[str], None],
) -> Update:
    """Load `version`, prove that it answers, and wait for the old one's last request.

    Until it answers nothing has changed for clients. Where it cannot be loaded it is removed, and ServeError says why.
    """
    serving = [entry for entry in control.index() if entry.state == "READY"]
    previous = max(int(entry.version) for entry in serving if entry.name == "textgen")
    # The ensemble's two steps change over one after the other: between them, ids of one tokenizer would meet a model
    # that knows the other.
    holds_ensemble = not same_tokenizer and any(entry.name == "ensemble" for entry in serving)
    try:
        if holds_ensemble:
            say("the tokenizers differ: `ensemble` takes no requests until the new version serves")
            control.unload("ensemble")
        say(f"loading tokenizer version {version}")
        control.load("tokenizer", patience.load_s)
        say(f"loading textgen version {version}; version {previous} serves meanwhile")
        control.load("textgen", patience.load_s)
        control.generate_one_token("textgen", str(version), patience.load_s)
    except ControlError as error:
        folders.remove(version)
        _forget(control, version, patience.load_s)
        raise ServeError(f"version {version} could not be loaded, version {previous} goes on: {error}") from error
    finally:
        if holds_ensemble:
            control.load("ensemble", patience.load_s)
    say(f"version {version} serves new requests; waiting for the last one of version {previous}")
    return Update(version, previous, _wait_until_gone(control, previous, patience.drain_s))


def roll_back(
    control: ModelControl, folders: VersionFolders, *, patience: Patience, say: Callable[[str], None]
) -> Update:
    """Remove the latest version and load the one before it, beside the one that serves."""
    latest = folders.latest
    if latest == 1:
        raise ServeError("there is no version before the first")
    folders.remove(latest)
    previous = folders.latest
    say(f"loading version {previous} again; version {latest} serves meanwhile")
    try:
        control.load("textgen", patience.load_s)
        control.generate_one_token("textgen", str(previous), patience.load_s)
    except ControlError as error:
        raise ServeError(f"version {previous} could not be loaded: {error}") from error
    drained = _wait_until_gone(control, latest, patience.drain_s)
    if drained:
        control.load("tokenizer", patience.load_s)  # last: requests of the version that went still needed its tokenizer
    return Update(previous, latest, drained)


def _forget(control: ModelControl, version: int, load_s: float) -> None:
    """After the folders of a version that could not be loaded are gone: let Triton forget it."""
    for model in MODELS:
        try:
            control.load(model, load_s)
        except ControlError as error:
            raise ServeError(f"version {version} of {model} is not wholly forgotten: {error}") from error


def _wait_until_gone(control: ModelControl, version: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while True:
        states = {entry.state for entry in control.index() if entry.name == "textgen" and entry.version == str(version)}
        if not states & {"READY", "UNLOADING"}:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)


def _cache_bytes(folder: Path, config: EngineConfig) -> int:
    """What the KV cache takes: as large as the options make it, or (sized from free memory) its least useful size."""
    path = folder / "config.json"
    if not path.is_file():
        return 0
    described = json.loads(path.read_text())
    heads, hidden = described.get("num_attention_heads") or 0, described.get("hidden_size") or 0
    if not heads:
        return 0
    head_dim = described.get("head_dim") or hidden // heads
    layers = described.get("num_hidden_layers") or 0
    bytes_per_token = 2 * layers * (described.get("num_key_value_heads") or heads) * head_dim * 4
    if config.cache.num_blocks is not None:
        return int(config.cache.num_blocks * config.cache.block_size * bytes_per_token)
    longest = config.limits.max_total_tokens or described.get("max_position_embeddings") or 0
    return int(min(longest * bytes_per_token, config.cache.max_cache_bytes))
