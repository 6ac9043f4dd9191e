"""Real servers for the tests in this folder, started the way a user starts them: scripts/serve.py.

`server` is one server with the demonstration model, shared by the whole session. `start_server` starts further ones
for tests that need options of their own or kill something. Both listen on free ports and are gone at the end, whatever
the test did.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from textgen_serve import processes

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
SERVE = REPOSITORY_ROOT / "scripts" / "serve.py"

# Options of the shared server: small enough for a laptop, large enough to hold several requests at once.
SERVER_ENVIRONMENT = {
    "MAX_TOTAL_TOKENS": "1024",
    "MAX_INPUT_TOKENS": "960",
    "MAX_BATCH_TOTAL_TOKENS": "16384",
    "MAX_BATCH_PREFILL_TOKENS": "256",
    "MAX_CONCURRENT_REQUESTS": "64",
    "GRACEFUL_TERMINATION_TIMEOUT": "10",
}
READY_WITHIN_S = 180.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a real server."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.server)


class RunningServer:
    """One `scripts/serve.py` and what is below it.

    grpc_url is host:port, http_url and metrics_url carry the scheme; they exist once it is ready. `log` is the
    server's log, `output` what the launcher printed.
    """

    def __init__(self, folder: Path, environment: dict[str, str], arguments: tuple[str, ...] = ()) -> None:
        self.log = folder / "server.log"
        self.output = folder / "output.txt"
        self.ready_file = folder / "ready.json"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TEXTGEN_")}
        command = [sys.executable, str(SERVE), "--host", "127.0.0.1", "--no-demo"]
        command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        command += ["--ready-file", str(self.ready_file), "--log-file", str(self.log), *arguments]
        with self.output.open("wb") as output:
            self.launcher = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=inherited | environment, cwd=folder
            )

    def wait_until_ready(self, timeout_s: float = READY_WITHIN_S) -> RunningServer:
        """Return when requests succeed; fails the test with both logs when they never do."""
        deadline = time.monotonic() + timeout_s
        while not self.ready_file.exists():
            if self.launcher.poll() is not None:
                pytest.fail(f"the server ended with exit code {self.launcher.returncode}\n{self.describe()}")
            if time.monotonic() > deadline:
                pytest.fail(f"the server was not ready within {timeout_s:.0f} s\n{self.describe()}")
            time.sleep(0.05)
        ready = json.loads(self.ready_file.read_text())
        self.grpc_url = f"127.0.0.1:{ready['grpc_port']}"
        self.http_url = f"http://127.0.0.1:{ready['http_port']}"
        self.metrics_url = f"http://127.0.0.1:{ready['metrics_port']}/metrics"
        self._server_pid: int = ready["pids"]["tritonserver"][0]
        return self

    @property
    def pids(self) -> dict[str, list[int]]:
        """Live process ids by role, as they are now: "tritonserver", "engine", and the stubs by model name."""
        return processes.pids_by_role(self._server_pid)

    def pid(self, role: str) -> int:
        """The one process of a role; fails the test when there is none or there are several."""
        found = self.pids.get(role, [])
        assert len(found) == 1, f"{role}: {found} of {self.pids}"
        return found[0]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry `labels`; 0 when there is none. Histograms: name the sample."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            text = response.read().decode()
        total = 0.0
        for line in text.splitlines():
            sample = re.fullmatch(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)", line)
            if sample is None or sample[1] != name:
                continue
            found = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', sample[2] or ""))
            if labels.items() <= found.items():
                total += float(sample[3])
        return total

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Send a signal to the launcher and return its exit code."""
        self.launcher.send_signal(number)
        try:
            return self.launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the launcher did not end within {timeout_s:.0f} s\n{self.describe()}")

    def close(self) -> None:
        """End everything, politely first. Safe to call twice."""
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.launcher.pid).children(recursive=True)
        if self.launcher.poll() is None:
            self.launcher.terminate()
            try:
                self.launcher.wait(30)
            except subprocess.TimeoutExpired:
                self.launcher.kill()
                self.launcher.wait()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=10)

    def describe(self) -> str:
        """What the launcher printed, and the end of the server's log."""
        log = self.log.read_text(errors="replace").splitlines()[-40:] if self.log.exists() else ["(none)"]
        return f"--- launcher\n{self.output.read_text(errors='replace')}--- server log, last lines\n" + "\n".join(log)


StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The shared server. A test that kills processes or fills queues for long takes `start_server` instead."""
    running = RunningServer(tmp_path_factory.mktemp("server"), SERVER_ENVIRONMENT | {"MODEL_ID": str(model_dir)})
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture
def start_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """`start_server(*arguments, wait=True, **environment)`: a server of the test's own, gone when the test ends.

    Arguments are flags of scripts/serve.py. Without MODEL_ID it serves the demonstration model; the environment is
    laid over the shared server's. wait=False returns at once.
    """
    started: list[RunningServer] = []

    def start(*arguments: str, wait: bool = True, **environment: str) -> RunningServer:
        if "MODEL_ID" not in environment:
            environment["MODEL_ID"] = str(request.getfixturevalue("model_dir"))
        folder = tmp_path_factory.mktemp("server")
        running = RunningServer(folder, SERVER_ENVIRONMENT | environment, arguments)
        started.append(running)
        return running.wait_until_ready() if wait else running

    try:
        yield start
    finally:
        for running in started:
            running.close()


@pytest.fixture
def toy_repository(tmp_path: Path) -> Path:
    """A model repository whose `textgen` needs no checkpoint, for tests of the launcher alone.

    Its behaviour is set by environment variables: TOY_LOAD_S (seconds to load), TOY_FATAL (a reason to fail with),
    TOY_TOKEN_S (seconds for each of the ten tokens of a stream).
    """
    folder = tmp_path / "toy_repository" / "textgen"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(_TOY_CONFIG)
    (folder / "1" / "model.py").write_text(_TOY_MODEL)
    return folder.parent


_TOY_CONFIG = """
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [
  { name: "text_input" data_type: TYPE_STRING dims: [1] optional: true },
  { name: "messages" data_type: TYPE_STRING dims: [1] optional: true },
  { name: "stream" data_type: TYPE_BOOL dims: [1] optional: true }
]
output [ { name: "text_output" data_type: TYPE_STRING dims: [-1] } ]
instance_group [ { count: 1 kind: KIND_MODEL } ]
"""

_TOY_MODEL = """
import os
import subprocess
import sys
import threading
import time

import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        # Stands for the engine: a child that does not end by itself.
        sleep = "import sys, time; time.sleep(600)"
        self.engine = subprocess.Popen([sys.executable, "-c", sleep, "textgen_engine.process"])
        print("textgen: loading the toy", flush=True)
        time.sleep(float(os.environ.get("TOY_LOAD_S", "0")))
        if os.environ.get("TOY_FATAL"):
            print("textgen: fatal: " + os.environ["TOY_FATAL"], flush=True)
            raise triton.TritonModelException(os.environ["TOY_FATAL"])

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request, request.get_response_sender())).start()

    def answer(self, request, sender):
        stream = triton.get_input_tensor_by_name(request, "stream")
        count = 10 if stream is not None and stream.as_numpy()[0] else 1
        for index in range(count):
            time.sleep(float(os.environ.get("TOY_TOKEN_S", "0")))
            text = triton.Tensor("text_output", np.array([b"toy "], dtype=object))
            last = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if index == count - 1 else 0
            sender.send(triton.InferenceResponse([text]), flags=last)

    def finalize(self):
        self.engine.terminate()
        self.engine.wait()
"""


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    """A folder that passes for a checkpoint: a config, a tokenizer, one small weight file."""
    import numpy as np
    from safetensors.numpy import save_file

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros((4, 8), dtype=np.float32)}, folder / "model.safetensors")
    return folder
