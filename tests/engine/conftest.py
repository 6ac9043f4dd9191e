"""Fixtures of the engine's tests: tiny checkpoints, made once per session, and engines on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from textgen_engine.kernels.cpu import CpuKernels, load_kernels

from .tiny import Harness, make_config, save_checkpoint


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and neighbours on the machine lose by them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels() -> CpuKernels:
    """The compiled kernels, on two threads."""
    kernels = load_kernels(num_threads=2)
    if kernels is None:
        pytest.skip("no C++ compiler")
    return kernels


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random checkpoint of a family (see tiny.FAMILIES); made when first asked for."""
    made: dict[str, Path] = {}

    def of_family(family: str) -> Path:
        if family not in made:
            made[family] = save_checkpoint(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of_family


@pytest.fixture(scope="session")
def llama(checkpoint: Callable[[str], Path]) -> Path:
    """Three layers, four heads on two key-value heads."""
    return checkpoint("llama")


@pytest.fixture
def new_engine(llama: Path) -> Iterator[Callable[..., Harness]]:
    """Makes fresh engines; options are those of tiny.make_config."""
    made: list[Harness] = []

    def make(model: Path | None = None, **options: Any) -> Harness:
        made.append(Harness(make_config(model or llama, **options)))
        return made[-1]

    yield make
    for harness in made:
        harness.close()
