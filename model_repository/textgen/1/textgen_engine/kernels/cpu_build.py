"""Compiles cpu_kernels.cpp for the machine at hand, once."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_INCLUDED = tuple(sorted(_SOURCE.parent.glob("*_kernels.h")))
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno")
_COMPILE_TIMEOUT_S = 120


def build() -> Path:
    """Compile unless it was done before; returns the library. Raises OSError or SubprocessError.

    The file's name holds a digest of source, flags and the processor's features: a library is never loaded by a
    machine that may lack an instruction in it.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    key = "\n".join(
        (
            _SOURCE.read_text(),
            *(path.read_text() for path in _INCLUDED),
            *_FLAGS,
            platform.machine(),
            _processor_features(),
        )
    )
    name = f"cpu_kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = _SOURCE.parent / "build"
    if (folder / name).is_file():
        return folder / name
    if compiler is None:
        raise FileNotFoundError("neither g++ nor clang++ is installed")
    try:
        folder.mkdir(exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            # Of processes that start together (ranks do), one compiles and the others wait for it. The system frees the
            # lock of one that is killed.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / name).is_file():
                return folder / name
            logger.info("compiling the CPU kernels, which this processor has not run before")
            return _compile(compiler, folder / name)
    except OSError:  # a read-only model repository: for this process alone
        with tempfile.TemporaryDirectory() as temporary:
            library = _compile(compiler, Path(temporary) / name)
            ctypes.CDLL(str(library))  # stays mapped when its file is gone
            return library


def _compile(compiler: str, target: Path) -> Path:
    """Into a file of its own first: the target is whole as soon as it is there."""
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(unfinished)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_TIMEOUT_S)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _processor_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))


if __name__ == "__main__":
    print(build())
