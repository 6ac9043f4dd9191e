"""Ends this process when the server that started it has ended, and the server when it cannot end by itself.

Triton's stub looks for its server itself, but not while it waits in the shared memory of a server that is gone: there
it waits for ever, and the engine with all its ranks goes on generating for nobody. And a server whose time to exit was
up waits as long for threads of requests that are still answered. A launcher ends both; this is for when the launcher
is gone as well, or, as far as the stub goes, there is none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

_LOOK_S = 1.0
# Set by the launcher: its process id, and how many seconds a server has to end once the launcher is gone.
_LAUNCHER = "TRITON_TEXTGEN_LAUNCHER"


def end_with_parent() -> None:
    """From now on, on a thread of its own."""
    arguments = (os.getppid(), os.environ.get(_LAUNCHER))
    threading.Thread(target=_watch, args=arguments, name="parent-watch", daemon=True).start()


def _watch(server: int, launcher: str | None) -> None:
    launcher_pid, limit_s = (int(word) for word in launcher.split()) if launcher else (-1, 0)
    is_launched, alone_s = False, 0.0
    while os.getppid() == server:
        if _parent_of(server) == launcher_pid:
            is_launched = True
        elif is_launched:
            alone_s += _LOOK_S
        if alone_s > limit_s:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
        time.sleep(_LOOK_S)
    os._exit(1)  # at once: what other threads wait for does not come


def _parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
