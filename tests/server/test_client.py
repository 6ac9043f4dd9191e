"""The client and the `textgen` command against a real server and the demonstration model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import textgen_client
from textgen_client import (
    AsyncClient,
    AsyncStream,
    Client,
    OverloadedError,
    RequestCancelled,
    RequestTimeout,
    ServerUnavailable,
    TextgenError,
    ValidationError,
)

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Say hello in French, and then in Japanese."}]
LONG: dict[str, Any] = {"max_new_tokens": 900, "ignore_eos_token": True}


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(server.grpc_url, timeout=120) as client:
        yield client


def _is_live(client: Client, request_id: str) -> bool:
    """Whether the server knows the request, which this ends if it does."""
    try:
        client.cancel(request_id)
    except ValidationError:
        return False
    return True


def _wait_for_running(server: Any, number: int, timeout_s: float) -> None:
    """Until the server's gauge shows so many running requests; gauges follow the engine after a moment."""
    until_s = time.monotonic() + timeout_s
    while server.metric("tgi_batch_current_size") != number:
        assert time.monotonic() < until_s, f"{number} requests never ran"
        time.sleep(0.05)


@pytest.mark.parametrize("model", ["textgen", "ensemble"])
@pytest.mark.parametrize(
    "request_form",
    [
        {"prompt": PROMPT},
        {"messages": MESSAGES},
        {"input_ids": [504, 3575, 282, 4649, 314]},
        {"prompt": "🦙 写", "temperature": 1.5, "seed": 7},
    ],
    ids=["text", "messages", "ids", "sampled"],
)
def test_stream_equals_generate(client: Client, model: str, request_form: dict[str, Any]) -> None:
    whole = client.generate(**request_form, model=model, max_new_tokens=10)
    chunks = list(client.stream(**request_form, model=model, max_new_tokens=10, return_num_output_tokens=True))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert len(whole.text) > 0
    assert [chunk.is_final for chunk in chunks].count(True) == 1
    assert chunks[-1].finish_reason == whole.finish_reason
    assert {chunk.finish_reason for chunk in chunks[:-1]} <= {None}
    assert sum(chunk.num_output_tokens or 0 for chunk in chunks) == whole.num_output_tokens
    assert (whole.num_input_tokens or 0) > 0


def test_details_logprobs_and_choices(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=5, details=True, return_logprobs=True)
    assert answer.details is not None
    assert len(answer.details["tokens"]) == answer.num_output_tokens == 5
    assert len(answer.logprobs) == 5
    both = client.generate(PROMPT, max_new_tokens=5, n=2, temperature=2.0, seed=1)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text != both.choices[1].text
    assert both.num_output_tokens == 10


def test_break_cancels(server: Any, client: Client) -> None:
    for _ in client.stream(PROMPT, request_id="left", **LONG):
        _wait_for_running(server, 1, 10)
        break
    # Its 900 tokens would take far longer. (Asking with `cancel` would end it too, so look at the gauge first.)
    _wait_for_running(server, 0, 5)
    assert not _is_live(client, "left")


def test_cancel_by_id_ends_requests_of_either_model(client: Client) -> None:
    for model in ("textgen", "ensemble"):
        stream = client.stream(PROMPT, model=model, request_id=f"through {model}", **LONG)
        next(stream)
        client.cancel(f"through {model}")
        with pytest.raises(RequestCancelled) as caught:
            list(stream)
        assert caught.value.request_id == f"through {model}"
        assert not _is_live(client, f"through {model}")


def test_eight_at_once_in_asyncio(server: Any, client: Client) -> None:
    prompts = [f"{PROMPT} {number}" for number in range(8)]
    alone = [client.generate(prompt, max_new_tokens=12).text for prompt in prompts]

    async def together() -> list[str]:
        async def one(prompt: str) -> str:
            return "".join([chunk.text async for chunk in client.stream(prompt, max_new_tokens=12)])

        async with AsyncClient(server.grpc_url, timeout=120) as client:
            return await asyncio.gather(*(one(prompt) for prompt in prompts))

    assert asyncio.run(together()) == alone


def test_a_cancelled_task_cancels(server: Any, client: Client) -> None:
    async def main() -> None:
        async with AsyncClient(server.grpc_url) as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.generate(PROMPT, request_id="waited for", **LONG), 1)
            await asyncio.to_thread(_wait_for_running, server, 0, 15)
            stream = client.stream(PROMPT, request_id="dropped", **LONG)
            await anext(stream)
            await asyncio.to_thread(_wait_for_running, server, 1, 15)
            del stream
            # While the connection is open: its end would cancel everything. Uncancelled, they would run for longer.
            await asyncio.to_thread(_wait_for_running, server, 0, 15)

    asyncio.run(main())
    for request_id in ("waited for", "dropped"):
        assert not _is_live(client, request_id)


@pytest.mark.parametrize("model", ["textgen", "ensemble"])
def test_refusals(client: Client, model: str) -> None:
    for bad, named in (
        ({"no_such_parameter": 1}, "no_such_parameter"),
        ({"temperature": -1.0}, "temperature"),
        ({"prompt": "word " * 3000}, "(?i)max_input_tokens"),
        ({"prompt": ""}, "text_input"),
    ):
        with pytest.raises(ValidationError, match=named) as caught:
            client.generate(**{"prompt": PROMPT, "model": model, "request_id": "bad", **bad})
        assert str(caught.value).startswith(("Input validation error: ", "Template error: "))
        assert "ensemble" not in str(caught.value)
        assert caught.value.request_id == "bad"
        assert caught.value.public_type == "validation"


def test_a_model_that_is_not_there(client: Client) -> None:
    with pytest.raises(ValidationError, match="nonesuch"):
        client.generate(PROMPT, model="nonesuch")
    assert client.health(model="nonesuch").problem == "the model 'nonesuch' is not ready"


def test_deadline(client: Client) -> None:
    begun_s = time.monotonic()
    with pytest.raises(RequestTimeout):
        client.generate(PROMPT, timeout=0.5, request_id="late", **LONG)
    assert time.monotonic() - begun_s < 2.4, "the server, not the client's guard, ends it"
    chunks = list(client.stream(PROMPT, timeout=1.0, **LONG))
    assert chunks[-1].finish_reason == "timeout"
    assert "".join(chunk.text for chunk in chunks)


def test_overload(server: Any, client: Client) -> None:
    async def first_chunk(stream: AsyncStream) -> None:
        await anext(stream)

    async def main() -> None:
        async with AsyncClient(server.grpc_url) as many:
            streams = [many.stream(PROMPT, **LONG) for _ in range(100)]
            tasks = [asyncio.create_task(first_chunk(stream)) for stream in streams]
            await asyncio.wait(tasks, timeout=60, return_when=asyncio.FIRST_EXCEPTION)
            for stream in streams:
                await stream.aclose()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [result for result in results if isinstance(result, OverloadedError)]
            assert refused
            others = [r for r in results if not isinstance(r, OverloadedError | RequestCancelled | None)]
            assert others == []
            assert refused[0].message

    asyncio.run(main())
    until_s = time.monotonic() + 10  # the slots are free again after the step that is running
    while True:
        with contextlib.suppress(OverloadedError):
            assert client.generate(PROMPT, max_new_tokens=1).text
            break
        assert time.monotonic() < until_s, "the slots of requests that were left are never free again"
        time.sleep(0.05)


def test_models_and_health(server: Any, client: Client) -> None:
    with Client(server.grpc_url, headers={"triton-grpc-protocol-admin-key": server.admin_key}) as admin:
        assert {model.name for model in admin.models() if model.ready} >= {"textgen", "tokenizer", "ensemble"}
    with pytest.raises(ServerUnavailable, match="restricted, expecting header 'triton-grpc-protocol-admin-key'"):
        client.models()
    found = client.health(timeout=30)
    assert (found.ok, found.problem) == (True, None)


def test_nobody_there() -> None:
    with socket.socket() as bound:  # bound, but nobody listens
        bound.bind(("127.0.0.1", 0))
        with Client(f"127.0.0.1:{bound.getsockname()[1]}") as client, pytest.raises(ServerUnavailable):
            client.generate(PROMPT)


# ---- the command ----------------------------------------------------------------------------------------------------


def _environment(server: Any) -> dict[str, str]:
    package = str(Path(textgen_client.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": package, "TEXTGEN_URL": server.grpc_url, "TERM": "dumb"}


def _textgen(server: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "textgen_client", *arguments]
    return subprocess.run(
        command, env=_environment(server), capture_output=True, encoding="utf-8", timeout=120, check=False
    )


def test_command(server: Any, client: Client) -> None:
    said = _textgen(server, "generate", PROMPT, "--max-new-tokens", "8")
    expected = client.generate(PROMPT, max_new_tokens=8).text + "\n"
    assert (said.returncode, said.stdout, said.stderr) == (0, expected, "")
    key = f"triton-grpc-protocol-admin-key={server.admin_key}"
    assert "READY" in _textgen(server, "models", "--header", key).stdout
    assert _textgen(server, "health", "--timeout", "30").returncode == 0
    refused = _textgen(server, "generate", PROMPT, "-p", "no_such_parameter=1")
    assert refused.returncode == 1
    assert refused.stderr.startswith("textgen: Input validation error: ")
    assert refused.stderr.count("\n") == 1
    assert _textgen(server, "cancel", "nobody's").returncode == 1


class _Terminal:
    """A program on a terminal of its own, so that a typed Ctrl-C becomes a signal as it does for a person."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        # The new session takes the pty as its controlling terminal, then becomes the command.
        take = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", take, *command],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self._seen = b""

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def read_until(self, text: str, timeout_s: float = 60.0) -> str:
        """What was shown up to and with `text`; the rest is kept for the next call."""
        until_s = time.monotonic() + timeout_s
        os.set_blocking(self._master, False)
        while text.encode() not in self._seen:
            assert time.monotonic() < until_s, f"never saw {text!r}, only {self._seen!r}"
            try:
                self._seen += os.read(self._master, 65536)
            except BlockingIOError:
                time.sleep(0.01)
        shown, _, self._seen = self._seen.partition(text.encode())
        return shown.decode(errors="replace") + text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


def test_chat_on_a_terminal(server: Any) -> None:
    command = [sys.executable, "-m", "textgen_client", "chat", "-p", "ignore_eos_token=true", "--max-new-tokens", "600"]
    terminal = _Terminal(command, _environment(server))
    try:
        terminal.read_until("> ")
        terminal.type(b"\x03")  # at the prompt: a new prompt
        terminal.read_until("> ")
        terminal.type(b"Tell me a very long story.\n")
        terminal.read_until("story.\r\n")
        terminal.read_until(" ")  # the answer has begun
        _wait_for_running(server, 1, 10)
        terminal.type(b"\x03")
        terminal.read_until("(cancelled)")
        terminal.read_until("> ")
        _wait_for_running(server, 0, 5)
        terminal.type(b"/reset\n")
        terminal.read_until("(forgotten)")
        terminal.read_until("> ")
        terminal.type(b"\x04")  # Ctrl-D
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()


def test_every_error_of_the_server_has_a_class(client: Client) -> None:
    """What the server refuses arrives as something more telling than the base class."""
    for bad in ({"messages": []}, {"messages": [{"role": 1}]}, {"input_ids": []}, {"input_ids": [-1]}):
        with pytest.raises(TextgenError) as caught:
            client.generate(**bad)  # type: ignore[arg-type]
        assert isinstance(caught.value, ValidationError), bad
