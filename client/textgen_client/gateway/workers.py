"""Several processes of the gateway on one port, which uvicorn starts, replaces when they die, and drains."""

from __future__ import annotations

import sys

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

# A worker that has not answered its parent for so long is replaced. uvicorn's own 5 s are less than a start may take on
# a machine that does much else, and a worker that is killed while it starts never starts.
SILENCE_S = 20


class _Workers(Multiprocess):
    def terminate_all(self) -> None:
        """Drain. The parent holds the port as its workers do; were it to keep it, new clients would be taken in by a
        port behind which nobody answers, instead of being refused."""
        for listening in self.sockets:
            listening.close()
        super().terminate_all()


def run(config: uvicorn.Config) -> None:
    """Serve with `config.workers` processes until SIGTERM or SIGINT has drained them. Exits where they cannot start."""
    workers = _Workers(config, [config.bind_socket()])
    workers.run()
    if any(process.exitcode == STARTUP_FAILURE for process in workers.processes):
        sys.exit(STARTUP_FAILURE)
