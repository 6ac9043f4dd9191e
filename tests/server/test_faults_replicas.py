"""Two real servers, each with its gateway, behind a real nginx with docker/nginx/replicas.conf.

The configuration by itself, before two stand-ins, is tests/docker/test_replicas.py's.
"""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc

from ..docker.proxy import MISSING, NGINX, Proxy
from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .faults import MAX_TOTAL_TOKENS, OPTIONS
from .wire import wait_until, wait_until_idle

pytestmark = [pytest.mark.faults, pytest.mark.skipif(NGINX is None, reason=MISSING)]

SESSIONS = [f"conversation {index}" for index in range(8)]
STORY = "once upon a time, in a small village by the sea, there lived an old man who every morning went down to "
HITS = "tgi_prefix_cache_hit_tokens"


@pytest.fixture(scope="module")
def servers(lasting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningServer]]:
    made = [start(lasting_model, tmp_path_factory.mktemp("replica")) for _ in range(2)]
    try:
        yield [running.wait_until_ready() for running in made]
    finally:
        for running in made:
            running.close()


@pytest.fixture(scope="module")
def proxy(servers: list[RunningServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    grpc_ports = [int(running.grpc_url.rpartition(":")[2]) for running in servers]
    made = Proxy(tmp_path_factory.mktemp("nginx"), [gateway_port(running) for running in servers], grpc_ports)
    yield made
    made.close()


def start(model: Path, folder: Path, port: int = 0) -> RunningServer:
    """A replica whose gateway has this port."""
    environment = SERVER_ENVIRONMENT | OPTIONS | {"MODEL_ID": str(model)}
    return RunningServer(folder, environment, ("--gateway-port", str(port)))


def gateway_port(server: RunningServer) -> int:
    return int(str(server.gateway_url).rpartition(":")[2])


def send(
    proxy: Proxy, session: str, path: str = "/generate", num_tokens: int = 4
) -> tuple[http.client.HTTPResponse, http.client.HTTPConnection]:
    """A session's requests share a prompt that begins with its own name."""
    body = {"inputs": f"{session}: {STORY}", "parameters": {"max_new_tokens": num_tokens}}
    return proxy.open(json.dumps(body).encode(), path, timeout_s=60, X_Session_Id=session)


def ask(proxy: Proxy, session: str) -> str:
    response, connection = send(proxy, session)
    answer = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer
    text: str = answer["generated_text"]
    return text


def rest_of(response: http.client.HTTPResponse) -> bytes:
    """What still comes, however it ends."""
    try:
        return response.read()
    except http.client.IncompleteRead as cut:
        return cut.partial
    except OSError:
        return b""


def counts(servers: list[RunningServer], name: str = "tgi_request_success") -> list[int]:
    return [int(running.metric(name)) for running in servers]


def home_of(proxy: Proxy, servers: list[RunningServer], session: str) -> int:
    """Which server a request of this session reaches."""
    before = counts(servers)
    ask(proxy, session)
    wait_until(lambda: sum(counts(servers)) == sum(before) + 1, "the request is counted")
    return next(index for index, count in enumerate(counts(servers)) if count > before[index])


def test_a_conversation_stays_where_its_prefix_is(proxy: Proxy, servers: list[RunningServer]) -> None:
    """Sessions are spread over both servers; one that comes back finds what was computed for it, and only there."""
    homes = {session: home_of(proxy, servers, session) for session in SESSIONS}
    assert set(homes.values()) == {0, 1}
    for session, home in homes.items():
        before = counts(servers, HITS)
        assert home_of(proxy, servers, session) == home
        wait_until(
            lambda home=home, before=before: counts(servers, HITS)[home] >= before[home] + 16,  # type: ignore[misc]
            "a block of its prefix was found",
        )
        assert counts(servers, HITS)[1 - home] == before[1 - home]


def test_tokens_go_on_as_they_come(proxy: Proxy, servers: list[RunningServer]) -> None:
    response, connection = send(proxy, SESSIONS[0], "/generate_stream", num_tokens=MAX_TOTAL_TOKENS - 1000)
    assert response.status == 200
    assert response.readline().startswith(b"data:")
    wait_until(lambda: sum(counts(servers, "tgi_batch_current_size")) == 1, "the server is still at it")
    connection.close()  # and a client that leaves is noticed through the proxy
    response.close()
    for running in servers:
        wait_until_idle(running)


def test_streams_of_grpc_go_through_too(proxy: Proxy, servers: list[RunningServer]) -> None:
    before = counts(servers)
    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(f"127.0.0.1:{proxy.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)), headers={"x-session-id": SESSIONS[0]})
        text = grpc.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([STORY.encode()], dtype=object))
        stream = grpc.InferInput("stream", [1], "BOOL")
        stream.set_data_from_numpy(np.array([True]))
        client.async_stream_infer(
            "textgen", [text, stream], enable_empty_final_response=True, parameters={"max_new_tokens": 5}
        )
        pieces = []
        while True:
            result, error = answers.get(timeout=60)
            assert error is None
            pieces.append(result.as_numpy("text_output"))
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        client.stop_stream()
    assert len(pieces) >= 2
    wait_until(lambda: sum(counts(servers)) == sum(before) + 1, "the request is counted")


def test_a_server_that_dies_is_skipped_and_gets_its_own_back(
    proxy: Proxy, servers: list[RunningServer], lasting_model: Path, tmp_path: Path
) -> None:
    """A stream it had begun ends, and is not begun again elsewhere; later requests do not notice."""
    homes = {session: home_of(proxy, servers, session) for session in SESSIONS}
    answered = sum(counts(servers))
    texts = {session: ask(proxy, session) for session in SESSIONS}
    wait_until(lambda: sum(counts(servers)) == answered + len(SESSIONS), "the requests are counted")
    dying = homes[SESSIONS[0]]
    lost, left = servers[dying], servers[1 - dying]
    response, connection = send(proxy, SESSIONS[0], "/generate_stream", num_tokens=MAX_TOTAL_TOKENS - 1000)
    assert response.readline().startswith(b"data:")
    before = counts([left], "tgi_request_count")
    lost.close()  # at once, streams or not
    assert b"finish_reason" not in rest_of(response)
    connection.close()
    assert {session: ask(proxy, session) for session in SESSIONS} == texts, "the other server has the same answers"
    wait_until(
        lambda: counts([left], "tgi_request_count") == [before[0] + len(SESSIONS)], "it had each once, and no other"
    )
    back = start(lasting_model, tmp_path, gateway_port(lost))
    try:
        pair = [back.wait_until_ready(), left] if dying == 0 else [left, back.wait_until_ready()]
        moved = [session for session, home in homes.items() if home == dying]
        wait_until(lambda: home_of(proxy, pair, moved[0]) == dying, "nginx tries the address again, after ten seconds")
        assert {session: home_of(proxy, pair, session) for session in SESSIONS} == homes
    finally:
        back.close()
