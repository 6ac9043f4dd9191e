"""Ends this process when the server that started it has ended.

Triton's stub looks for its server itself, but not while it waits in the shared memory of a server that was killed, or
that left when its time to exit was up: there it waits for ever, and the engine with all its ranks goes on generating
for nobody. A launcher ends such a stub; this is for when the launcher is gone as well, or there is none.
"""

from __future__ import annotations

import os
import threading
import time

_LOOK_S = 1.0


def end_with_parent() -> None:
    """From now on, on a thread of its own."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="parent-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)  # at once: what other threads wait for does not come
