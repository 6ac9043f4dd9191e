"""The engine is killed: who is told what, what is kept, and that everything is there again without anybody's help."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .wire import wait_until, wait_until_idle

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Connect
    from .wire import Call, Wire

NUM_SLOTS = 8
SAMPLED = {
    "text_input": "It was a dark night and",
    "sampling_parameters": {"max_new_tokens": 12, "seed": 9, "top_p": 0.9},
}


@pytest.fixture(scope="module")
def fragile_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose engine may be killed: by two tests, then it is given up."""
    options = {
        "MODEL_ID": str(model_dir),
        "MAX_BATCH_SIZE": str(NUM_SLOTS),
        "MAX_BATCH_TOTAL_TOKENS": "8192",
        "TEXTGEN_MAX_ENGINE_RESTARTS": "1",
    }
    running = RunningServer(tmp_path_factory.mktemp("fragile_server"), SERVER_ENVIRONMENT | options)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


def _story(index: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": 900, "ignore_eos_token": True}
    return {"text_input": f"Story {index}: once", "stream": True, "sampling_parameters": sampling}


def test_a_killed_engine_costs_what_had_started_and_nothing_else(
    fragile_server: RunningServer, wire: Wire, connect: Connect
) -> None:
    fragile = connect(fragile_server)
    alone = fragile.ask(**SAMPLED).text
    assert alone == wire.ask(**SAMPLED).text, "two servers differ"
    running: list[Call] = [fragile.open(**_story(index)) for index in range(NUM_SLOTS)]
    for call in running:
        next(call)
    queued = [fragile.ask_soon(**SAMPLED, request_id=f"queued-{index}") for index in range(4)]
    wait_until(lambda: fragile_server.metric("tgi_queue_size") == 4, "four wait")
    failures = fragile_server.metric("tgi_request_failure", err="generation")
    stub = fragile_server.pid("textgen")

    killed_s = time.monotonic()
    os.kill(fragile_server.pid("engine"), signal.SIGKILL)

    for ending in [fragile.rest_soon(call) for call in running]:
        outcome = ending.result()
        assert outcome.ended_s - killed_s < 2.0
        assert outcome.errors == ["Request failed during generation: the engine was killed"]
        finals = [response.final for response in outcome.responses]
        assert finals == [False] * (len(finals) - 1) + [True]

    # While there is no engine: seen by the metric; newcomers wait for the next engine, and can give up.
    wait_until(lambda: fragile_server.metric("tgi_engine_ready") == 0, "shown as not ready")
    newcomer = fragile.ask_soon(**SAMPLED)
    assert fragile.error_of(**SAMPLED, parameters={"timeout": 300_000}).startswith("Request timeout: ")
    leaving = fragile.ask_soon(**SAMPLED, request_id="leaving")
    wait_until(lambda: fragile.ask(request_id="leaving", cancel=True).errors == [], "found by its id")
    [error] = leaving.result().errors
    assert error.startswith("Request cancelled: ")

    outcomes = [waiting.result() for waiting in [*queued, newcomer]]
    assert [outcome.errors for outcome in outcomes] == [[]] * 5
    assert [outcome.text for outcome in outcomes] == [alone] * 5, "a seed gives the same text after a restart"
    wait_until(lambda: fragile_server.metric("tgi_engine_ready") == 1, "shown as ready")
    wait_until(lambda: fragile_server.metric("tgi_engine_restarts") == 1, "the restart is counted")
    wait_until(
        lambda: fragile_server.metric("tgi_request_failure", err="generation") == failures + NUM_SLOTS, "failures, too"
    )
    assert fragile_server.pid("textgen") == stub
    assert fragile_server.pid("engine")
    assert fragile.ask(**SAMPLED).text == alone
    wait_until_idle(fragile_server)


def test_an_engine_that_keeps_dying_is_given_up(fragile_server: RunningServer, connect: Connect) -> None:
    fragile = connect(fragile_server)
    running = fragile.ask_soon(**_story(0))
    wait_until(lambda: fragile_server.metric("tgi_batch_current_size") == 1, "running")

    def refusal() -> str:
        """Kill the engine, if there is one, until requests are refused."""
        for pid in fragile_server.pids.get("engine", []):
            os.kill(pid, signal.SIGKILL)
        errors = fragile.ask(text_input="Hi", sampling_parameters={"max_new_tokens": 1}).errors
        return errors[0] if errors else ""

    wait_until(lambda: refusal().startswith("Model is not ready: "), "given up")
    assert running.result().errors == ["Request failed during generation: the engine was killed"]
    wait_until(lambda: fragile_server.metric("tgi_engine_ready") == 0, "shown as not ready")
    assert fragile.post({"text_input": "Hi"})[0] == 400
