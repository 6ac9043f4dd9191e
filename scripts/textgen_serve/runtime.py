"""Which tritonserver runs here, and what it needs around it: backend folder, library path, interpreter.

Two cases. In NVIDIA's image everything lies under /opt/tritonserver and fits together. Otherwise the binary, the
Python backend and one stub per Python version come from the nvidia-pytriton wheel, and this file puts the stub of the
running Python beside the backend, as Triton expects it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from textgen_serve.errors import ServeError

_IMAGE = Path("/opt/tritonserver")
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Runtime:
    """binary: the server. backend_directory: None where the server's own default is right. environment: to start in."""

    binary: Path
    backend_directory: Path | None
    environment: dict[str, str]


def find_runtime(cache_dir: Path, image: Path = _IMAGE) -> Runtime:
    """The tritonserver to use, its backend folder prepared below `cache_dir`; ServeError when there is none.

    image: where NVIDIA's image has its server.
    """
    if (image / "bin" / "tritonserver").exists():
        return Runtime(image / "bin" / "tritonserver", None, dict(os.environ))
    site = Path(sysconfig.get_path("purelib"))
    server = site / "pytriton" / "tritonserver"
    if not (server / "bin" / "tritonserver").exists():
        raise ServeError("no tritonserver: neither /opt/tritonserver nor the package nvidia-pytriton; run `make setup`")
    environment = dict(os.environ)
    # The stub links to libpython by name. With a second Python of the same minor version on the machine the loader
    # might take that one's core with our standard library, so the running interpreter's folder comes first.
    libraries = [
        sysconfig.get_config_var("LIBDIR"),
        str(site / "nvidia_pytriton.libs"),
        os.environ.get("LD_LIBRARY_PATH"),
    ]
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    # The stub asks the first `python3` on PATH for its packages.
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"
    return Runtime(server / "bin" / "tritonserver", _prepare_backend(server, cache_dir), environment)


def _prepare_backend(server: Path, cache_dir: Path) -> Path:
    """A backend folder with the stub of the running Python in it; made once per wheel and Python version."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / python / _STUB
    if not stub.exists():
        raise ServeError(f"nvidia-pytriton has no Python backend stub for Python {python}")
    folder = cache_dir / "backends" / f"{importlib.metadata.version('nvidia-pytriton')}-py{python}"
    if (folder / "python" / _STUB).exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            shutil.copytree(server / "backends" / "python", staging / "python")
            shutil.copy(stub, staging / "python" / _STUB)
            (staging / "python" / _STUB).chmod(0o755)  # wheels carry no run bit
            staging.chmod(0o755)
            staging.rename(folder)
        except OSError:
            # Another server may have prepared the same folder meanwhile.
            if not (folder / "python" / _STUB).exists():
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise ServeError(f"cannot prepare the Python backend in {folder}: {error.strerror or error}") from error
    return folder
