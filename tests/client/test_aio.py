"""The asyncio client against a scripted server: what differs from the synchronous one."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from textgen_client import (
    AsyncClient,
    GenerationError,
    OverloadedError,
    RequestCancelled,
    RequestTimeout,
    ServerUnavailable,
    ValidationError,
)
from textgen_client.aio import AsyncStream

from .fake_triton import Call, FakeTriton, endless, flag_of, last_word, response


async def _left(triton: FakeTriton) -> bool:
    return await asyncio.to_thread(triton.calls[-1].left.wait, 5)


def test_stream_equals_generate(triton: FakeTriton) -> None:
    async def main() -> None:
        async with AsyncClient(triton.url) as client:
            whole = await client.generate("a é 🦙")
            assert "".join([chunk.text async for chunk in client.stream("a é 🦙")]) == whole.text == "a é 🦙"
            many = await asyncio.gather(*(client.generate(f"prompt {n}") for n in range(50)))
            assert [answer.text for answer in many] == [f"prompt {n}" for n in range(50)]

    asyncio.run(main())


def test_after_the_last_response_nothing_is_cancelled(triton: FakeTriton) -> None:
    triton.script, left = last_word(text_output="all")

    async def main() -> None:
        async with AsyncClient(triton.url) as client:
            async for _ in client.stream("collected"):
                break
            async with client.stream("with") as stream:
                await anext(stream)
            triton.script, left_after_error = last_word(error="Input validation error: no")
            with pytest.raises(ValidationError):
                await client.generate("refused")
            while len(left) + len(left_after_error) < 3:
                await asyncio.sleep(0.01)
            assert left + left_after_error == [False] * 3

    asyncio.run(main())


def test_every_way_of_leaving_cancels(triton: FakeTriton) -> None:
    triton.script = endless

    async def main() -> None:
        async with AsyncClient(triton.url) as client:
            async for _ in client.stream("break"):
                break
            assert await _left(triton)

            async with client.stream("with") as stream:
                await anext(stream)
            assert await _left(triton)
            with pytest.raises(RequestCancelled):
                await anext(stream)

            stream = client.stream("collected in another thread")
            await anext(stream)
            box = [stream]
            del stream
            await asyncio.to_thread(box.clear)
            await asyncio.to_thread(gc.collect)
            assert await _left(triton)

            task = asyncio.create_task(client.generate("a cancelled task"))
            while len(triton.calls) < 4:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await _left(triton)

            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.generate("wait_for"), 0.3)
            assert await _left(triton)

    asyncio.run(main())


def test_aclose_in_another_task_wakes_the_reader(triton: FakeTriton) -> None:
    triton.script = endless

    async def main() -> None:
        async with AsyncClient(triton.url) as client:
            stream = client.stream("hi")
            await anext(stream)
            waiting = asyncio.create_task(stream.__anext__())
            await asyncio.sleep(0.05)
            await stream.aclose()
            with pytest.raises(RequestCancelled):
                await waiting
            assert [chunk async for chunk in stream] == []

    asyncio.run(main())


def test_errors(triton: FakeTriton, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textgen_client.channel.DEADLINE_GRACE_S", 0.1)

    def dies(request: Any, call: Call) -> Iterator[Any]:
        yield response(text_output="a")
        yield response(error="Request failed during generation: it died")
        call.left.wait(30)

    async def main() -> None:
        async with AsyncClient(triton.url) as client:
            triton.script = dies
            stream = client.stream("hi")
            assert (await anext(stream)).text == "a"
            with pytest.raises(GenerationError, match="it died"):
                await anext(stream)
            assert await _left(triton)

            triton.script = lambda request, call: iter([response(text_output="a")])
            with pytest.raises(GenerationError, match="before its final response"):
                await client.generate("hi")

            triton.script = endless
            with pytest.raises(RequestTimeout):
                await client.generate("hi", timeout=0.2)
            with pytest.raises(ValidationError):
                client.stream("\ud800")
        with pytest.raises(ServerUnavailable, match="closed"):
            await client.generate("hi")
        async with AsyncClient(f"127.0.0.1:{free_port}") as nobody:
            with pytest.raises(ServerUnavailable, match=str(free_port)):
                await nobody.generate("hi")
            assert not (await nobody.health()).ok

    asyncio.run(main())


def test_cancel_models_health(triton: FakeTriton) -> None:
    async def main() -> None:
        async with AsyncClient(triton.url) as client:
            assert (await client.health()).ok
            assert [model.name for model in await client.models()] == ["textgen", "broken"]
            triton.script = lambda request, call: iter([response(final=True)])
            await client.cancel("theirs")
            assert flag_of(triton.calls[-1].request, "cancel") is True

    asyncio.run(main())


def test_a_client_belongs_to_one_loop(triton: FakeTriton) -> None:
    client = AsyncClient(triton.url)
    assert asyncio.run(client.generate("hi")).text == "hi"
    with pytest.raises(RuntimeError, match="event loop"):
        asyncio.run(client.generate("hi"))


def test_a_stream_closed_just_before_its_error_is_read_still_raises_the_error() -> None:
    class ClosedMeanwhile:
        """A call that `aclose` in another task has cancelled when its last response lay ready."""

        def __init__(self) -> None:
            self._left = [response(final=True, error="Model is overloaded: 64 requests are live")]

        async def read(self) -> Any:
            if self._left:
                return self._left.pop()
            raise asyncio.CancelledError

        def cancelled(self) -> bool:
            return True

    async def main() -> None:
        await anext(AsyncStream(ClosedMeanwhile(), "id", "url"))

    with pytest.raises(OverloadedError):
        asyncio.run(main())
