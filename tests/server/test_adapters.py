"""LoRA adapters, and guessed tokens, on a real server with the demonstration model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from textgen_client import Client, ValidationError

from ..engine.adapters.folders import save_adapter
from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .wire import wait_until

PROMPT = "The three laws of robotics are"
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def folder(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a, b and c of the demonstration model, random and small."""
    config = json.loads((model_dir / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.v_proj": (hidden, kv), "mlp.down_proj": (inner, hidden)}
    sizes = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }
    parent = tmp_path_factory.mktemp("adapters")
    for seed, (name, targets) in enumerate({"a": ["q_proj", "v_proj"], "b": ["down_proj"], "c": ["v_proj"]}.items()):
        save_adapter(parent / name, sizes, targets, rank=8, alpha=8, seed=seed, strength=0.3)
    return parent


@pytest.fixture(scope="module")
def adapted(model_dir: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    options = {
        "LORA_ADAPTERS": f"first={folder / 'a'}",
        "TEXTGEN_ADAPTER_FOLDER": str(folder),
        "TEXTGEN_MAX_LORAS": "3",
        "SPECULATE": "3",  # every text here is made with guesses, too
    }
    environment = SERVER_ENVIRONMENT | {"MODEL_ID": str(model_dir)} | options
    running = RunningServer(tmp_path_factory.mktemp("adapted"), environment)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture
def client(adapted: RunningServer) -> Iterator[Client]:
    with Client(adapted.grpc_url, timeout=120) as client:
        yield client


def textgen(server: RunningServer, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TEXTGEN_URL": server.grpc_url}
    command = [sys.executable, "-m", "textgen_client", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_start_run_time_batch_and_crash(adapted: RunningServer, client: Client, model_dir: Path, folder: Path) -> None:
    """One server's life, in order: each start of one costs seconds."""
    assert [(adapter.name, adapter.at_start) for adapter in client.adapters()] == [("first", True)]
    said = textgen(adapted, "adapters", "load", "second", "b")
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[1].split() == ["second", "rank", "8,", "30", "layers,", "1.9", "MiB", "0", "live"]
    assert [adapter.name for adapter in client.load_adapter("c")] == ["first", "second", "c"]

    # Alone, then all at once: three adapters and the model as it is, three stable and unlike texts.
    names = ["first", "second", "c", None]

    def ask(name: str | None) -> str:
        return client.generate(PROMPT, max_new_tokens=NUM_TOKENS, adapter_id=name).text

    alone = [ask(name) for name in names]
    assert len(set(alone)) == 4
    together: dict[int, str] = {}

    def ask_row(row: int) -> None:
        together[row] = ask(names[row % 4])

    threads = [threading.Thread(target=ask_row, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[row] for row in range(8)] == alone * 2
    assert alone[0] == merged_text(model_dir, folder / "a")

    with pytest.raises(ValidationError, match="no adapter 'fourth'; loaded are: c, first, second"):
        ask("fourth")
    with pytest.raises(ValidationError, match=r"TEXTGEN_MAX_LORAS"):
        client.load_adapter("fourth", "a")
    with pytest.raises(ValidationError, match="`adapter_command` takes no prompt"):
        client.generate(PROMPT, adapter_command={"action": "list"})
    with pytest.raises(ValidationError, match="`adapter_command` must be an object"):
        client.generate(PROMPT, adapter_command={"action": "load"})
    said = textgen(adapted, "adapters", "unload", "c", "--json")
    assert [adapter["name"] for adapter in json.loads(said.stdout)] == ["first", "second"]
    with pytest.raises(ValidationError, match="no adapter 'c'"):
        ask("c")
    with pytest.raises(ValidationError, match="leads out of the folder"):
        client.load_adapter("fourth", "../a")

    def lines(text: str) -> list[str]:
        return [line for line in adapted.log.read_text().splitlines() if text in line]

    wait_until(lambda: bool(lines("adapter=second")), "logged")
    assert "output_tokens=8" in lines("adapter=second")[0]
    # Answered alone and twice together; a name that no adapter has never becomes a series.
    wait_until(
        lambda: adapted.metric("tgi_request_generated_tokens_sum", adapter="second") == 3 * NUM_TOKENS, "counted"
    )
    wait_until(lambda: adapted.metric("tgi_request_success", adapter="second") == 3, "their success is counted")
    assert adapted.metric("tgi_request_duration_count", adapter="fourth") == 0

    # Guesses: counted, reported, and no answer's business.
    answer = client.generate("one two three " * 8, max_new_tokens=20, adapter_id="first", details=True)
    assert answer.details is not None
    assert answer.details["guessed_tokens"] >= answer.details["guessed_right"] > 0
    wait_until(lambda: adapted.metric("tgi_guessed_tokens_right") > 0, "counted")
    assert adapted.metric("tgi_guessed_tokens") >= adapted.metric("tgi_guessed_tokens_right")

    # A new engine has what was loaded at run time as well, as far as it can still be read.
    client.load_adapter("lost", "c")
    (folder / "c" / "adapter_config.json").unlink()
    os.kill(adapted.pid("engine"), signal.SIGKILL)
    wait_until(lambda: adapted.metric("tgi_engine_restarts") == 1, "restarted")
    assert [ask(name) for name in ("first", "second", None)] == [alone[0], alone[1], alone[3]]
    assert [(adapter.name, adapter.at_start) for adapter in client.adapters()] == [("first", True), ("second", False)]
    assert lines("the adapter 'lost' is lost")


def merged_text(model_dir: Path, adapter: Path) -> str:
    """What transformers generates with the adapter in the weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    weights = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in weights if key.endswith("lora_A.weight")]:
        module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        with torch.no_grad():
            module.weight += weights[key.replace("lora_A", "lora_B")] @ weights[key]  # alpha / rank is 1
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        whole = model.generate(**ids, do_sample=False, max_new_tokens=NUM_TOKENS)
    text: str = tokenizer.decode(whole[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    return text
