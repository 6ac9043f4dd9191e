"""Ctrl-C while the main thread is inside gRPC.

Python raises KeyboardInterrupt between any two instructions of the main thread, also just after gRPC's own code has
taken a lock and before the `with` statement that would release it has begun (seen in about 3 % of interrupts within
the first milliseconds of a call). The lock is then never released: the channel is dead, and the process cannot exit.
So around gRPC's code Ctrl-C is taken by a handler that cancels the call, and KeyboardInterrupt is raised afterwards.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class InterruptCancels:
    """Inside its `with`, Ctrl-C cancels a gRPC call; KeyboardInterrupt is raised where the `with` ends.

    Does nothing outside the main thread (which alone gets signals), and where the program has a SIGINT handler of its
    own, which stays in force.
    """

    def __init__(self, call: Any = None) -> None:
        self._call = call
        self._pressed = False
        self._active = False

    def cancels(self, call: Any) -> None:
        """Ctrl-C cancels this call; at once if it was pressed before the call existed."""
        self._call = call
        if self._pressed:
            call.cancel()

    def __enter__(self) -> InterruptCancels:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            self._active = True
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._pressed:
            raise KeyboardInterrupt from None

    def _press(self, _signum: int, _frame: FrameType | None) -> None:
        self._pressed = True
        if self._call is not None:
            self._call.cancel()
