"""textgen_serve/runtime.py: which tritonserver is used, and what it finds around it."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

from textgen_serve.runtime import find_runtime


def test_the_images_own_server_comes_first(tmp_path: Path) -> None:
    """In NVIDIA's image its binary is used with its own backends and environment; nothing is prepared."""
    binary = tmp_path / "tritonserver" / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.touch(0o755)
    runtime = find_runtime(tmp_path / "cache", image=tmp_path / "tritonserver")
    assert (runtime.binary, runtime.backend_directory, runtime.environment) == (binary, None, dict(os.environ))
    assert not (tmp_path / "cache").exists()


def test_else_the_wheels_server_with_this_pythons_stub(tmp_path: Path) -> None:
    runtime = find_runtime(tmp_path / "cache", image=tmp_path / "nowhere")
    assert os.access(runtime.binary, os.X_OK)
    assert runtime.backend_directory is not None
    stub = runtime.backend_directory / "python" / "triton_python_backend_stub"
    assert os.access(stub, os.X_OK)
    assert runtime.environment["LD_LIBRARY_PATH"].startswith(str(sysconfig.get_config_var("LIBDIR")))
    made = stub.stat().st_mtime_ns
    assert find_runtime(tmp_path / "cache", image=tmp_path / "nowhere") == runtime
    assert stub.stat().st_mtime_ns == made, "prepared once"
