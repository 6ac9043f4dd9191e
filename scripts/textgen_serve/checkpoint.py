"""Says, before a server is started, whether a folder is a checkpoint that can be served and fits into memory.

Reads headers and sizes only: a wrong folder is reported within a second instead of after a long load. Knows nothing
of architectures; those are the engine's to refuse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from textgen_serve.errors import ServeError

_INDEX = "model.safetensors.index.json"
# Any one of these sets makes a tokenizer.
_TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
_BYTES_PER_ELEMENT = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Checkpoint:
    """What the headers say. folder: or the GGUF file. num_bytes: weights as stored; num_elements: their number of
    values, 0 where only loading them tells."""

    folder: Path
    num_bytes: int
    num_elements: int

    def bytes_in_memory(self, dtype: str | None) -> int:
        """Size of the weights once loaded as `dtype` (None: as stored)."""
        known = dtype in _BYTES_PER_ELEMENT and self.num_elements > 0
        return self.num_elements * _BYTES_PER_ELEMENT[dtype] if known and dtype else self.num_bytes


def inspect(model_id: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Check the checkpoint `model_id` (as the engine's models/checkpoint.py reads it) and return its sizes.

    ServeError says in one line what is wrong with it.
    """
    folder = _locate(model_id, revision)
    if folder.suffix == ".gguf" and folder.is_file():
        return Checkpoint(folder, folder.stat().st_size, 0)
    if not folder.is_dir():
        raise ServeError(f"MODEL_ID: {model_id} is a file; name the folder that holds config.json, or a .gguf file")
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1 and not any(folder.glob("*.safetensors")):
        return Checkpoint(folder, ggufs[0].stat().st_size, 0)
    _check_config(folder)
    if not any(all((folder / name).exists() for name in names) for names in _TOKENIZERS):
        raise ServeError(f"MODEL_ID: {folder} has no tokenizer (tokenizer.json or tokenizer.model)")
    pickles = [] if any(folder.glob("*.safetensors")) else sorted(folder.glob("*.bin"))
    if pickles and trust_remote_code:
        return Checkpoint(folder, sum(path.stat().st_size for path in pickles), 0)
    num_bytes = num_elements = 0
    for shard in _shards(folder):
        num_bytes += shard.stat().st_size
        num_elements += _count_elements(shard)
    return Checkpoint(folder, num_bytes, num_elements)


def _locate(model_id: str, revision: str | None) -> Path:
    """The file or folder: as named, or a snapshot in a folder laid out like the hub's cache, or one in that cache."""
    path = Path(model_id).expanduser().absolute()
    if path.is_dir() and (path / "snapshots").is_dir():
        reference = path / "refs" / (revision or "main")
        snapshot = path / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision or "main")
        if not snapshot.is_dir():
            raise ServeError(f"REVISION: {path} has no revision {revision or 'main'}")
        return snapshot
    if path.exists():
        return path
    from huggingface_hub import snapshot_download  # costs a good part of a second
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        raise ServeError(
            f"MODEL_ID: there is no folder {model_id}, nor a model of this name"
            f"{'' if revision is None else f' at REVISION={revision}'} in the hub's local cache; download the model "
            f"first, for example with `hf download`"
        ) from None


def check_memory(checkpoint: Checkpoint, dtype: str | None, available_bytes: int) -> None:
    """Raise ServeError when the weights alone exceed the memory that is free. For models that run on the CPU."""
    needed = checkpoint.bytes_in_memory(dtype)
    if needed > available_bytes:
        raise ServeError(
            f"not enough memory: the weights of {checkpoint.folder} need {needed / 2**30:.1f} GiB, "
            f"{available_bytes / 2**30:.1f} GiB are available"
        )


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.exists():
        raise ServeError(f"MODEL_ID: {folder} is no checkpoint: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ServeError(f"MODEL_ID: {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ServeError(f"MODEL_ID: {path} is not a JSON object")


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint: those the index names, else all of them."""
    index = folder / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ServeError(f"MODEL_ID: {index} is no index of weights: {error!r}") from error
        shards = [folder / name for name in names]
        missing = [path.name for path in shards if not path.exists()]
        if missing:
            raise ServeError(f"MODEL_ID: {folder} lacks {len(missing)} of {len(shards)} weight files: {missing[0]}")
        return shards
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {others[0]} would have to be converted to safetensors" if others else ""
        raise ServeError(f"MODEL_ID: {folder} is no checkpoint: it has no *.safetensors weights{hint}")
    return shards


def _count_elements(shard: Path) -> int:
    """Values in one file. Opening it compares its size with its header, so a cut download is found here."""
    try:
        with safe_open(shard, framework="numpy") as tensors:
            return sum(_product(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ServeError(f"MODEL_ID: {shard} is damaged or incomplete ({error})") from error


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
