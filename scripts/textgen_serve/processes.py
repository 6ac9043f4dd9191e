"""The processes below a server, by role, found from their command lines.

Roles: "tritonserver", "engine" (the process that runs the model), "rank" (another one that holds a part of it), and for
each model the name of its folder in the model repository ("textgen", "tokenizer": the Python backend's stubs).
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ENGINE_MODULE = "textgen_engine.process"
_RANK_MODULE = "textgen_engine.parallel.worker"
_STUB = "triton_python_backend_stub"
STUB_ROLES = ("textgen", "tokenizer")
# Finding processes walks over all of the machine's, looking at a known one does not.
_LOOKS_PER_SEARCH = 5
# While processes end: how soon one that a dying parent handed over is asked to end as well.
_S_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Stub:
    """Whose process a stub is."""

    model: str
    version: str


def pids_by_role(server_pid: int) -> dict[str, list[int]]:
    """Live process ids below and including the tritonserver `server_pid`; empty when it is gone."""
    commands = _commands_below(server_pid)
    if commands is None:
        return {}
    roles: dict[str, list[int]] = {"tritonserver": [server_pid]}
    for pid, command in commands.items():
        role = _role(command)
        if role is not None:
            roles.setdefault(role, []).append(pid)
    return roles


def _commands_below(server_pid: int) -> dict[int, list[str]] | None:
    """Command lines of the living processes below a tritonserver; None when it is gone."""
    try:
        server = psutil.Process(server_pid)
        if server.status() == psutil.STATUS_ZOMBIE:
            return None
        below = server.children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    commands = {}
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            commands[process.pid] = process.cmdline()
    return commands


def _role(command: list[str]) -> str | None:
    if any(_ENGINE_MODULE in word for word in command):
        return "engine"
    if any(_RANK_MODULE in word for word in command):
        return "rank"
    stub = _stub(command)
    return None if stub is None else stub.model


def _stub(command: list[str]) -> Stub | None:
    if not command or Path(command[0]).name != _STUB:
        return None
    # <stub> <repository>/<model>/<version>/model.py <region> ...
    folder = Path(command[1]).parent
    return Stub(folder.parent.name, folder.name)


class StubWatch:
    """Notices stubs that died. Triton does not: it goes on saying ready, and leaves them as zombies.

    A stub that was unloaded is reaped at once, so one that is a zombie at two looks in a row has died. It may have died
    while it loaded, which Triton does notice: who asks must ask Triton whether it takes the model for ready.
    """

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._stubs: dict[int, Stub] = {}  # living ones
        self._doubtful: set[int] = set()
        self._looks = 0
        self._search()  # now: what is dead at the first look could no longer be told from anything else

    def look(self) -> list[Stub]:
        """The stubs that have died since the last look. To be called about once a second."""
        self._looks += 1
        if self._looks % _LOOKS_PER_SEARCH == 0:
            self._search()
        died = []
        doubtful, self._doubtful = self._doubtful, set()
        for pid, stub in list(self._stubs.items()):
            try:
                is_zombie = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                del self._stubs[pid]
                continue
            if is_zombie and pid in doubtful:
                del self._stubs[pid]
                died.append(stub)
            elif is_zombie:
                self._doubtful.add(pid)
        return died

    def _search(self) -> None:
        for pid, command in (_commands_below(self._server_pid) or {}).items():
            stub = _stub(command)
            if stub is not None and stub.model in STUB_ROLES:
                self._stubs[pid] = stub


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that none is lost sight of."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """In a child, before exec: be sent SIGTERM when the launcher dies, even if that was killed outright."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_all_below(grace_s: float, spare: Collection[int] = ()) -> None:
    """End every descendant of this process: ask, wait up to `grace_s` seconds, kill; all are reaped on return. The
    children in `spare` live on, with all that is below them.

    Whoever dies hands its children over to this process (`adopt_orphans`), and in a look made at that moment they may
    stand nowhere. So it ends only with a look that finds nobody: such a look is right, since what dies below is listed
    as this process's child, or as somebody's below one, until this process has reaped it.
    """
    deadline = time.monotonic() + grace_s
    asked: set[int] = set()
    while below := _descendants(spare):
        left_s = deadline - time.monotonic()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                if left_s <= 0:
                    process.kill()
                elif process.pid not in asked:
                    process.terminate()
        asked.update(process.pid for process in below)
        psutil.wait_procs(below, timeout=5 if left_s <= 0 else min(left_s, _S_BETWEEN_LOOKS))


def _descendants(spare: Collection[int]) -> list[psutil.Process]:
    found = []
    waiting = [child for child in psutil.Process().children() if child.pid not in spare]
    while waiting:
        process = waiting.pop()
        found.append(process)  # before what is below it: who is not listed cannot be looked below again
        with contextlib.suppress(psutil.NoSuchProcess):
            waiting += process.children()
    return found


def _prctl(option: int, value: int) -> None:
    # Best effort: a kernel without it only loses the second line of defence.
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
