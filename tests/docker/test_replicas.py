"""docker/nginx/replicas.conf in a real nginx: who asks twice is answered by the same server, whichever that is."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from .proxy import MISSING, NGINX, Proxy

pytestmark = pytest.mark.skipif(NGINX is None, reason=MISSING)


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


def ask(proxy: Proxy, **headers: str) -> str:
    """Which replica answered."""
    response, connection = proxy.open(**headers)
    assert response.status == 200
    text = response.read().decode()
    connection.close()
    assert text.endswith("data: end\n\n")
    return text.splitlines()[0].removeprefix("data: ")


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    made = [Replica(), Replica()]
    yield made
    for replica in made:
        replica.close()


@pytest.fixture
def proxy(tmp_path: Path, replicas: list[Replica]) -> Iterator[Proxy]:
    ports = [replica.port for replica in replicas]
    made = Proxy(tmp_path, ports, ports)
    yield made
    made.close()


def test_a_session_stays_with_its_server_and_sessions_spread(proxy: Proxy, replicas: list[Replica]) -> None:
    first = {session: ask(proxy, X_Session_Id=session) for session in map(str, range(40))}
    assert {session: ask(proxy, X_Session_Id=session) for session in first} == first
    shares = [list(first.values()).count(replica.name) for replica in replicas]
    assert min(shares) >= 8, "no server gets nearly everything"
    assert len({ask(proxy, Authorization="Bearer key") for _ in range(6)}) == 1, "without a session, the key"
    assert len({ask(proxy) for _ in range(6)}) == 1, "without either, the address"


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
    first = {session: ask(proxy, X_Session_Id=session) for session in map(str, range(20))}
    replicas[0].close()
    after = {session: ask(proxy, X_Session_Id=session) for session in first}
    assert set(after.values()) == {replicas[1].name}
    assert all(after[session] == name for session, name in first.items() if name == replicas[1].name)
