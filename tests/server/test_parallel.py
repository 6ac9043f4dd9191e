"""NUM_SHARD=2 through the real server: the real model streams, a rank is killed, and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .leftovers import Holdings, is_alive
from .wire import wait_until

if TYPE_CHECKING:
    from .conftest import Connect
    from .wire import Call

NUM_STREAMS = 8
NUM_NEW_TOKENS = 24
GREEDY: dict[str, Any] = {
    "text_input": "The capital of France is",
    "sampling_parameters": {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False},
}


@pytest.fixture(scope="module")
def split_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = {"MODEL_ID": str(model_dir), "NUM_SHARD": "2", "MAX_BATCH_SIZE": "8", "MAX_BATCH_TOTAL_TOKENS": "8192"}
    # In a session of its own, as a shell starts a command: Ctrl-C then reaches all that is in its foreground.
    running = RunningServer(tmp_path_factory.mktemp("split_server"), SERVER_ENVIRONMENT | options, prefix=("setsid",))
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> str:
    """What transformers' own `generate` says, on one device."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompt = tokenizer(GREEDY["text_input"], return_tensors="pt")
    with torch.inference_mode():
        whole = model.generate(**prompt, do_sample=False, max_new_tokens=NUM_NEW_TOKENS)
    text: str = tokenizer.decode(whole[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def _story(index: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": 900, "ignore_eos_token": True}
    return {"text_input": f"Story {index}: once", "stream": True, "sampling_parameters": sampling}


def _listeners(pids: list[int]) -> set[tuple[str, int]]:
    """Addresses and ports the processes listen on."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for pid in pids
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_two_ranks_stream_what_one_does(split_server: RunningServer, expected: str, connect: Connect) -> None:
    """The real model: three groups of heads, so two on one rank and one on the other."""
    split = connect(split_server)
    assert len(split_server.pids["rank"]) == 1
    assert split.ask(**GREEDY).text == expected
    streamed = split.ask(stream=True, **GREEDY)
    assert streamed.text == expected
    assert len(streamed.responses) > 10
    listeners = _listeners([split_server.pid("engine"), split_server.pid("rank")])
    assert {address for address, _ in listeners} == {"127.0.0.1"}, "nobody else can reach the ranks"


def test_a_killed_rank_costs_what_had_started_and_nothing_else(split_server: RunningServer, connect: Connect) -> None:
    split = connect(split_server)
    before = split.ask(**GREEDY).text
    running: list[Call] = [split.open(**_story(index)) for index in range(NUM_STREAMS)]
    for call in running:
        next(call)
    queued = [split.ask_soon(**GREEDY) for _ in range(2)]
    wait_until(lambda: split_server.metric("tgi_queue_size") == 2, "two wait")
    engine, rank = split_server.pid("engine"), split_server.pid("rank")
    killed_s = time.monotonic()
    os.kill(rank, signal.SIGKILL)
    for ending in [split.rest_soon(call) for call in running]:
        outcome = ending.result()
        assert outcome.ended_s - killed_s < 5.0
        reason = "the engine lost rank 1 of 2, which was killed by SIGKILL"
        assert outcome.errors == [f"Request failed during generation: {reason}"]
        finals = [response.final for response in outcome.responses]
        assert finals == [False] * (len(finals) - 1) + [True]
    assert [waiting.result().text for waiting in queued] == [before] * 2, "kept, and served by the next group"
    wait_until(lambda: split_server.metric("tgi_engine_restarts") == 1, "the restart is counted")
    assert not psutil.pid_exists(engine)
    assert split_server.pid("rank") != rank


def test_nothing_is_left_behind(split_server: RunningServer) -> None:
    """SIGKILL of the stub, then Ctrl-C while the server starts again; test_faults_ranks.py has more of this."""
    held = Holdings().note(split_server.launcher.pid)
    assert len(held.ports) >= 5, "Triton's three, and those that the ranks meet at"
    ranks = [psutil.Process(split_server.pid(role)) for role in ("engine", "rank")]
    os.kill(split_server.pid("textgen"), signal.SIGKILL)
    wait_until(lambda: not any(is_alive(process) for process in ranks), "the engine and its ranks ended")
    held.note(split_server.launcher.pid)
    os.killpg(split_server.launcher.pid, signal.SIGINT)
    assert split_server.launcher.wait(60) == 0
    held.wait_until_free()
