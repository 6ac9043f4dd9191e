"""Adapters as plain records: where one comes from, how a sequence and a step name it, what a client may ask about them.

Knows no tensors and reads no files, so that options, requests and messages between processes can carry these records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

MAX_NAME_CHARS = 128

# TGI's syntax of one entry of LORA_ADAPTERS: name, name=path, name@revision, name=path@revision.
_ENTRY = re.compile(r"([^=@]+)(?:=([^=@]+))?(?:@([^=@]+))?")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One adapter to load.

    path: its folder; None: the name is one, or a repository on the Hugging Face hub (of that revision).
    is_required: the engine does not start without it. One loaded at run time is not: when the engine is restarted and
    it can no longer be read, that is logged and the engine starts.
    """

    name: str
    path: str | None = None
    revision: str | None = None
    is_required: bool = True


@dataclass(frozen=True, slots=True)
class AdapterHandle:
    """A loaded adapter, as a running sequence names it.

    slot: its place in the layers' stacks. generation: never used twice in an engine's life, so that an adapter that
    takes the name or the slot of an unloaded one shares nothing with it.
    """

    name: str
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class AdapterCommand:
    """What a request asks about adapters instead of generating. path: for `load`; None: the name, in the folder."""

    action: Literal["list", "load", "unload"]
    name: str | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """The rows start:stop of a step belong to the adapter in this slot."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """Which rows of one step belong to which adapter; rows in no run have none.

    tokens: of the flattened tokens, num_tokens rows. logits: of the rows whose logits are wanted, num_logits rows.
    """

    tokens: tuple[AdapterRun, ...]
    num_tokens: int
    logits: tuple[AdapterRun, ...]
    num_logits: int


def find_runs(handles: Iterable[AdapterHandle | None], lengths: Iterable[int]) -> tuple[AdapterRun, ...]:
    """The runs of rows that lie behind one another: lengths[i] rows of handles[i]."""
    runs: list[AdapterRun] = []
    start = 0
    for handle, length in zip(handles, lengths, strict=True):
        if handle is not None and length:
            if runs and runs[-1].slot == handle.slot and runs[-1].stop == start:
                runs[-1] = AdapterRun(handle.slot, runs[-1].start, start + length)
            else:
                runs.append(AdapterRun(handle.slot, start, start + length))
        start += length
    return tuple(runs)


def parse_adapters(text: str) -> tuple[AdapterSpec, ...]:
    """The adapters of LORA_ADAPTERS, separated by commas. Raises ValueError that says what is wrong."""
    specs: list[AdapterSpec] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"{entry!r} is not name, name=path or name@revision")
        name, path, revision = (part and part.strip() for part in match.groups())
        problem = problem_of_name(name)
        if problem:
            raise ValueError(f"{entry!r}: {problem}")
        if name in (spec.name for spec in specs):
            raise ValueError(f"the name {name!r} comes twice")
        specs.append(AdapterSpec(name, path, revision))
    return tuple(specs)


def problem_of_name(name: str) -> str | None:
    """Why this cannot be an adapter's name; None when it can."""
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable() or name != name.strip():
        return f"a name has 1 to {MAX_NAME_CHARS} printable characters"
    return None
