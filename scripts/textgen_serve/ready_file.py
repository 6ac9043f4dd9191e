"""The ready file: tells scripts where a server listens and which processes it is made of, once it can be used.

It carries the key of the administrative calls too, so only its owner may read it.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from textgen_serve.errors import ServeError
from textgen_serve.server import Ports


def write(path: Path, ports: Ports, pids: dict[str, list[int]], admin_key: str) -> None:
    """Create `path` in one step, so that whoever sees it can read it whole."""
    content = {
        "http_port": ports.http,
        "grpc_port": ports.grpc,
        "metrics_port": ports.metrics,
        "gateway_port": ports.gateway,
        "pids": pids,
        "restricted_api_key": admin_key,
    }
    try:
        descriptor, staging = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
        os.replace(staging, path)
    except OSError as error:
        raise ServeError(f"cannot write the ready file {path}: {error.strerror}") from error


def remove(path: Path) -> None:
    """Take the promise back: before the server stops."""
    path.unlink(missing_ok=True)
