"""Finds the files of a checkpoint: in a folder, in a GGUF file, or under its name in the local cache of the hub.

Says in one line what is wrong with them before anything is loaded. Knows nothing of architectures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from textgen_engine.errors import ModelLoadError
from textgen_engine.models.weights import check_shard

# What a load needs of a checkpoint on the hub: not the copies of its weights in other formats.
_WANTED = ("*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja", "tokenizer*")


@dataclass(frozen=True)
class Checkpoint:
    """Files to load. shards: the safetensors files, empty for the other two formats. gguf: the file's name within the
    folder. pickled: weights come from files that can run code while they are read."""

    folder: Path
    shards: tuple[Path, ...] = ()
    gguf: str | None = None
    pickled: bool = False


def find_checkpoint(model_id: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """The files of `model_id`, their headers and sizes checked. Raises ModelLoadError.

    model_id: a folder, a .gguf file, or the name of a model on the hub; a name is looked for in the local cache
    (HF_HOME), then fetched unless the hub's library is offline. revision: of a name, or of a folder that is laid out
    like the cache (`snapshots/`, `refs/`).
    """
    path = Path(model_id).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Checkpoint(path.parent, gguf=path.name)
    folder = _folder(path, model_id, revision)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not any(folder.glob("*.safetensors")):
        if len(ggufs) > 1:
            names = ", ".join(file.name for file in ggufs)
            raise ModelLoadError(f"{folder} has several GGUF files ({names}): let MODEL_ID name one of them")
        return Checkpoint(folder, gguf=ggufs[0].name)
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} is no checkpoint: it has no config.json")
    shards = _shards(folder)
    if not shards:
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        if pickles and trust_remote_code:
            return Checkpoint(folder, pickled=True)
        hint = (
            f"; {pickles[0]} is a pickle, which can run code while it is read: convert it to safetensors, or set "
            f"TRUST_REMOTE_CODE=true if you trust its author"
            if pickles
            else ""
        )
        raise ModelLoadError(f"{folder} is no checkpoint: it has no .safetensors file{hint}")
    for shard in shards:
        check_shard(shard)
    return Checkpoint(folder, shards)


def _folder(path: Path, model_id: str, revision: str | None) -> Path:
    if path.is_dir():
        if not (path / "snapshots").is_dir():
            if revision is not None and path.parent.name != "snapshots":
                raise ModelLoadError(f"REVISION={revision}: the folder {path} has no snapshots to choose from")
            return path
        return _snapshot(path, revision or "main")
    try:
        return Path(snapshot_download(model_id, revision=revision, local_files_only=True))
    except HFValidationError:  # no name that the hub would allow
        raise ModelLoadError(f"model folder {path} does not exist") from None
    except LocalEntryNotFoundError:
        pass
    missing = (
        f"there is no model folder {path}, nor a model of this name"
        f"{'' if revision is None else f' at REVISION={revision}'} in the local cache {constants.HF_HUB_CACHE}"
    )
    if constants.HF_HUB_OFFLINE:
        raise ModelLoadError(
            f"{missing}, and the hub is not asked (HF_HUB_OFFLINE): fetch it first, for example with `hf download`"
        )
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's library raises errors of its own, of requests, of the system
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise ModelLoadError(f"{missing}, and it cannot be fetched: {reason}") from error


def _snapshot(path: Path, revision: str) -> Path:
    """The folder of a revision (branch, tag or commit) in a folder that is laid out like the hub's cache."""
    reference = path / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = path / "snapshots" / commit
    if not folder.is_dir():
        known = sorted(file.name for file in (path / "snapshots").iterdir())
        raise ModelLoadError(f"REVISION={revision} is not in {path}; it holds {', '.join(known) or 'none'}")
    return folder


def _shards(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of the checkpoint: those the index names, else all of them."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return (single,) if single.is_file() else tuple(sorted(folder.glob("*.safetensors")))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shards = tuple(folder / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is no index of weights: {error!r}") from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelLoadError(f"{folder} lacks {len(missing)} of {len(shards)} weight files: {missing[0]}")
    return shards
