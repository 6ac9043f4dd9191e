"""What docs/security.md promises: who may do what on the ports, and that nothing calls home."""

from __future__ import annotations

import ipaddress
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from textgen_client import Client
from textgen_serve.control import ControlError, ModelControl

if TYPE_CHECKING:
    from ..running_server import RunningServer

KEY = "triton-grpc-protocol-admin-key"

# name -> what is asked of a stub over gRPC
ADMINISTRATIVE: dict[str, Callable[[Any, Any], Any]] = {
    "load": lambda s, m: s.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name="tokenizer"), **m),
    "unload": lambda s, m: s.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="nobody"), **m),
    "index": lambda s, m: s.RepositoryIndex(service_pb2.RepositoryIndexRequest(), **m),
    "shared memory": lambda s, m: s.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest(), **m),
    "register": lambda s, m: s.SystemSharedMemoryRegister(
        service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=1), **m
    ),
    "trace": lambda s, m: s.TraceSetting(service_pb2.TraceSettingRequest(), **m),
    "logging": lambda s, m: s.LogSettings(service_pb2.LogSettingsRequest(), **m),
}
OPEN: dict[str, Callable[[Any], Any]] = {
    "live": lambda s: s.ServerLive(service_pb2.ServerLiveRequest()),
    "ready": lambda s: s.ServerReady(service_pb2.ServerReadyRequest()),
    "model ready": lambda s: s.ModelReady(service_pb2.ModelReadyRequest(name="textgen")),
    "server metadata": lambda s: s.ServerMetadata(service_pb2.ServerMetadataRequest()),
    "model metadata": lambda s: s.ModelMetadata(service_pb2.ModelMetadataRequest(name="textgen")),
    "configuration": lambda s: s.ModelConfig(service_pb2.ModelConfigRequest(name="textgen")),
    "statistics": lambda s: s.ModelStatistics(service_pb2.ModelStatisticsRequest(name="textgen")),
}


@pytest.fixture
def stub(server: RunningServer) -> Any:
    with grpc.insecure_channel(server.grpc_url) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.mark.parametrize("name", ADMINISTRATIVE)
def test_administrative_calls_over_grpc_need_the_key(stub: Any, name: str) -> None:
    for metadata in ((), ((KEY, "guess"),), ((KEY, ""),)):
        with pytest.raises(grpc.RpcError) as refused:
            ADMINISTRATIVE[name](stub, {"metadata": metadata, "timeout": 10})
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "restricted" in refused.value.details()


@pytest.mark.parametrize("name", ["index", "shared memory", "trace", "logging"])
def test_with_the_key_they_are_answered(server: RunningServer, stub: Any, name: str) -> None:
    ADMINISTRATIVE[name](stub, {"metadata": ((KEY, server.admin_key),), "timeout": 10})


@pytest.mark.parametrize("name", OPEN)
def test_what_clients_and_monitoring_ask_is_open(stub: Any, name: str) -> None:
    OPEN[name](stub)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "repository/index"),
        ("POST", "repository/models/textgen/load"),
        ("POST", "repository/models/textgen/unload"),
        ("GET", "systemsharedmemory/status"),
        ("POST", "systemsharedmemory/region/x/register"),
        ("GET", "cudasharedmemory/status"),
        ("GET", "trace/setting"),
        ("POST", "trace/setting"),
        ("GET", "logging"),
        ("POST", "logging"),
    ],
)
def test_administrative_calls_over_http_need_the_key(server: RunningServer, method: str, path: str) -> None:
    body = b"{}" if method == "POST" else None
    for headers in ({}, {"admin-key": "guess"}):
        request = urllib.request.Request(f"{server.http_url}/v2/{path}", body, headers, method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == 403


def test_inference_metrics_and_the_key_of_the_ready_file(server: RunningServer) -> None:
    with Client(server.grpc_url) as client:
        assert client.health(timeout=30).ok
    assert server.metric("tgi_engine_ready") == 1
    host, port = server.http_url.removeprefix("http://").split(":")
    assert {entry.name for entry in ModelControl(host, int(port), server.admin_key).index()} >= {"textgen", "tokenizer"}
    with pytest.raises(ControlError):
        ModelControl(host, int(port), "guess").index()
    assert len(server.admin_key) >= 32, "too short to be safe from guessing"


def test_nothing_calls_home(server: RunningServer) -> None:
    """Libraries are told not to, and no process has a connection to anywhere but this machine."""
    for role in ("textgen", "tokenizer", "engine"):
        for pid in server.pids[role]:
            environment = psutil.Process(pid).environ()
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
                assert environment.get(name) == "1", (role, name)
    for pids in server.pids.values():
        for pid in pids:
            for connection in psutil.Process(pid).net_connections("inet"):
                assert not connection.raddr or ipaddress.ip_address(connection.raddr.ip).is_loopback, connection
