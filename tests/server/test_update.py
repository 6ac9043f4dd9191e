"""scripts/update_model.py on a server with live streams: they go on with the old model, what is new gets the new."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.tiny import save_checkpoint
from ..running_server import REPOSITORY_ROOT
from .faults import MAX_TOTAL_TOKENS, OPTIONS

if TYPE_CHECKING:
    from ..running_server import RunningServer, StartServer
    from .conftest import Connect

NUM_STREAMS = 4
NUM_TOKENS = 600
TEXT = "the quick brown fox"
SHORT: dict[str, Any] = {
    "text_input": TEXT,
    "sampling_parameters": {"max_new_tokens": 8, "ignore_eos_token": True},
}
LONG: dict[str, Any] = {
    "text_input": TEXT,
    "stream": True,
    "return_finish_reason": True,
    "sampling_parameters": {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True},
}

# Streams of the old version must still run when the new one serves, however long that takes, and then come to an end.
# So a step takes a third of a second for as long as the file is there.
_PACED_MODEL = """
import os
import time

from transformers import LlamaForCausalLM


class PacedForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids=None, **more):
        if os.path.exists({pace!r}):
            time.sleep(0.3)
        return super().forward(input_ids=input_ids, **more)
"""


def _save_paced_checkpoint(folder: Path, pace: Path) -> Path:
    """A tiny model that is slow while the file `pace` exists."""
    save_checkpoint(folder, max_position_embeddings=MAX_TOTAL_TOKENS)
    (folder / "modeling_paced.py").write_text(_PACED_MODEL.format(pace=str(pace)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_paced.PacedForCausalLM"}
    config["architectures"] = ["PacedForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _update(server: RunningServer, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY_ROOT / "scripts" / "update_model.py"
    command = [sys.executable, str(script), "--ready-file", str(server.ready_file), "--model-repository"]
    return subprocess.run([*command, str(repository), *arguments], capture_output=True, text=True, timeout=240)


def test_versions_change_without_a_gap(start_server: StartServer, connect: Connect, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY_ROOT / "model_repository", repository, ignore=shutil.ignore_patterns("__pycache__"))
    pace = tmp_path / "pace"
    paced = _save_paced_checkpoint(tmp_path / "paced", pace)
    other = save_checkpoint(tmp_path / "other", seed=1, max_position_embeddings=MAX_TOTAL_TOKENS)
    options = OPTIONS | {"MODEL_ID": str(paced), "TRUST_REMOTE_CODE": "true"}
    server = start_server("--model-repository", str(repository), **options)
    wire = connect(server)
    old_text = wire.ask(**SHORT).text
    whole_text = wire.ask(**LONG).text
    assert whole_text.startswith(old_text.rstrip("\ufffd"))  # half a character may end the short one
    pace.touch()
    streams = [wire.open(**LONG) for _ in range(NUM_STREAMS)]
    begun = ["".join(next(stream).text for _ in range(3)) for stream in streams]

    # Refused before anything is loaded.
    huge = shutil.copytree(other, tmp_path / "huge")
    _claim_weights(huge / "model.safetensors", num_bytes=4 << 40)
    refused = _update(server, repository, "--model-id", str(huge))
    assert refused.returncode == 1
    assert "not enough memory for two versions at once" in refused.stderr
    # Refused by the engine as it loads; what runs goes on, and nothing is left behind.
    broken = shutil.copytree(other, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    failed = _update(server, repository, "--model-id", str(broken))
    assert failed.returncode == 1
    assert "version 2 could not be loaded, version 1 goes on" in failed.stderr
    assert not (repository / "textgen" / "2").exists()
    assert wire.ask(**SHORT).text == old_text

    done = _update(server, repository, "--model-id", str(other), "--drain-timeout", "0")
    assert done.returncode == 0, done.stderr
    assert "version 2 serves; version 1 still has requests" in done.stdout
    new_text = wire.ask(**SHORT).text
    assert new_text != old_text
    assert wire.ask(model="ensemble", **SHORT).text == new_text
    _wait_until(lambda: server.metric("tgi_engine_ready", version="2") == 1, "the new version is not ready")
    assert server.metric("tgi_batch_current_size", version="1") == NUM_STREAMS

    # The old streams come to their own end with the old model's text, while others get the new one's.
    endings = [wire.rest_soon(stream) for stream in streams]
    pace.unlink()
    while not all(ending.done() for ending in endings):
        assert wire.ask(**SHORT).text == new_text
    for beginning, ending in zip(begun, endings, strict=True):
        outcome = ending.result()
        assert (outcome.errors, outcome.broken) == ([], None)
        assert beginning + outcome.text == whole_text
        assert outcome.responses[-1].final and outcome.responses[-1].tensors["finish_reason"] == ["length"]
        assert [response.final for response in outcome.responses].count(True) == 1
    _wait_until(lambda: not server.metric("tgi_engine_ready", version="1"), "the old version is not unloaded")

    back = _update(server, repository, "--rollback")
    assert back.returncode == 0, back.stderr
    assert "version 1 serves" in back.stdout
    assert wire.ask(**SHORT).text == old_text
    assert not (repository / "textgen" / "2").exists()


def _wait_until(condition: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, problem
        time.sleep(0.1)


def _claim_weights(path: Path, num_bytes: int) -> None:
    """A well-formed file whose size is only claimed."""
    tensor = {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}
    header = json.dumps({"weight": tensor}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + num_bytes)
