"""What the conformance cases share: prompts, traffic to run beside, and what a refusal looks like."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from textgen_client import Chunk, Client, Generation, TextgenError, ValidationError

if TYPE_CHECKING:
    from ..running_server import RunningServer

Result = TypeVar("Result")

# The demonstration model continues these two with " E, F, G, H, ..." and " 10, 12, 14, ..."; at each of the first 24
# tokens the second choice is less than half as likely, so that the order of a sum never decides.
ALPHABET = "The alphabet: A, B, C, D,"
EVEN_NUMBERS = "2, 4, 6, 8,"
# Answered with "The capital of France is Paris." and the end of the turn.
QUESTION = [{"role": "user", "content": "Answer with one word: What is the capital of France?"}]
LONG: dict[str, Any] = {"max_new_tokens": 900, "ignore_eos_token": True}


def ids_of(answer: Generation) -> list[int]:
    """The generated token ids; the request must have asked for details."""
    assert answer.details is not None
    return [token["id"] for token in answer.details["tokens"]]


def tokens_of(chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """TGI's token records of a stream, joined."""
    return [token for chunk in chunks if chunk.details is not None for token in chunk.details["tokens"]]


def assert_refused(client: Client, *said: object, prompt: str = ALPHABET, stream: bool = False, **asked: Any) -> None:
    """The request is TGI's 422 `validation`, with `said` in the text. A stream's only response is this error too.

    A Triton stream carries a model's error as text, whose prefix tells the kind; the code is dropped (and HTTP answers
    400 to every code). The metadata `triton_grpc_error` would bring it, but may end Triton 2.51 (docs/serving.md).
    """
    call = client.stream(prompt, **asked) if stream else None
    error = error_of(lambda: list(call) if call is not None else client.generate(prompt, **asked))
    assert type(error) is ValidationError, (asked, error)
    assert str(error).startswith("Input validation error: ")
    for part in said:
        assert str(part) in str(error), (part, str(error))


def together(*calls: Callable[[], Result]) -> list[Result]:
    """Results of calls that run at the same time, in order."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    """Poll until it holds; fails with `what` when it never does."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        threading.Event().wait(0.02)


def wait_until_idle(server: RunningServer) -> None:
    """Until nothing runs and nothing waits, as the gauges say (which follow the engine by up to 0.2 s)."""
    for gauge in ("tgi_batch_current_size", "tgi_queue_size"):
        wait_until(lambda name=gauge: server.metric(name) == 0, f"{gauge} is 0")  # type: ignore[misc]


@contextlib.contextmanager
def long_requests(client: Client, count: int) -> Iterator[None]:
    """`count` different long requests, all of them generating while the block runs."""
    streams = [client.stream(f"Story number {index}, about the letter", **LONG) for index in range(count)]
    try:
        for stream in streams:
            next(stream)
        yield
    finally:
        for stream in streams:
            stream.close()


@contextlib.contextmanager
def coming_and_going(client: Client, workers: int) -> Iterator[None]:
    """Requests of unlike kinds that join the batch and leave it, some by hanging up, while the block runs."""
    stopping = threading.Event()
    kinds: list[dict[str, Any]] = [
        {"max_new_tokens": 3},
        {"max_new_tokens": 5, "temperature": 1.3, "seed": 1},
        {"max_new_tokens": 900, "ignore_eos_token": True},  # left after its second chunk
        {"max_new_tokens": 4, "top_k": 5, "repetition_penalty": 1.5},
        {"max_new_tokens": 7, "top_p": 0.5, "frequency_penalty": 1.0, "watermark": True},
    ]

    def one_after_another(worker: int) -> int:
        number = 0
        while not stopping.is_set():
            kind = kinds[(worker + number) % len(kinds)]
            with client.stream(f"Note {worker}.{number} of the diary says that", **kind) as stream:
                for position, _ in enumerate(stream):
                    if position == 1 and "ignore_eos_token" in kind:
                        break
            number += 1
        return number

    with ThreadPoolExecutor(workers) as threads:
        running = [threads.submit(one_after_another, worker) for worker in range(workers)]
        try:
            yield
        finally:
            stopping.set()
    assert sum(future.result() for future in running) > workers


def error_of(call: Callable[[], object]) -> TextgenError | None:
    """The client's error of a call; None when it succeeded."""
    try:
        call()
    except TextgenError as error:
        return error
    return None
