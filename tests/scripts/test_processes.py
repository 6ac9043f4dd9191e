"""Ending everything below the launcher, also what a dying parent hands over in the middle of a look."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

# Below the launcher a parent that SIGTERM ends, and its child, which does not care for SIGTERM.
FAMILY = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
command = [sys.executable, "-c", child]
process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(600)
"""

# The parent dies between two looks: it is listed, its child already stands below the launcher.
LAUNCHER = """
import subprocess, sys
import psutil
from textgen_serve import processes

processes.adopt_orphans()
parent = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child = psutil.Process(int(parent.stdout.readline()))
print(parent.pid, child.pid, flush=True)
real, looks = psutil.Process.children, 0

def children(self, recursive=False):
    global looks
    looks += 1
    found = real(self, recursive)
    if looks == 1:
        psutil.Process(parent.pid).kill()
        while child.ppid() == parent.pid:
            pass
        found = [process for process in found if process.pid != child.pid]
    return found

psutil.Process.children = children
processes.end_all_below(float(sys.argv[2]))
"""


@pytest.mark.parametrize("grace_s", [0.0, 1.0])
def test_a_child_handed_over_in_the_middle_of_a_look(grace_s: float) -> None:
    command = [sys.executable, "-c", LAUNCHER, FAMILY, str(grace_s)]
    done = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    left = [pid for pid in map(int, done.stdout.split()) if psutil.pid_exists(pid)]
    for pid in left:
        psutil.Process(pid).kill()
    assert not left
