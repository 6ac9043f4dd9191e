"""Fixtures of the tests against real servers; `server` and `start_server` stand in tests/conftest.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..running_server import RunningServer
from .faults import FaultRecord, save_lasting_checkpoint
from .wire import Wire

Connect = Callable[[RunningServer], Wire]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """`connect(server)`: a `Wire` to it, closed when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda running: stack.enter_context(contextlib.closing(Wire(running)))


@pytest.fixture
def wire(server: RunningServer, connect: Connect) -> Wire:
    """A `Wire` to the shared server."""
    return connect(server)


@pytest.fixture(scope="session")
def fault_record(request: pytest.FixtureRequest) -> FaultRecord:
    """Keeps measurements where `--record-faults` says."""
    return FaultRecord(request.config.getoption("--record-faults"))


@pytest.fixture(scope="session")
def lasting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint for streams that last."""
    return save_lasting_checkpoint(tmp_path_factory.mktemp("lasting"))


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
  { name: "sampling_parameters" data_type: TYPE_STRING dims: [1] optional: true },
  { name: "stream" data_type: TYPE_BOOL dims: [1] optional: true },
  { name: "return_finish_reason" data_type: TYPE_BOOL dims: [1] optional: true },
  { name: "return_num_input_tokens" data_type: TYPE_BOOL dims: [1] optional: true },
  { name: "return_num_output_tokens" data_type: TYPE_BOOL dims: [1] optional: true }
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
