"""triton_parent.py: a process that outlives the one that started it ends by itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import triton_parent

STUB = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import triton_parent
triton_parent._LOOK_S = 0.02
triton_parent.end_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)
"""
# Starts the stub, passes its process id on, and is gone.
SERVER = """
import subprocess, sys
stub = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE)
print(stub.stdout.readline().decode(), flush=True)
sys.stdin.readline()
"""


def test_it_ends_with_its_server() -> None:
    command = [sys.executable, "-c", SERVER, STUB, str(Path(triton_parent.__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        stub = psutil.Process(int(server.stdout.readline()))
        time.sleep(0.2)
        assert stub.is_running(), "while there is a server, it stays"
        server.kill()
    deadline_s = time.monotonic() + 30
    while stub.is_running() and stub.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
