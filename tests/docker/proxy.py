"""A real nginx with docker/nginx/replicas.conf in front of two servers, whatever these are."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

from ..running_server import REPOSITORY_ROOT

CONFIGURATION = REPOSITORY_ROOT / "docker" / "nginx" / "replicas.conf"
_FOLDERS = (
    "/usr/sbin",
    "/usr/local/sbin",
    "/usr/bin",
    "/usr/local/bin",
    str(REPOSITORY_ROOT / ".cache/tools/usr/sbin"),
)
NGINX = shutil.which("nginx") or shutil.which("nginx", path=":".join(_FOLDERS))
MISSING = "there is no nginx: install Debian's package nginx, or run `make proxy-tools`"


class Proxy:
    """nginx with the configuration as it is, but for addresses. ports: of the servers' HTTP and gRPC."""

    def __init__(self, folder: Path, http_ports: list[int], grpc_ports: list[int]) -> None:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port: int = one.getsockname()[1]
            self.grpc_port: int = other.getsockname()[1]
        text = CONFIGURATION.read_text()
        for given, ports in ((8080, http_ports), (8001, grpc_ports)):
            for index, port in enumerate(ports):
                text = text.replace(f"server textgen-{index}:{given}", f"server 127.0.0.1:{port}")
        text = text.replace("listen 8080", f"listen 127.0.0.1:{self.port}")
        text = text.replace("listen 8001", f"listen 127.0.0.1:{self.grpc_port}")
        text = re.sub(r"/tmp/nginx\.pid", str(folder / "nginx.pid"), text)
        assert "textgen-" not in text
        temporary = "".join(
            f"{name}_temp_path {folder};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = text.replace("http {", "http { " + temporary, 1)
        path = folder / "nginx.conf"
        path.write_text(text)
        assert NGINX is not None
        command = [NGINX, "-p", str(folder), "-c", str(path), "-e", "stderr", "-g", "daemon off;"]
        with (folder / "nginx.log").open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log)
        deadline_s = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline_s, (folder / "nginx.log").read_text()
                time.sleep(0.02)

    def open(
        self, body: bytes = b"{}", path: str = "/generate_stream", timeout_s: float = 10, **headers: str
    ) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        """Send a request; `X_Session_Id` names the header X-Session-Id."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, body=body, headers={"Content-Type": "application/json"} | named)
        return connection.getresponse(), connection

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
