"""scripts/serve.py against a real tritonserver: ready means usable, stopped means gone, failed means one line.

Most tests use a toy model, which loads in a moment; what is tested here is the launcher.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import trustme

from textgen_client import Client, ServerUnavailable, Tls
from textgen_serve import checkpoint, processes
from textgen_serve.errors import ServeError

if TYPE_CHECKING:
    from .conftest import RunningServer

SERVE = Path(__file__).resolve().parents[2] / "scripts" / "serve.py"
SHARED_MEMORY = Path("/dev/shm")
FREE_PORTS = ["--http-port=0", "--grpc-port=0", "--metrics-port=0", "--no-gateway"]

StartToy = Callable[..., "RunningServer"]


@pytest.fixture
def start_toy(start_server: Callable[..., Any], toy_repository: Path, tiny_checkpoint: Path) -> StartToy:
    """Starts the launcher on the toy repository."""

    def start(*arguments: str, **environment: str) -> RunningServer:
        running: RunningServer = start_server(
            "--model-repository", str(toy_repository), *arguments, **{"MODEL_ID": str(tiny_checkpoint)} | environment
        )
        return running

    return start


@pytest.fixture
def no_leftovers() -> Iterator[None]:
    """Fails the test when a server's process or shared memory region outlives it."""
    before = _regions()
    mark = f"leftovers-{time.monotonic_ns()}"
    os.environ["TEST_MARK"] = mark
    yield
    del os.environ["TEST_MARK"]
    survivors = [process for process in psutil.process_iter() if _environment(process).get("TEST_MARK") == mark]
    assert survivors == []
    assert [name for name in _regions() - before if not _belongs_to_a_live_server(name)] == []


def _regions() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob("triton-textgen-*")}


def _belongs_to_a_live_server(region: str) -> bool:
    """Whether somebody holds the lock of the region's server: another test run on this machine."""
    try:
        with (SHARED_MEMORY / f"{region[: len('triton-textgen-') + 13]}.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.pid != os.getpid() else {}
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return {}


def _generate(running: RunningServer, **body: Any) -> list[dict[str, Any]]:
    """All events of one streamed request."""
    request = urllib.request.Request(
        f"{running.http_url}/v2/models/textgen/generate_stream", json.dumps(body).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return [json.loads(line.removeprefix(b"data:")) for line in response if line.startswith(b"data:")]


# ---- ready ----------------------------------------------------------------------------------------------------------


def test_ready_file_tells_ports_and_processes_and_the_first_request_succeeds(start_toy: StartToy) -> None:
    running = start_toy(TOY_LOAD_S="0.5")
    assert len(_generate(running, text_input="x", stream=True)) == 10
    ready = json.loads(running.ready_file.read_text())
    ports = {"http_port", "grpc_port", "metrics_port", "gateway_port"}
    assert ready.keys() == ports | {"pids", "restricted_api_key"}
    assert running.ready_file.stat().st_mode & 0o077 == 0, "others could read the key"
    assert ready["gateway_port"] is None
    assert ready["pids"].keys() == {"tritonserver", "textgen", "engine"}
    assert ready["pids"] == running.pids
    assert all(psutil.pid_exists(pid) for pids in ready["pids"].values() for pid in pids)
    assert running.metric("nv_inference_request_success", model="textgen") >= 1


def test_the_gateway_is_started_announced_and_drained_with_the_rest(start_toy: StartToy, no_leftovers: None) -> None:
    running = start_toy("--gateway-port", "0", TOY_TOKEN_S="0.1")
    assert running.gateway_url is not None
    assert running.gateway_url in running.output.read_text()
    (gateway,) = json.loads(running.ready_file.read_text())["pids"]["gateway"]
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{running.gateway_url}/v1/completions", body, headers, method="POST")
    with urllib.request.urlopen(request, timeout=30) as stream:
        first = stream.readline()
        running.launcher.send_signal(signal.SIGTERM)
        assert (first + stream.read()).count(b'"text":"toy "') == 10
    assert running.launcher.wait(60) == 0
    assert not psutil.pid_exists(gateway)


def test_a_gateway_that_dies_ends_the_server(start_toy: StartToy, no_leftovers: None) -> None:
    running = start_toy("--gateway-port", "0")
    os.kill(json.loads(running.ready_file.read_text())["pids"]["gateway"][0], signal.SIGKILL)
    assert running.launcher.wait(60) == 1
    assert "the gateway ended" in running.output.read_text()


def test_output_names_the_endpoints(start_toy: StartToy) -> None:
    running = start_toy(TOY_LOAD_S="0.5")
    output = running.output.read_text()
    assert running.http_url in output
    assert running.grpc_url in output
    assert running.metrics_url in output
    assert "loading the toy" in output  # a stage, read from the server's log
    assert "\x1b" not in output  # no colours and no spinner outside a terminal


def test_flags_reach_the_models_as_variables(start_toy: StartToy) -> None:
    running = start_toy("--max-input-tokens", "77", "--no-prefix-caching", "--block-size", "32")
    environment = psutil.Process(running.pid("textgen")).environ()
    assert environment["MAX_INPUT_TOKENS"] == "77"
    assert environment["PREFIX_CACHING"] == "false"
    assert environment["TEXTGEN_BLOCK_SIZE"] == "32"


def test_demonstration_streams_an_answer(start_toy: StartToy) -> None:
    running = start_toy("--demo")
    _wait_for(lambda: "Ctrl-C stops" in running.output.read_text())
    assert "toy toy toy" in running.output.read_text()


def test_administrative_calls_need_the_key_that_was_given(start_toy: StartToy) -> None:
    running = start_toy("--restricted-api-key", "secret")
    index = f"{running.http_url}/v2/repository/index"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(index, method="POST"), timeout=10)
    allowed = urllib.request.Request(index, method="POST", headers={"admin-key": "secret"})
    with urllib.request.urlopen(allowed, timeout=10) as response:
        assert json.load(response)[0]["name"] == "textgen"


# ---- stop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_leaves_nothing_and_exits_with_0(start_toy: StartToy, no_leftovers: None, number: signal.Signals) -> None:
    running = start_toy()
    assert running.stop(number) == 0
    assert not running.ready_file.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_during_load(start_toy: StartToy, no_leftovers: None, number: signal.Signals) -> None:
    running = start_toy(wait=False, TOY_LOAD_S="60")
    _wait_for(lambda: "loading the toy" in running.output.read_text())
    started = time.monotonic()
    assert running.stop(number) == 0
    assert time.monotonic() - started < 30
    assert not running.ready_file.exists()


def test_stop_before_the_server_exists(start_toy: StartToy, no_leftovers: None) -> None:
    running = start_toy(wait=False)
    time.sleep(0.05)
    assert running.stop(signal.SIGTERM) in (0, -signal.SIGTERM)  # the latter: before Python had read our first line


def test_running_requests_finish_before_the_server_stops(start_toy: StartToy, no_leftovers: None) -> None:
    running = start_toy(TOY_TOKEN_S="0.2")
    events: list[dict[str, Any]] = []
    client = threading.Thread(target=lambda: events.extend(_generate(running, text_input="x", stream=True)))
    client.start()
    _wait_for(lambda: running.metric("nv_inference_exec_count", model="textgen") >= 2)
    assert running.stop() == 0
    client.join()
    assert [event["text_output"] for event in events] == ["toy "] * 10


def test_second_signal_stops_at_once(start_toy: StartToy, no_leftovers: None) -> None:
    running = start_toy(TOY_TOKEN_S="5")
    client = threading.Thread(target=_generate_until_cut, args=(running,))
    client.start()
    _wait_for(lambda: running.metric("nv_inference_exec_count", model="textgen") >= 2)
    running.launcher.send_signal(signal.SIGINT)
    _wait_for(lambda: "stopping" in running.output.read_text())
    started = time.monotonic()
    assert running.stop(signal.SIGINT) == 0
    assert time.monotonic() - started < 5
    client.join()


def _generate_until_cut(running: RunningServer) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        _generate(running, text_input="x", stream=True)


def test_a_killed_launcher_takes_its_server_along(start_toy: StartToy) -> None:
    running = start_toy()
    server = psutil.Process(running.pid("tritonserver"))
    running.stop(signal.SIGKILL)
    server.wait(30)


def test_regions_of_servers_killed_with_their_launcher_are_cleaned_by_the_next(start_toy: StartToy) -> None:
    before = _regions()
    running = start_toy()
    tree = psutil.Process(running.launcher.pid).children(recursive=True)
    running.launcher.kill()
    for process in tree:
        process.kill()
    psutil.wait_procs(tree, timeout=10)
    abandoned = _regions() - before
    assert abandoned
    other = start_toy()
    assert not abandoned & _regions()
    assert _regions() - before  # its own are in use, and stay
    assert other.stop() == 0


# ---- failure: one line, a status, no traceback ----------------------------------------------------------------------


def _expect_failure(arguments: list[str], reason: str, **environment: str) -> str:
    """Run the launcher to its end; returns the one line it wrote to stderr."""
    ended = subprocess.run(
        [sys.executable, str(SERVE), "--no-demo", *FREE_PORTS, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = ended.stderr.splitlines()
    assert ended.returncode != 0
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ")
    assert reason in lines[0]
    return lines[0]


def test_missing_folder(tmp_path: Path, no_leftovers: None) -> None:
    line = _expect_failure(["--model-id", str(tmp_path / "absent")], "there is no folder")
    assert str(tmp_path / "absent") in line


def test_folder_without_config(tmp_path: Path) -> None:
    _expect_failure(["--model-id", str(tmp_path)], "no config.json")


def test_folder_without_weights(tiny_checkpoint: Path) -> None:
    (tiny_checkpoint / "model.safetensors").unlink()
    _expect_failure([], "no *.safetensors", MODEL_ID=str(tiny_checkpoint))


def test_folder_without_tokenizer(tiny_checkpoint: Path) -> None:
    (tiny_checkpoint / "tokenizer.json").unlink()
    _expect_failure(["--model-id", str(tiny_checkpoint)], "no tokenizer")


def test_broken_config(tiny_checkpoint: Path) -> None:
    (tiny_checkpoint / "config.json").write_text('{"model_type": ')
    _expect_failure(["--model-id", str(tiny_checkpoint)], "config.json cannot be read")


def test_missing_shard(tiny_checkpoint: Path) -> None:
    index = {"weight_map": {"weight": "model.safetensors", "other": "model-00002-of-00002.safetensors"}}
    (tiny_checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    _expect_failure(["--model-id", str(tiny_checkpoint)], "lacks 1 of 2 weight files: model-00002-of-00002.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_cut_weights(tiny_checkpoint: Path, keep: int) -> None:
    weights = tiny_checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    _expect_failure(["--model-id", str(tiny_checkpoint)], "model.safetensors is damaged or incomplete")


def test_weights_beyond_memory(tiny_checkpoint: Path) -> None:
    _write_sparse_weights(tiny_checkpoint / "model.safetensors", num_bytes=4 << 40)
    _expect_failure(["--model-id", str(tiny_checkpoint)], "not enough memory: the weights")


def test_memory_is_counted_in_the_type_that_is_loaded(tiny_checkpoint: Path) -> None:
    found = checkpoint.inspect(str(tiny_checkpoint))
    assert found.num_elements == 32
    assert found.bytes_in_memory("float32") == 128
    assert found.bytes_in_memory("bfloat16") == 64
    checkpoint.check_memory(found, "float32", available_bytes=128)
    with pytest.raises(ServeError, match="not enough memory"):
        checkpoint.check_memory(found, "float32", available_bytes=127)


def _write_sparse_weights(path: Path, num_bytes: int) -> None:
    """A well-formed file whose size is only claimed: nothing of it lies on the disk."""
    header = json.dumps(
        {"weight": {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}
    ).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + num_bytes)


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port"])
def test_port_in_use(tiny_checkpoint: Path, flag: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        line = _expect_failure(
            ["--model-id", str(tiny_checkpoint), "--host", "127.0.0.1", flag, str(port)], "Address already in use"
        )
    assert f"{flag}: cannot listen on 127.0.0.1:{port}" in line


def test_option_out_of_range(tiny_checkpoint: Path) -> None:
    _expect_failure(["--model-id", str(tiny_checkpoint), "--max-best-of", "0"], "MAX_BEST_OF must be")


def test_unsupported_option_of_tgi(tiny_checkpoint: Path) -> None:
    _expect_failure(
        ["--model-id", str(tiny_checkpoint), "--rope-scaling", "linear"], "ROPE_SCALING=linear is not supported"
    )


def test_a_quantization_of_tgi_that_is_not_served(tiny_checkpoint: Path) -> None:
    _expect_failure(["--model-id", str(tiny_checkpoint), "--quantize", "exl2"], "QUANTIZE must be one of awq,")


def test_misspelled_variable(tiny_checkpoint: Path) -> None:
    _expect_failure(["--model-id", str(tiny_checkpoint)], "TEXTGEN_BLOCK_SIZES", TEXTGEN_BLOCK_SIZES="16")


def test_model_that_cannot_be_loaded(toy_repository: Path, tiny_checkpoint: Path, no_leftovers: None) -> None:
    line = _expect_failure(
        ["--model-id", str(tiny_checkpoint), "--model-repository", str(toy_repository)],
        "the architecture is unknown",
        TOY_FATAL="the architecture is unknown",
    )
    assert "server's log: " in line
    # The log that explains it is still there.
    log = Path(line.partition("server's log: ")[2])
    assert "textgen: fatal: the architecture is unknown" in log.read_text()
    log.unlink()


def test_model_file_that_is_broken(toy_repository: Path, tiny_checkpoint: Path, no_leftovers: None) -> None:
    (toy_repository / "textgen" / "1" / "model.py").write_text("import a_package_that_is_not_there")
    line = _expect_failure(
        ["--model-id", str(tiny_checkpoint), "--model-repository", str(toy_repository)], "a_package_that_is_not_there"
    )
    Path(line.partition("server's log: ")[2]).unlink()


def test_server_that_dies_too_often(start_toy: StartToy, no_leftovers: None) -> None:
    running = start_toy("--max-server-restarts", "1")
    server = running.pid("tritonserver")
    os.kill(server, signal.SIGKILL)
    _wait_for(lambda: not running.ready_file.exists())
    running.wait_until_ready()  # on the same ports
    assert running.pid("tritonserver") != server
    assert len(_generate(running, text_input="x", stream=True)) == 10
    os.kill(running.pid("tritonserver"), signal.SIGKILL)
    assert running.launcher.wait(30) == 1
    assert "error: tritonserver ended while serving (killed by SIGKILL)" in running.output.read_text()
    assert not running.ready_file.exists()


# ---- the real model -------------------------------------------------------------------------------------------------


def test_the_shared_server_answers_in_words(server: RunningServer) -> None:
    events = _generate(server, text_input="The capital of France is", stream=True, max_new_tokens=8)
    assert "Paris" in "".join(event["text_output"] for event in events)
    assert {"tritonserver", "engine", "textgen", "tokenizer"} <= server.pids.keys()


def test_the_real_server_finishes_its_streams_and_leaves_nothing(
    start_server: Callable[..., RunningServer], no_leftovers: None
) -> None:
    running = start_server(GRACEFUL_TERMINATION_TIMEOUT="60")
    assert processes.pids_by_role(running.pid("tritonserver"))["engine"]
    request = {"text_input": "One, two, three,", "stream": True, "max_new_tokens": 30, "ignore_eos_token": True}
    events: list[dict[str, Any]] = []
    client = threading.Thread(target=lambda: events.extend(_generate(running, **request)))
    client.start()
    _wait_for(lambda: running.metric("tgi_batch_current_size") == 1)
    assert running.stop(timeout_s=90) == 0
    client.join()
    assert [event for event in events if "error" in event] == []
    text = "".join(event["text_output"] for event in events)
    assert text.startswith(" four, five, six,")
    assert len(text.split()) >= 8, "the stream was cut"


def _wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def test_an_encrypted_connection(start_toy: StartToy, tmp_path: Path) -> None:
    """Triton's TLS options go behind `--`; the client needs the certificate that signed the server's, and says so."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    toy = start_toy(
        "--",
        "--grpc-use-ssl=1",
        f"--grpc-server-cert={tmp_path / 'cert.pem'}",
        f"--grpc-server-key={tmp_path / 'key.pem'}",
    )
    with Client(toy.grpc_url, tls=Tls(root_certificates=tmp_path / "ca.pem")) as client:
        assert client.generate("hi").text == "toy "
        assert [chunk.text for chunk in client.stream("hi")] == ["toy "] * 10
    with Client(toy.grpc_url, tls=Tls(), timeout=5) as client, pytest.raises(ServerUnavailable):
        client.generate("hi")
    with Client(toy.grpc_url, timeout=5) as client, pytest.raises(ServerUnavailable):
        client.generate("hi")
