"""The processes below a server, by role, found from their command lines.

Roles: "tritonserver", "engine" (the process that runs the model), and for each model the name of its folder in the
model repository ("textgen", "tokenizer": the Python backend's stubs).
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ENGINE_MODULE = "textgen_engine.process"
_STUB = "triton_python_backend_stub"


def pids_by_role(server_pid: int) -> dict[str, list[int]]:
    """Live process ids below and including the tritonserver `server_pid`; empty when it is gone."""
    roles: dict[str, list[int]] = {}
    try:
        server = psutil.Process(server_pid)
        if server.status() == psutil.STATUS_ZOMBIE:
            return {}
        below = server.children(recursive=True)
    except psutil.NoSuchProcess:
        return {}
    roles["tritonserver"] = [server_pid]
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            role = _role(process.cmdline())
            if role is not None:
                roles.setdefault(role, []).append(process.pid)
    return roles


def _role(command: list[str]) -> str | None:
    if any(_ENGINE_MODULE in word for word in command):
        return "engine"
    if command and Path(command[0]).name == _STUB:
        # <stub> <repository>/<model>/<version>/model.py <region> ...
        return Path(command[1]).parent.parent.name
    return None


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that none is lost sight of."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """In a child, before exec: be sent SIGTERM when the launcher dies, even if that was killed outright."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_all_below(grace_s: float) -> None:
    """End every descendant of this process: ask, wait up to `grace_s` seconds, kill; all are reaped on return."""
    below = psutil.Process().children(recursive=True)
    if grace_s > 0:
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, below = psutil.wait_procs(below, timeout=grace_s)
    # Killing may orphan processes that were started meanwhile, so look again until nobody is left.
    while below:
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=5)
        below = psutil.Process().children(recursive=True)


def _prctl(option: int, value: int) -> None:
    # Best effort: a kernel without it only loses the second line of defence.
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
