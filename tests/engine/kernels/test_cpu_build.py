"""How the compiled CPU kernels come to be: once, however many processes start at the same time."""

from __future__ import annotations

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from textgen_engine.kernels import cpu_build


def test_processes_that_start_together_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks on a busy machine would each take twice as long."""
    compiled: list[Path] = []

    def compile_slowly(_: str, target: Path) -> Path:
        compiled.append(target)
        time.sleep(0.2)
        target.touch()
        return target

    monkeypatch.setattr(cpu_build, "_SOURCE", Path(shutil.copy(cpu_build._SOURCE, tmp_path)))
    monkeypatch.setattr(cpu_build, "_compile", compile_slowly)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: cpu_build.build(), range(4)))
    assert compiled == found[:1]
    assert set(found) == set(compiled)


def test_every_file_that_is_compiled_is_in_the_name() -> None:
    """Or a change in one would go unnoticed."""
    sources = "".join(path.read_text() for path in (cpu_build._SOURCE, *cpu_build._INCLUDED))
    included = set(re.findall(r'^#include "(.*)"', sources, re.MULTILINE))
    assert included == {path.name for path in cpu_build._INCLUDED}
