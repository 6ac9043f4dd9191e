"""Fixtures shared by all tests: the demonstration model that `make setup` puts into the cache folder, and real servers.

`server` is one server with the demonstration model, shared by the whole session; so is `narrow_server`, which is soon
full. `start_server` starts further ones for tests that need options of their own or kill something. All listen on free
ports and are gone at the end, whatever the test did.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .running_server import REPOSITORY_ROOT, SERVER_ENVIRONMENT, RunningServer, StartServer

# What runs in the background of a shell ignores Ctrl-C, and so would everything that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be said before anybody imports Triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

MODEL_DIR = REPOSITORY_ROOT / ".cache" / "models" / "smollm2-135m-instruct"
SERVER_FOLDERS = ("server", "conformance", "gateway")

_STRICT_TEMPLATE = (
    "{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant may speak, not ' + message.role) }}{% endif %}"
    "{{ message.content }}{% endfor %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="Run the tests of faults that take long, too.")
    parser.addoption("--record-faults", type=Path, metavar="FILE", help="Keep what tests of faults measured, as JSON.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything in these folders needs a real server; tests marked `faults` run when asked for."""
    if not config.getoption("--faults"):
        skip = pytest.mark.skip(reason="takes long: make test-faults")
        for item in items:
            if "faults" in item.keywords and item.get_closest_marker("faults"):
                item.add_marker(skip)
    here = Path(__file__).parent
    folders = [here / name for name in SERVER_FOLDERS]
    for item in items:
        if any(folder in item.path.parents for folder in folders):
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The folder of SmolLM2-135M-Instruct (safetensors, tokenizer, chat template)."""
    if not (MODEL_DIR / "tokenizer.json").is_file():
        pytest.fail(f"the demonstration model is missing from {MODEL_DIR}: run `make setup`")
    return MODEL_DIR


@pytest.fixture(scope="session")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The shared server. A test that kills processes or fills queues for long takes `start_server` instead."""
    running = RunningServer(tmp_path_factory.mktemp("server"), SERVER_ENVIRONMENT | {"MODEL_ID": str(model_dir)})
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="session")
def narrow_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One slot, small steps and room for six requests: what queues, waits, and a prompt takes many steps.

    Its streams write keep-alives, without which Triton does not notice an HTTP client that leaves before the first
    token. Its chat template takes two roles and refuses all others.
    """
    folder = tmp_path_factory.mktemp("narrow_server")
    tokenizer_config = json.loads((model_dir / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"chat_template": _STRICT_TEMPLATE}))
    options = {
        "MODEL_ID": str(model_dir),
        "TOKENIZER_CONFIG_PATH": str(folder / "tokenizer_config.json"),
        "MAX_BATCH_SIZE": "1",
        "MAX_BATCH_PREFILL_TOKENS": "16",
        "MAX_BATCH_TOTAL_TOKENS": "2048",
        "MAX_CONCURRENT_REQUESTS": "6",
        "TEXTGEN_KEEP_ALIVE_S": "0.2",
    }
    running = RunningServer(folder, SERVER_ENVIRONMENT | options)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture
def start_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """`start_server(*arguments, wait=True, prefix=(), **environment)`: a server of the test's own, gone when it ends.

    Arguments are flags of scripts/serve.py, prefix what its command begins with. Without MODEL_ID it serves the
    demonstration model; the environment is laid over the shared server's. wait=False returns at once.
    """
    started: list[RunningServer] = []

    def start(*arguments: str, wait: bool = True, prefix: tuple[str, ...] = (), **environment: str) -> RunningServer:
        if "MODEL_ID" not in environment:
            environment["MODEL_ID"] = str(request.getfixturevalue("model_dir"))
        folder = tmp_path_factory.mktemp("server")
        running = RunningServer(folder, SERVER_ENVIRONMENT | environment, arguments, prefix)
        started.append(running)
        return running.wait_until_ready() if wait else running

    try:
        yield start
    finally:
        for running in started:
            running.close()
