"""A model by its name on the hub: found in the cache that HF_HOME names, at any revision, and never fetched offline.

The hub's library reads its environment when it is imported, so this is asked in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..tiny import save_checkpoint

ROOT = Path(__file__).parents[3]
_ASK = """
import json, sys
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import ModelConfig
from textgen_engine.errors import ModelLoadError
from textgen_engine.models.checkpoint import find_checkpoint
from textgen_engine.models.loader import load_model
from textgen_serve.checkpoint import inspect
from textgen_serve.errors import ServeError
from textgen_tokenizer.config import TokenizerConfig
from textgen_tokenizer.loading import load

answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        places = {str(find_checkpoint(name, revision=revision).folder), str(inspect(name, revision=revision).folder)}
        (place,) = places
        vocab_size = load(TokenizerConfig(name, revision=revision)).vocab_size
        loaded = load_model(ModelConfig(name, revision=revision, num_threads=1), SdpaBackend())
        answers.append([place, vocab_size == loaded.vocab_size])
    except ModelLoadError as error:
        try:
            inspect(name, revision=revision)
        except ServeError as other:
            answers.append([str(error), str(other)])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two commits of one model: `main` is the first, the tag v2 the second."""
    folder = tmp_path_factory.mktemp("home")
    model = folder / "hub" / "models--tests--tiny"
    plain = save_checkpoint(folder / "plain", num_hidden_layers=1)
    for commit, reference in (("a" * 40, "main"), ("b" * 40, "v2")):
        shutil.copytree(plain, model / "snapshots" / commit)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / reference).write_text(commit)
    return folder


def ask(home: Path, questions: list[tuple[str, str | None]]) -> list[list[str]]:
    paths = [ROOT / "model_repository/textgen/1", ROOT / "model_repository/tokenizer/1", ROOT / "scripts"]
    unwanted = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", _ASK, json.dumps(questions)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_a_name_is_found_in_the_cache_or_refused_in_one_line(home: Path) -> None:
    """By launcher, tokenizer and engine alike."""
    snapshots = home / "hub" / "models--tests--tiny" / "snapshots"
    first, second = str(snapshots / ("a" * 40)), str(snapshots / ("b" * 40))
    known = [("tests/tiny", None), ("tests/tiny", "v2"), ("tests/tiny", "b" * 40)]
    answers = ask(home, [*known, ("tests/none", None), ("tests/tiny", "v3"), ("no name", None)])
    assert answers[:3] == [[first, True], [second, True], [second, True]]
    refused = answers[3:]
    for errors in refused:
        assert all(len(error.splitlines()) == 1 for error in errors)
    assert f"nor a model of this name in the local cache {home}/hub, and the hub is not asked" in refused[0][0]
    assert "nor a model of this name at REVISION=v3 in the local cache" in refused[1][0]
    assert refused[2][0].startswith("model folder no name does not exist")
    assert all("there is no folder" in other for _, other in refused)
    assert "REVISION=v3" in refused[1][1]
