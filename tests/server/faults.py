"""What the tests of faults share: tiny models whose streams last, eight live streams, and a record of measurements.

`pytest --record-faults FILE` keeps the measurements; scripts/fault_table.py makes the table of docs/operations.md of
them.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..engine.tiny import save_checkpoint

if TYPE_CHECKING:
    from ..running_server import RunningServer
    from .wire import Call, Outcome, Wire

NUM_STREAMS = 8
MAX_TOTAL_TOKENS = 30_000
# A tiny model makes hundreds of tokens a second; eight streams of the largest length last for minutes.
OPTIONS = {
    "MAX_TOTAL_TOKENS": str(MAX_TOTAL_TOKENS),
    "MAX_INPUT_TOKENS": "4096",
    "MAX_BATCH_TOTAL_TOKENS": str((NUM_STREAMS + 2) * MAX_TOTAL_TOKENS),
}

# Token ids that a faulty model reacts to. Given as `input_ids`: no tokenizer is asked.
RAISES_MEMORY_ERROR, ALLOCATES_TOO_MUCH, CRASHES, LOOPS = 11, 12, 13, 14

_FAULTY_MODEL = f"""
import os
import time

import torch
from transformers import LlamaForCausalLM


class FaultyForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids=None, **more):
        ids = set(input_ids.reshape(-1).tolist()) if "attention_metadata" in more else set()
        if {RAISES_MEMORY_ERROR} in ids:
            raise MemoryError
        if {ALLOCATES_TOO_MUCH} in ids:
            torch.empty(1 << 50)
        if {CRASHES} in ids:
            os.kill(os.getpid(), 11)
        while {LOOPS} in ids:
            time.sleep(1)
        return super().forward(input_ids=input_ids, **more)
"""


def save_lasting_checkpoint(folder: Path) -> Path:
    """A tiny model whose sequences may be long."""
    return save_checkpoint(folder, max_position_embeddings=MAX_TOTAL_TOKENS)


def save_faulty_checkpoint(folder: Path) -> Path:
    """The same, with modelling code of its own (TRUST_REMOTE_CODE) that fails at certain token ids.

    Its output layer is biased so that it never generates one of them.
    """
    save_lasting_checkpoint(folder)
    (folder / "modeling_faulty.py").write_text(_FAULTY_MODEL)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_faulty.FaultyForCausalLM"}
    config["architectures"] = ["FaultyForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_prompts = itertools.count()

# Parameters that keep a text from its own end, and from the ids a faulty model reacts to.
LASTING: dict[str, Any] = {
    "ignore_eos_token": True,
    "logit_bias": {str(token): -100 for token in (RAISES_MEMORY_ERROR, ALLOCATES_TOO_MUCH, CRASHES, LOOPS)},
}


@dataclass
class LiveStreams:
    """Streams that have begun, each with an id of its own; what they bring after that is read in the background."""

    endings: list[Future[Outcome]]
    calls: list[Call] = field(repr=False)

    def outcomes(self, within_s: float = 60.0) -> list[Outcome]:
        """How each ended."""
        return [ending.result(within_s) for ending in self.endings]

    def cancel(self) -> None:
        for call in self.calls:
            call.cancel()


def live_streams(wire: Wire, num: int = NUM_STREAMS, max_new_tokens: int = 20_000) -> LiveStreams:
    """So many streams, all past their first token. Their prompts are new: what was running when engines died is run
    one at a time when it comes again."""
    sampling = LASTING | {"max_new_tokens": max_new_tokens}
    prompts = [[20 + next(_prompts) // 400, 20 + next(_prompts) % 400, 61] for _ in range(num)]
    calls = [wire.open(input_ids=prompt, stream=True, sampling_parameters=sampling) for prompt in prompts]
    for call in calls:
        next(call)
    return LiveStreams([wire.rest_soon(call) for call in calls], calls)


def ask_briefly(wire: Wire, token: int = 40, **more: Any) -> Outcome:
    """A short request."""
    sampling = LASTING | {"max_new_tokens": 4}
    return wire.ask(input_ids=[token, 60, 61], sampling_parameters=sampling, **more)


def seconds_until_answered(wire: Wire, since_s: float, within_s: float = 60.0) -> float:
    """Seconds since `since_s` (time.monotonic()) until a new request is answered."""
    while True:
        outcome = ask_briefly(wire, within_s=within_s)
        if outcome.responses and not outcome.errors and outcome.broken is None:
            return outcome.ended_s - since_s
        assert time.monotonic() - since_s < within_s, outcome
        time.sleep(0.05)


def endings_of(outcomes: list[Outcome]) -> set[str]:
    """How streams ended, in words: their error's text, gRPC's status, or how they finished."""
    words = set()
    for outcome in outcomes:
        if outcome.errors:
            words.add(outcome.errors[0])
        elif outcome.broken is not None:
            words.add(f"gRPC status {outcome.broken.name}")
        else:
            words.add("complete")
    return words


def assert_one_final_flag_each(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        finals = [response.final for response in outcome.responses]
        assert finals == [False] * (len(finals) - 1) + [True]


class FaultRecord:
    """What was measured, by the name of the fault."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def note(
        self, fault: str, *, clients_see: str, told_after_s: float | None, recovered_after_s: float | None
    ) -> None:
        """clients_see: what became of the live streams. told_after_s: until the last of them knew. recovered_after_s:
        until a new request was answered. None where nothing was interrupted."""
        if self._path is None:
            return
        known = json.loads(self._path.read_text()) if self._path.is_file() else {}
        known[fault] = {
            "clients_see": clients_see,
            "told_after_s": told_after_s and round(told_after_s, 2),
            "recovered_after_s": recovered_after_s and round(recovered_after_s, 2),
        }
        self._path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def can_mount() -> bool:
    """Whether this user may have a file system of its own, in a namespace of its own."""
    return shutil.which("unshare") is not None and _mounts()


def _mounts() -> bool:
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs a mount namespace: not permitted here")


def in_namespace(server: RunningServer, path: str) -> Path:
    """A path as the server's processes see it."""
    return Path(f"/proc/{server.pid('tritonserver')}/root{path}")
