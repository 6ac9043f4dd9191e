"""host_memory.py: what the C library does with what is freed, in a process of its own, whose library it concerns."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

import textgen_engine

_PATH = Path(textgen_engine.__file__).resolve().parents[1]
_SCRIPT = """
import resource
from pathlib import Path
from textgen_engine.host_memory import keep_freed, return_freed
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(50 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) // 256
print(faults())
keep_freed()
faults()
print(faults(), resident_mib())
return_freed()
print(resident_mib())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env={"PYTHONPATH": str(_PATH)}, capture_output=True, text=True, check=True
    )
    by_itself, kept, resident, resident_in_the_end = (int(word) for word in done.stdout.split())
    assert kept < 100
    assert by_itself > 10_000
    assert resident - resident_in_the_end >= 45
