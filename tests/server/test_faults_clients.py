"""Clients that misbehave, and a cache that is too small: eight live streams do not notice."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .faults import (
    LASTING,
    NUM_STREAMS,
    OPTIONS,
    FaultRecord,
    ask_briefly,
    assert_one_final_flag_each,
    endings_of,
    live_streams,
    seconds_until_answered,
)
from .wire import wait_until, wait_until_idle

if TYPE_CHECKING:
    from ..running_server import StartServer
    from .conftest import Connect
    from .wire import Wire


@pytest.fixture(scope="module")
def patient_server(lasting_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = OPTIONS | {"MODEL_ID": str(lasting_model)}
    running = RunningServer(tmp_path_factory.mktemp("patient_server"), SERVER_ENVIRONMENT | options)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture
def patient(patient_server: RunningServer, connect: Connect) -> Wire:
    wait_until_idle(patient_server)
    return connect(patient_server)


def test_connects_and_disconnects(patient: Wire, pytestconfig: pytest.Config, fault_record: FaultRecord) -> None:
    """Every way to come and go: a bare connection, half a request, a channel, a stream that is cancelled at once."""
    num = 10_000 if pytestconfig.getoption("--faults") else 1_000
    server = patient.server
    triton = psutil.Process(server.pid("tritonserver"))
    ports = [int(url.rsplit(":", 1)[1]) for url in (server.grpc_url, server.http_url)]
    ask_briefly(patient)
    descriptors, memory = triton.num_fds(), triton.memory_info().rss

    def come_and_go(index: int) -> None:
        way = index % 10
        if way == 0:
            with grpc.insecure_channel(server.grpc_url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                assert stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=60).live
        elif way == 1:
            patient.open(input_ids=[5, 6, 7], stream=True, sampling_parameters={"max_new_tokens": 50}).cancel()
        else:
            with socket.create_connection(("127.0.0.1", ports[way % 2]), timeout=60) as connection:
                if way > 5:
                    connection.send(b"POST /v2/models/textgen/generate HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")

    streams = live_streams(patient, max_new_tokens=2000)
    begun_s = time.monotonic()
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(come_and_go, range(num)))
    elapsed_s = time.monotonic() - begun_s
    recovered_s = seconds_until_answered(patient, time.monotonic())
    outcomes = streams.outcomes(120)
    assert endings_of(outcomes) == {"complete"}
    assert_one_final_flag_each(outcomes)
    wait_until_idle(server)
    wait_until(lambda: triton.num_fds() <= descriptors + 16, "descriptors are given back")
    assert triton.memory_info().rss - memory < 100 << 20
    fault_record.note(
        "connects and disconnects",
        clients_see=f"nothing ({num:,} within {elapsed_s:.0f} s, while the streams ran)",
        told_after_s=None,
        recovered_after_s=recovered_s,
    )


def test_slow_readers(patient: Wire, fault_record: FaultRecord) -> None:
    """Eight that read nothing hold neither their slots nor the other eight; what waits for them is bounded."""
    triton = psutil.Process(patient.server.pid("tritonserver"))
    sampling = LASTING | {"max_new_tokens": 800}
    memory = triton.memory_info().rss
    slow = [
        patient.open(input_ids=[20 + index, 65, 66], stream=True, sampling_parameters=sampling)
        for index in range(NUM_STREAMS)
    ]
    for call in slow:
        next(call)
    outcomes = live_streams(patient, max_new_tokens=400).outcomes()
    assert endings_of(outcomes) == {"complete"}
    begun_s = time.monotonic()
    wait_until_idle(patient.server)
    assert seconds_until_answered(patient, begun_s) < 60
    assert triton.memory_info().rss - memory < 64 << 20
    late = [patient.rest_soon(call).result() for call in slow]
    assert endings_of(late) == {"complete"}
    assert_one_final_flag_each(late)
    fault_record.note(
        "slow readers", clients_see="nothing; theirs waits for them", told_after_s=None, recovered_after_s=None
    )


@pytest.mark.faults
def test_more_sequences_than_the_cache_holds(
    start_server: StartServer, connect: Connect, lasting_model: Path, fault_record: FaultRecord
) -> None:
    """They take turns, and each gets the text it would have had alone."""
    options = {"MAX_TOTAL_TOKENS": "800", "MAX_INPUT_TOKENS": "400", "MAX_BATCH_TOTAL_TOKENS": "1600"}
    server = start_server(MODEL_ID=str(lasting_model), TEXTGEN_BATCH_INVARIANT="true", **options)
    wire = connect(server)
    sampling = LASTING | {"max_new_tokens": 500}
    requests: list[dict[str, Any]] = [
        {"input_ids": [20 + index, 67, 68], "stream": True, "sampling_parameters": sampling}
        for index in range(NUM_STREAMS)
    ]
    alone = [wire.ask(**request).text for request in requests[:2]]
    streams = [wire.ask_soon(**request) for request in requests]
    outcomes = [stream.result() for stream in streams]
    assert endings_of(outcomes) == {"complete"}
    assert_one_final_flag_each(outcomes)
    assert [outcome.text for outcome in outcomes[:2]] == alone
    preemptions = server.metric("tgi_preemptions")
    assert preemptions > 0
    wait_until_idle(server)
    fault_record.note(
        "KV cache full",
        clients_see="pauses; the same text as alone",
        told_after_s=None,
        recovered_after_s=None,
    )
