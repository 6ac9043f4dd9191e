"""triton_parent.py: a process that outlives the one that started it ends by itself, and ends a server left alone."""

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
import subprocess, sys, time
stub = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE)
print(stub.stdout.readline().decode(), flush=True)
time.sleep(600)
"""
# Starts the server, with a second to end once it is gone itself.
LAUNCHER = """
import os, subprocess, sys, time
own = {"TRITON_TEXTGEN_LAUNCHER": f"{os.getpid()} 1"}
server = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env=os.environ | own)
print(server.pid, flush=True)
time.sleep(600)
"""


def test_it_ends_with_its_server() -> None:
    command = [sys.executable, "-c", SERVER, STUB, str(Path(triton_parent.__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        stub = psutil.Process(int(server.stdout.readline()))
        time.sleep(0.2)
        assert stub.is_running(), "while there is a server, it stays"
        server.kill()
    wait_until_ended(stub)


def test_a_server_that_does_not_end_after_its_launcher_is_killed() -> None:
    folder = str(Path(triton_parent.__file__).parent)
    command = [sys.executable, "-c", LAUNCHER, SERVER, STUB, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        server = psutil.Process(int(launcher.stdout.readline()))
        stub = psutil.Process(int(launcher.stdout.readline()))
        time.sleep(0.5)
        assert server.is_running() and stub.is_running(), "while there is a launcher, they stay"
        launcher.kill()
    wait_until_ended(server)
    wait_until_ended(stub)


def wait_until_ended(process: psutil.Process) -> None:
    deadline_s = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
