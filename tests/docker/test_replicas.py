"""docker/nginx/replicas.conf in a real nginx: who asks twice is answered by the same server, whichever that is."""

from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ..running_server import REPOSITORY_ROOT

CONFIGURATION = REPOSITORY_ROOT / "docker" / "nginx" / "replicas.conf"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin") or shutil.which("nginx")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


class Replica:
    """Stands for a gateway: streams its name in two events, the second only when it is let."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.may_end.set()
        self.connections: list[socket.socket] = []
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                replica.connections.append(self.connection)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self._event(replica.name)
                replica.may_end.wait(10)
                self._event("end")
                self.wfile.write(b"0\r\n\r\n")

            def _event(self, text: str) -> None:
                event = f"data: {text}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                self.wfile.flush()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self.server.server_address[1]
        self.name = f"replica {self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """As a process that ends: its connections end with it."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Proxy:
    """nginx with the configuration as it is, but for addresses."""

    def __init__(self, folder: Path, replicas: list[Replica]) -> None:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port: int = one.getsockname()[1]
            grpc_port = other.getsockname()[1]
        text = CONFIGURATION.read_text()
        text = re.sub(r"server textgen-(\d):\d+", lambda m: f"server 127.0.0.1:{replicas[int(m[1])].port}", text)
        text = text.replace("listen 8080", f"listen 127.0.0.1:{self.port}")
        text = text.replace("listen 8001", f"listen 127.0.0.1:{grpc_port}")
        text = text.replace("/tmp/nginx.pid", str(folder / "nginx.pid"))
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

    def ask(self, **headers: str) -> str:
        """Which replica answered."""
        response, connection = self.open(**headers)
        text = response.read().decode()
        connection.close()
        assert text.endswith("data: end\n\n")
        return text.splitlines()[0].removeprefix("data: ")

    def open(self, **headers: str) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", "/generate_stream", body=b"{}", headers=named)
        response = connection.getresponse()
        assert response.status == 200
        return response, connection

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    made = [Replica(), Replica()]
    yield made
    for replica in made:
        replica.close()


@pytest.fixture
def proxy(tmp_path: Path, replicas: list[Replica]) -> Iterator[Proxy]:
    made = Proxy(tmp_path, replicas)
    yield made
    made.close()


def test_a_session_stays_with_its_server_and_sessions_spread(proxy: Proxy, replicas: list[Replica]) -> None:
    first = {session: proxy.ask(X_Session_Id=session) for session in map(str, range(40))}
    assert {session: proxy.ask(X_Session_Id=session) for session in first} == first
    shares = [list(first.values()).count(replica.name) for replica in replicas]
    assert min(shares) >= 8, "no server gets nearly everything"
    assert len({proxy.ask(Authorization="Bearer key") for _ in range(6)}) == 1, "without a session, the key"
    assert len({proxy.ask() for _ in range(6)}) == 1, "without either, the address"


def test_tokens_go_on_as_they_come(proxy: Proxy, replicas: list[Replica]) -> None:
    for replica in replicas:
        replica.may_end.clear()
    response, connection = proxy.open(X_Session_Id="one")
    assert response.readline().startswith(b"data: replica"), "before the server has sent its second event"
    for replica in replicas:
        replica.may_end.set()
    assert response.read().endswith(b"data: end\n\n")
    connection.close()


def test_sessions_of_a_lost_server_move_and_the_others_stay(proxy: Proxy, replicas: list[Replica]) -> None:
    first = {session: proxy.ask(X_Session_Id=session) for session in map(str, range(20))}
    replicas[0].close()
    after = {session: proxy.ask(X_Session_Id=session) for session in first}
    assert set(after.values()) == {replicas[1].name}
    assert all(after[session] == name for session, name in first.items() if name == replicas[1].name)
