"""What the gateway does beside its routes, against a scripted Triton: keys, sizes, ids, traces, clients that leave,
the end of a drained gateway, statuses for failures that a healthy server does not show."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http import server as http_server
from typing import Any

import httpx
import psutil
import pytest
import trustme

from textgen_client.gateway.settings import read_api_keys

from ..gateway.running_gateway import Gateway, running_gateway
from .fake_triton import MODEL_LIMITS, Call, FakeTriton, Script, echo, response, running_fake

KEYED = {"Authorization": "Bearer second-key"}
ROUTES = ["/", "/generate", "/generate_stream", "/invocations", "/vertex", "/tokenize", "/chat_tokenize"]
ROUTES += ["/v1/completions", "/v1/chat/completions", "/v1/responses"]
OPEN = ["/health", "/ping", "/info", "/v1/models", "/api-doc/openapi.json"]


@pytest.fixture(scope="module")
def triton() -> Iterator[FakeTriton]:
    with running_fake() as fake:
        yield fake


@pytest.fixture(scope="module")
def gateway(triton: FakeTriton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    keys = folder / "keys"
    keys.write_text("# keys of two teams\nfirst-key\n\nsecond-key\n")
    arguments = ["--api-key-file", str(keys), "--cors-allow-origin", "https://app.example"]
    with running_gateway(folder, triton.url, "http://127.0.0.1:1/metrics", *arguments) as running:
        yield running


@pytest.fixture
def http(gateway: Gateway, triton: FakeTriton) -> Iterator[httpx.Client]:
    triton.calls.clear()
    triton.script = echo
    with httpx.Client(base_url=gateway.url, timeout=20, headers=KEYED) as client:
        yield client


def silent(request: Any, call: Call) -> Iterator[Any]:
    """Nothing until the client leaves."""
    call.left.wait(20)
    yield from ()


def failing(text: str) -> Script:
    def script(request: Any, call: Call) -> Iterator[Any]:
        yield response(final=True, error=text)

    return script


def body(**more: Any) -> dict[str, Any]:
    return {"inputs": "a b c", **more}


def test_57_keys_guard_what_costs(http: httpx.Client) -> None:
    wrong = [{}, {"Authorization": "Bearer Second-key"}, {"Authorization": "second-key"}, {"Authorization": "Bearer"}]
    with httpx.Client(base_url=http.base_url) as unkeyed:
        for route in ROUTES:
            for headers in wrong:
                refused = unkeyed.post(route, json=body(), headers=headers)
                assert refused.status_code == 401, (route, headers)
                assert refused.headers["www-authenticate"] == "Bearer"
        assert [unkeyed.get(route).status_code for route in OPEN] == [200] * len(OPEN)
        assert unkeyed.get("/metrics").status_code == 503  # open; it is Triton's that are missing here
    for key in ("first-key", "second-key"):
        assert http.post("/generate", json=body(), headers={"Authorization": f"bearer {key}"}).status_code == 200


def test_60_before_the_model_is_ready(triton: FakeTriton, tmp_path: Any) -> None:
    """Nobody there, then a server that loads, then a model that answers: 503 until the last, and no restart between."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running_gateway(tmp_path, f"127.0.0.1:{port}", "http://127.0.0.1:1") as gateway:
        for route in ("/health", "/ping", "/", "/info", "/metrics", "/v1/models"):
            answer = httpx.get(gateway.url + route, timeout=20)
            assert answer.status_code == 503, route
            assert answer.headers["retry-after"], route
        assert httpx.get(gateway.url + "/health", timeout=20).json()["error_type"] == "healthcheck"
        refused = httpx.post(gateway.url + "/generate", json=body(), timeout=20)
        assert (refused.status_code, refused.json()["error_type"]) == (503, "healthcheck")
        with running_fake(port) as loading:
            loading.model_ready = False
            time.sleep(1.1)  # an answer about health is kept for a second
            assert httpx.get(gateway.url + "/health", timeout=20).status_code == 503
            loading.model_ready = True
            deadline = time.monotonic() + 20
            while httpx.get(gateway.url + "/health", timeout=20).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert httpx.get(gateway.url + "/info", timeout=20).json()["max_total_tokens"] == 100


def test_info_is_the_models_own_word(triton: FakeTriton, tmp_path: Any) -> None:
    """No limit is given to the gateway; and Vertex AI chooses where it asks, by variables."""
    routes = {"AIP_HEALTH_ROUTE": "/vertex-health", "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployed/2:predict"}
    with running_gateway(tmp_path, triton.url, "http://127.0.0.1:1", "--api-key", "k", environment=routes) as gateway:
        info = httpx.get(gateway.url + "/info").json()
        assert {name: info[name] for name in MODEL_LIMITS if name in info} == {
            name: limit for name, limit in MODEL_LIMITS.items() if name != "max_top_n_tokens"
        }
        assert httpx.get(gateway.url + "/vertex-health").status_code == 200
        predict = gateway.url + "/v1/endpoints/1/deployed/2:predict"
        assert httpx.post(predict, json={"instances": [{"inputs": "a b"}]}).status_code == 401
        keyed = {"Authorization": "Bearer k"}
        answer = httpx.post(predict, json={"instances": [{"inputs": "a b"}]}, headers=keyed)
        assert answer.json() == {"predictions": ["a b"]}


def test_browsers_may_send_their_key(http: httpx.Client) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with httpx.Client(base_url=http.base_url) as browser:
        allowed = browser.options("/v1/chat/completions", headers={"Origin": "https://app.example", **asked})
        assert allowed.status_code == 200
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        refused = browser.post("/generate", json=body(), headers={"Origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        assert browser.options("/generate", headers={"Origin": "https://evil.example", **asked}).status_code == 400


def test_58_ids_and_traces_travel_and_are_logged(http: httpx.Client, gateway: Gateway, triton: FakeTriton) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    given = {"X-Request-Id": "order-66", "traceparent": trace, "tracestate": "a=b"}
    answer = http.post("/generate", json=body(), headers=given)
    assert answer.headers["x-request-id"] == "order-66"
    (call,) = triton.calls
    assert call.request.id == "order-66"
    assert (call.metadata["traceparent"], call.metadata["tracestate"]) == (trace, "a=b")
    unsafe = http.post("/generate", json=body(), headers={"X-Request-Id": "a b\t<>"})
    assert unsafe.headers["x-request-id"] == triton.calls[1].request.id != "a b\t<>"
    deadline = time.monotonic() + 5
    while not (lines := [line for line in gateway.log_lines() if line["request_id"] == "order-66"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (line,) = lines
    assert (line["method"], line["path"], line["status"], line["traceparent"]) == ("POST", "/generate", 200, trace)
    assert line["bytes"] == len(answer.content)
    assert "second-key" not in gateway.log.read_text()


@pytest.mark.parametrize(
    ("text", "status", "kind"),
    [
        ("Model is overloaded: 64 requests are admitted", 429, "overloaded"),
        ("Request failed during generation: the engine died", 424, "generation"),
        ("Model is not ready: starting", 503, "healthcheck"),
        ("Request timeout: 1 s", 408, "timeout"),
        ("Template error: no", 422, "template_error"),
        ("Tool error: no", 422, "tool_error"),
        ("Input validation error: no", 422, "validation"),
        ("something unheard of", 424, "generation"),
    ],
)
def test_failures_have_their_status(http: httpx.Client, triton: FakeTriton, text: str, status: int, kind: str) -> None:
    triton.script = failing(text)
    alone = http.post("/generate", json=body())
    assert (alone.status_code, alone.json()["error_type"]) == (status, kind)
    assert ("retry-after" in alone.headers) == (status in (429, 503))
    stream = http.post("/generate_stream", json=body())
    assert stream.status_code == 200
    assert json.loads(stream.text.removeprefix("data: "))["error_type"] == kind
    chat = {"messages": [{"role": "user", "content": "a"}], "stream": True}
    refused = http.post("/v1/chat/completions", json=chat)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, kind)


def test_a_stream_that_fails_midway_says_so(http: httpx.Client, triton: FakeTriton) -> None:
    def script(request: Any, call: Call) -> Iterator[Any]:
        yield response(text_output="a ", finish_reason="None")
        yield response(final=True, error="Request failed during generation: the engine died")

    triton.script = script
    answer = http.post("/v1/responses", json={"input": "a", "stream": True}).text.split("\n\n")
    last = json.loads(answer[-2].partition("data: ")[2])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["output"][0]["content"][0]["text"] == "a "
    blocks = http.post("/v1/completions", json={"prompt": "a", "stream": True}).text.split("\n\n")
    assert json.loads(blocks[0].removeprefix("data: "))["choices"][0]["text"] == "a "
    assert json.loads(blocks[1].removeprefix("data: "))["error"]["code"] == "generation"
    assert blocks[2:] == ["data: [DONE]", ""]


@pytest.mark.parametrize(
    ("route", "more"),
    [
        ("/generate", {}),
        ("/generate_stream", {}),
        ("/vertex", {"instances": [{"inputs": "a"}]}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/responses", {"input": "a", "stream": True}),
    ],
)
def test_who_leaves_before_the_first_token_is_cancelled(
    http: httpx.Client, triton: FakeTriton, route: str, more: dict[str, Any]
) -> None:
    triton.script = silent
    with pytest.raises(httpx.ReadTimeout):
        http.post(route, json=more or body(), timeout=0.3)
    assert triton.calls
    assert all(call.left.wait(2) for call in triton.calls)


def test_who_leaves_a_stream_is_cancelled(http: httpx.Client, triton: FakeTriton) -> None:
    def script(request: Any, call: Call) -> Iterator[Any]:
        while not call.left.wait(0.01):
            yield response(text_output="a ", finish_reason="None")

    triton.script = script
    with http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as stream:
        assert next(stream.iter_lines()).startswith("data: {")
    assert triton.calls[0].left.wait(2)


def test_a_slow_reader_holds_its_stream_not_the_memory(http: httpx.Client, triton: FakeTriton) -> None:
    """What is not read stays with whoever makes it: the maker comes to a stop after some megabytes."""
    made = 0

    def script(request: Any, call: Call) -> Iterator[Any]:
        nonlocal made
        while not call.left.is_set():
            made += 1
            yield response(text_output="a" * 100_000, finish_reason="None")

    triton.script = script
    with http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}):
        before = -1
        while made != before:
            before = made
            time.sleep(0.3)
        assert 0 < made < 300
    assert triton.calls[0].left.wait(5)


def _accepts(url: str) -> bool:
    try:
        httpx.get(url + "/info")
    except httpx.ConnectError:
        return False
    except httpx.TransportError:
        pass  # was in line when the gateway closed its door; who comes next is refused
    return True


def test_48_a_drained_gateway_finishes_its_streams(triton: FakeTriton, tmp_path: Any) -> None:
    go_on = threading.Event()

    def script(request: Any, call: Call) -> Iterator[Any]:
        yield response(text_output="first ", finish_reason="None")
        go_on.wait(10)
        yield response(final=True, text_output="last", finish_reason="eos_token")

    triton.script = script
    with running_gateway(tmp_path, triton.url, "http://127.0.0.1:1") as gateway, httpx.Client() as client:
        asked = {"prompt": "a", "stream": True}
        with client.stream("POST", gateway.url + "/v1/completions", json=asked) as stream:
            lines = stream.iter_lines()
            next(lines)
            gateway.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while _accepts(gateway.url):
                assert time.monotonic() < deadline
            go_on.set()
            rest = list(lines)
        assert '"text":"last"' in rest[1]
        assert "data: [DONE]" in rest
        assert gateway.process.wait(5) == 0


def test_tls(triton: FakeTriton, tmp_path: Any) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    certificate.private_key_pem.write_to_path(key)
    chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    arguments = ["--tls-key", str(key), "--tls-certificate", str(chain)]
    with running_gateway(tmp_path, triton.url, "http://127.0.0.1:1", *arguments) as gateway:
        assert httpx.get(gateway.url + "/info", verify=context, timeout=20).status_code == 200
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(20) == 0


_PAGE = b'# TYPE tgi_request_count counter\ntgi_request_count{model="textgen"} 17\n'


class _Metrics(http_server.BaseHTTPRequestHandler):
    """Stands for Triton's metrics port."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        self.wfile.write(_PAGE)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _ask_until(gateway: Gateway, num_workers: int, path: str = "/metrics") -> dict[int, set[bytes]]:
    """What each worker answered, by process id: new connections until as many workers have answered one."""
    answers: dict[str, bytes] = {}
    deadline = time.monotonic() + 60
    while True:
        name = f"look-{path}-{len(answers)}".replace("/", ".")
        answer = httpx.get(gateway.url + path, headers={"X-Request-Id": name}, timeout=60)
        assert answer.status_code == 200, answer.text
        answers[name] = answer.content
        workers = {line["request_id"]: line["worker"] for line in gateway.log_lines()}
        found = {worker for name, worker in workers.items() if name in answers}
        if len(found) >= num_workers:
            break
        assert time.monotonic() < deadline, found
    return {worker: {answers[n] for n, w in workers.items() if w == worker and n in answers} for worker in found}


def test_several_workers(triton: FakeTriton, tmp_path: Any) -> None:
    """All of them serve, with the same numbers from Triton; one that is killed is replaced; at the end each finishes
    what it streams."""
    go_on = threading.Event()

    def script(request: Any, call: Call) -> Iterator[Any]:
        yield response(text_output="first ", finish_reason="None")
        go_on.wait(60)
        yield response(final=True, text_output="last", finish_reason="eos_token")

    triton.script = script
    with contextlib.ExitStack() as stack:
        metrics = stack.enter_context(http_server.ThreadingHTTPServer(("127.0.0.1", 0), _Metrics))
        threading.Thread(target=metrics.serve_forever, daemon=True).start()
        stack.callback(metrics.shutdown)
        page = f"http://127.0.0.1:{metrics.server_port}/metrics"
        gateway = stack.enter_context(running_gateway(tmp_path, triton.url, page, "--workers", "2"))
        answers = _ask_until(gateway, 2)
        assert set(map(frozenset, answers.values())) == {frozenset({_PAGE})}
        killed, _ = answers
        assert gateway.process.pid not in answers
        os.kill(killed, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(killed)] if psutil.pid_exists(killed) else [], timeout=60)
        assert killed not in _ask_until(gateway, 2, "/v1/models")

        client = stack.enter_context(httpx.Client(timeout=60))
        asked = {"prompt": "a", "stream": True}
        streams = [
            stack.enter_context(client.stream("POST", gateway.url + "/v1/completions", json=asked)) for _ in range(8)
        ]
        lines = [stream.iter_lines() for stream in streams]
        for stream in lines:
            next(stream)
        gateway.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while _accepts(gateway.url):
            assert time.monotonic() < deadline
        go_on.set()
        for stream in lines:
            assert "data: [DONE]" in list(stream)
        assert gateway.process.wait(60) == 0


def test_keys_are_read_from_both_places(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("c\n#d\n a \n")
    assert read_api_keys("a, b,", file) == ("a", "b", "c")
    assert read_api_keys(None, None) == ()
