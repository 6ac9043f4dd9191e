"""Imports point one way, and heavy ones stay where they belong (the rooms of the package)."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import textgen_engine

PACKAGE = Path(textgen_engine.__file__).resolve().parent
ADAPTER = PACKAGE.parent

# A file imports only from layers above its own; the order inside a layer is free, cycles are refused below.
LAYERS = [
    {
        "errors",
        "config",
        "options",
        "configure",
        "logs",
        "metrics",
        "sampling.params",
        "grammar.base",
        "adapters.spec",
        "request",
        "sequence",
        "messages",
        "parameters",
        "host_memory",
        "late_compiler",
        "mapped_memory",
        "suspects",
        "host_devices",
        "transfer",
    },
    {
        "block_manager",
        "step_pace",
        "kv_cache",
        "attention.base",
        "detokenizer",
        "grammar",
        "sampling",
        "kernels",
        "adapters",
        "parallel.split",
        "parallel.small_sums",
        "parallel.group",
        "parallel.linear",
        "speculation",
    },
    {
        "scheduler",
        "attention",
        "models",
        "batch",
        "cuda_graphs",
        "launched",
        "model_runner",
        "constraints",
        "warmup",
        "parallel",
    },
    {"assembly", "sampler_states", "live_requests", "token_details", "step_meter", "step_runner", "engine"},
    {"process"},
]
WITHOUT_TORCH = [
    "errors", "config", "options", "configure", "metrics", "sampling.params", "adapters.spec", "request", "sequence",
    "messages", "parameters", "block_manager", "scheduler", "speculation", "suspects", "process",
]  # fmt: skip
HEAVY = ("torch", "transformers", "triton", "tokenizers", "safetensors")


@functools.cache
def modules() -> dict[str, Path]:
    """Name inside the package -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_by(path: Path, *, lazily_too: bool = True) -> Iterator[str]:
    """Full names of what a file imports; with lazily_too also inside functions. Not what is for type checkers only."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                assert child.module is not None
                for alias in child.names:
                    submodule = f"{child.module}.{alias.name}"
                    yield submodule if submodule.removeprefix("textgen_engine.") in modules() else child.module
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            elif lazily_too or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from walk(child)

    return walk(ast.parse(path.read_text()))


@functools.cache
def inside(path: Path, *, lazily_too: bool = True) -> frozenset[str]:
    names = {name for name in imported_by(path, lazily_too=lazily_too) if name.startswith("textgen_engine.")}
    return frozenset(name.removeprefix("textgen_engine.") for name in names)


def layer_of(module: str) -> int:
    """The layer that names the module, or the nearest room around it."""
    name = module
    while module:
        for index, layer in enumerate(LAYERS):
            if module in layer:
                return index
        module = module.rpartition(".")[0]
    raise AssertionError(f"{name} has no layer: give it one in LAYERS")


@pytest.mark.parametrize("module", [name for name in modules() if name])
def test_imports_point_one_way(module: str) -> None:
    for target in inside(modules()[module]):
        assert layer_of(target) <= layer_of(module), f"{module} imports {target}, which lies above it"


def test_no_cycles() -> None:
    graph = {name: inside(path) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph.get(name, ()):
                if not (name.startswith(f"{target}.") or target == name):  # a package's front door is no cycle
                    visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_scheduler_sees_no_tensor() -> None:
    assert inside(modules()["scheduler"]) == {"block_manager", "config", "sequence", "step_pace"}
    assert inside(modules()["block_manager"]) == {"sequence"}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    """Tried in a fresh interpreter: what they import, imports nothing heavy either."""
    code = (
        f"import sys; import textgen_engine.{module}; "
        f"print([name for name in {HEAVY!r} if name in sys.modules], flush=True)"
    )
    environment = {"PYTHONPATH": str(ADAPTER), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nobody_in_the_package_knows_triton_server() -> None:
    for module, path in modules().items():
        assert "triton_python_backend_utils" not in set(imported_by(path)), module


def test_only_models_and_the_bridge_know_transformers() -> None:
    for module, path in modules().items():
        names = {name.partition(".")[0] for name in imported_by(path)}
        if "transformers" in names:
            # The detokenizer and the vocabulary use the public class of tokenizers, which is no internal.
            assert module.startswith(("models.", "grammar.")) or module in ("attention.bridge", "detokenizer"), module


def test_no_import_starts_a_thread_or_touches_a_device() -> None:
    """The whole engine, in a fresh interpreter without Triton and without a GPU."""
    code = (
        "import sys, threading; sys.modules['triton_python_backend_utils'] = None; "
        "import textgen_engine.engine, torch; "
        "assert threading.active_count() == 1; assert not torch.cuda.is_initialized()"
    )
    environment = {"PYTHONPATH": str(ADAPTER), "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
