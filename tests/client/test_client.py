"""The synchronous client against a scripted server: streams, early leaving, failures in mid-stream, process exit."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from textgen_client import (
    Client,
    GenerationError,
    OverloadedError,
    RequestCancelled,
    RequestTimeout,
    ServerUnavailable,
    TextgenError,
    Tls,
    ValidationError,
)

from .fake_triton import Call, FakeTriton, endless, flag_of, last_word, parameters_of, response


@pytest.fixture
def client(triton: FakeTriton) -> Iterator[Client]:
    with Client(triton.url) as client:
        yield client


def _left(triton: FakeTriton) -> bool:
    return triton.calls[-1].left.wait(5)


def test_stream_equals_generate(client: Client) -> None:
    text = "Grüße an 世界 🦙 !"
    whole = client.generate(text)
    chunks = list(client.stream(text))
    assert "".join(chunk.text for chunk in chunks) == whole.text == text
    assert [chunk.is_final for chunk in chunks] == [False] * 4 + [True]
    assert [chunk.finish_reason for chunk in chunks] == [None] * 4 + ["eos_token"]
    assert (whole.finish_reason, whole.num_input_tokens, whole.num_output_tokens) == ("length", 3, len(text))


def test_request_carries_headers_id_and_timeout(triton: FakeTriton) -> None:
    with Client(triton.url, headers={"X-Tenant": "a", "x-b": "1"}, timeout=9) as client:
        assert client.generate("hi", request_id="mine", headers={"x-b": "2"}).request_id == "mine"
        call = triton.calls[-1]
        assert call.request.id == "mine"
        assert (call.metadata["x-tenant"], call.metadata["x-b"]) == ("a", "2")
        assert parameters_of(call.request)["timeout"] == 9
        assert 9 < call.context.time_remaining() <= 11.1
        client.generate("hi", timeout=3)
        assert parameters_of(triton.calls[-1].request)["timeout"] == 3


def test_break_cancels(triton: FakeTriton, client: Client) -> None:
    triton.script = endless
    for chunk in client.stream("hi"):
        assert chunk.text == "word "
        break
    assert _left(triton)


def test_after_the_last_response_nothing_is_cancelled(triton: FakeTriton, client: Client) -> None:
    """Whoever leaves there waits for the stream's end: a cancellation would meet it (see wire.ResponseReader)."""
    triton.script, left = last_word(text_output="all")
    for _ in client.stream("hi"):
        break
    with client.stream("hi") as stream:
        next(stream)
    assert list(stream) == []
    triton.script, left_after_error = last_word(error="Input validation error: no")
    with pytest.raises(ValidationError):
        client.generate("hi")
    assert left + left_after_error == [False] * 3


def test_exception_in_the_loop_cancels(triton: FakeTriton, client: Client) -> None:
    triton.script = endless
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for _ in client.stream("hi"):
            raise ZeroDivisionError
    assert _left(triton)


def test_with_cancels_a_stream_that_is_still_referred_to(triton: FakeTriton, client: Client) -> None:
    triton.script = endless
    with client.stream("hi") as stream:
        next(stream)
    assert _left(triton)
    with pytest.raises(RequestCancelled):
        next(stream)
    assert list(stream) == []


def test_close_from_another_thread_wakes_the_reader(triton: FakeTriton, client: Client) -> None:
    triton.script = endless
    stream = client.stream("hi")
    next(stream)
    timer = threading.Timer(0.1, stream.close)
    timer.start()
    with pytest.raises(RequestCancelled) as caught:
        next(stream)
    assert caught.value.request_id == stream.request_id
    assert _left(triton)
    timer.join()


def test_final_response_may_be_empty(triton: FakeTriton, client: Client) -> None:
    def script(request: Any, call: Call) -> Iterator[Any]:
        yield response(text_output="a")
        yield response(final=True)

    triton.script = script
    assert [chunk.text for chunk in client.stream("hi")] == ["a"]
    assert client.generate("hi").text == "a"


def test_a_stream_that_is_cut_is_no_answer(triton: FakeTriton, client: Client) -> None:
    triton.script = lambda request, call: iter([response(text_output="a")])
    stream = client.stream("hi")
    assert next(stream).text == "a"
    with pytest.raises(GenerationError, match="before its final response"):
        next(stream)
    assert list(stream) == []
    with pytest.raises(GenerationError, match="before its final response"):
        client.generate("hi")


def test_error_in_mid_stream(triton: FakeTriton, client: Client) -> None:
    def script(request: Any, call: Call) -> Iterator[Any]:
        yield response(text_output="a")
        yield response(error="in ensemble 'ensemble', Request failed during generation: the engine died")
        call.left.wait(30)  # a server that forgets to finish must not hold its client

    triton.script = script
    stream = client.stream("hi")
    assert next(stream).text == "a"
    with pytest.raises(GenerationError, match="the engine died"):
        next(stream)
    assert list(stream) == []
    assert _left(triton)


def test_a_connection_lost_after_the_final_response_is_no_failure(triton: FakeTriton, client: Client) -> None:
    def script(request: Any, call: Call) -> Iterator[Any]:
        yield response(text_output="a", final=True)
        raise RuntimeError("the server breaks")

    triton.script = script
    assert client.generate("hi").text == "a"


def test_silence_ends_with_the_deadline(triton: FakeTriton, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textgen_client.channel.DEADLINE_GRACE_S", 0.1)
    triton.script = endless
    stream = client.stream("hi", timeout=0.2)
    next(stream)
    with pytest.raises(RequestTimeout, match="within the client's deadline"):
        next(stream)


@pytest.mark.parametrize("text", ["Model is overloaded: 1", "Input validation error: 2"])
def test_refusals(triton: FakeTriton, client: Client, text: str) -> None:
    triton.script = lambda request, call: iter([response(error=text, final=True)])
    with pytest.raises((OverloadedError, ValidationError)) as caught:
        client.generate("hi", request_id="mine")
    assert (str(caught.value), caught.value.request_id) == (text, "mine")


def test_nobody_there_is_one_clean_error(free_port: int) -> None:
    with Client(f"127.0.0.1:{free_port}") as client:
        for ask in (lambda: client.generate("hi"), lambda: list(client.stream("hi")), client.models):
            with pytest.raises(ServerUnavailable, match=f"127.0.0.1:{free_port}") as caught:
                ask()
            assert caught.value.__cause__ is None
            assert caught.value.__context__ is None  # gRPC's own error is the call, which must not outlive it
        assert "Server unavailable" in (client.health().problem or "")


def test_the_same_client_finds_a_server_that_comes_later(free_port: int, start_triton: Any) -> None:
    with Client(f"127.0.0.1:{free_port}") as client:
        with pytest.raises(ServerUnavailable):
            client.generate("hi")
        start_triton(free_port)
        until_s = time.monotonic() + 10
        while True:
            try:
                assert client.generate("hi").text == "hi"
                break
            except ServerUnavailable:
                assert time.monotonic() < until_s
                time.sleep(0.05)


def test_wrong_addresses_and_files() -> None:
    with pytest.raises(ValidationError, match="gRPC port"):
        Client("http://localhost:8000")
    with pytest.raises(ValidationError, match="TLS file"):
        Client(tls=Tls(root_certificates="/nonexistent.pem"))


def test_a_closed_client_says_so(triton: FakeTriton) -> None:
    client = Client(triton.url)
    triton.script = endless
    stream = client.stream("hi")
    next(stream)
    client.close()
    with pytest.raises(TextgenError):
        next(stream)
    with pytest.raises(ServerUnavailable):
        client.generate("hi")
    assert _left(triton)


def test_one_client_serves_many_threads(client: Client) -> None:
    def ask(number: int) -> bool:
        return "".join(chunk.text for chunk in client.stream(f"{number} and {number}")) == f"{number} and {number}"

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(100)))


def test_cancel_sends_the_id(triton: FakeTriton, client: Client) -> None:
    triton.script = lambda request, call: iter([response(final=True)])
    client.model = "ensemble"  # which has no such input
    client.cancel("theirs")
    request = triton.calls[-1].request
    assert (request.model_name, request.id, flag_of(request, "cancel")) == ("textgen", "theirs", True)


def test_models(client: Client) -> None:
    assert [(model.name, model.ready, model.reason) for model in client.models()] == [
        ("textgen", True, ""),
        ("broken", False, "failed to load"),
    ]


def test_model_info(triton: FakeTriton, client: Client) -> None:
    assert client.model_info().max_total_tokens == triton.info["max_total_tokens"]
    triton.info = {**triton.info, "max_batch": 7}  # of a newer server
    assert client.model_info().model_id == "fake"
    triton.info = {}
    with pytest.raises(GenerationError, match="model_id"):
        client.model_info()


def test_health(triton: FakeTriton, client: Client) -> None:
    assert client.health().ok
    assert parameters_of(triton.calls[-1].request)["max_new_tokens"] == 1
    triton.script = lambda request, call: iter([response(error="Model is overloaded: 128", final=True)])
    assert client.health().ok
    triton.script = lambda request, call: iter([response(error="Model is not ready: gone", final=True)])
    found = client.health()
    assert (found.ok, found.model_ready, found.problem) == (False, True, "Model is not ready: gone")
    triton.model_ready = False
    assert not client.health().ok


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)"])
def test_a_process_exits_with_a_stream_open(triton: FakeTriton, environment: dict[str, str], ending: str) -> None:
    triton.script = endless
    code = f"import textgen_client as t; s = t.Client({triton.url!r}).stream('hi'); next(s); {ending}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=20, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert _left(triton)


def test_ctrl_c_ends_a_blocking_wait(triton: FakeTriton, environment: dict[str, str]) -> None:
    arrived = threading.Event()

    def script(request: Any, call: Call) -> Iterator[Any]:
        arrived.set()
        yield from endless(request, call)

    triton.script = script
    code = f"import textgen_client as t; t.Client({triton.url!r}).generate('hi')"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment)
    assert arrived.wait(20)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=10)[1]
    assert b"KeyboardInterrupt" in stderr
    assert process.returncode == -signal.SIGINT
    assert _left(triton)
