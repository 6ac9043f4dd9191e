"""`config.py` and `loading.py`: options, limits from the checkpoint, another file's template; a lean process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from textgen_tokenizer.config import TokenizerConfig, read_config
from textgen_tokenizer.errors import ConfigError
from textgen_tokenizer.loading import load

TOKENIZER_FOLDER = Path(__file__).resolve().parents[2] / "model_repository" / "tokenizer" / "1"


def test_the_environment_wins() -> None:
    config = read_config({"model_id": "a", "max_input_tokens": "5"}, {"MODEL_ID": "b", "TRUST_REMOTE_CODE": "true"})
    assert config == TokenizerConfig(model_id="b", max_input_tokens=5, trust_remote_code=True)
    assert read_config({"model_id": "a", "FORCE_CPU_ONLY_INPUT_TENSORS": "no"}, {"MODEL_ID": ""}).model_id == "a"


def test_the_prompt_limit() -> None:
    assert read_config({"model_id": "a"}, {}).max_input_tokens is None
    assert read_config({"model_id": "a"}, {"MAX_TOTAL_TOKENS": "100"}).max_input_tokens == 99
    assert read_config({"model_id": "a"}, {"MAX_TOTAL_TOKENS": "100", "MAX_INPUT_TOKENS": "7"}).max_input_tokens == 7
    assert read_config({"model_id": "a"}, {"MAX_INPUT_LENGTH": "7"}).max_input_tokens == 7


@pytest.mark.parametrize(
    ("parameters", "environ", "text"),
    [
        ({}, {}, "MODEL_ID is not set"),
        ({"model": "a"}, {}, "unknown parameter 'model' in config.pbtxt"),
        (
            {"model_id": "a"},
            {"MAX_INPUT_TOKENS": "0"},
            "MAX_INPUT_TOKENS must be a whole number of at least 1; given: '0'",
        ),
        ({"model_id": "a"}, {"MAX_TOTAL_TOKENS": "many"}, "MAX_TOTAL_TOKENS must be a whole number of at least 2"),
        ({"model_id": "a"}, {"MAX_INPUT_TOKENS": "1", "MAX_INPUT_LENGTH": "1"}, "set only one of them"),
        ({"model_id": "a"}, {"TRUST_REMOTE_CODE": "maybe"}, "TRUST_REMOTE_CODE must be true or false; given: 'maybe'"),
    ],
)
def test_bad_options(parameters: dict[str, str], environ: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(parameters, environ)
    assert text in str(caught.value)


def test_limits_of_the_checkpoint(model_dir: Path) -> None:
    loaded = load(TokenizerConfig(model_id=str(model_dir)))
    assert (loaded.vocab_size, loaded.max_input_tokens) == (49152, 8191)
    longest = max(map(len, loaded.tokenizer.get_vocab()))
    assert loaded.max_chars_per_token == longest


@pytest.mark.parametrize(
    ("model_config", "vocab_size", "max_input_tokens"),
    [
        ({"vocab_size": 50304, "n_positions": 1024}, 50304, 1023),
        ({"text_config": {"vocab_size": 60000, "max_position_embeddings": 10}}, 60000, 9),
        ({}, 49152, None),
        (None, 49152, None),
    ],
)
def test_limits_by_other_names(
    model_config: Any, vocab_size: int, max_input_tokens: int | None, model_dir: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_dir / name, tmp_path)
    if model_config is not None:
        (tmp_path / "config.json").write_text(json.dumps(model_config))
    loaded = load(TokenizerConfig(model_id=str(tmp_path)))
    assert (loaded.vocab_size, loaded.max_input_tokens) == (vocab_size, max_input_tokens)


def test_another_tokenizer_config(model_dir: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    (tmp_path / "a.json").write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<|endoftext|>"}}))
    (tmp_path / "b.jinja").write_text("{{ 'from a file' }}")
    (tmp_path / "c.json").write_text("{")
    tokenizer = load(TokenizerConfig(str(model_dir), tokenizer_config_path=str(tmp_path / "a.json"))).tokenizer
    assert tokenizer.chat_template == {"default": "D", "rag": "R"}
    assert tokenizer.bos_token == "<|endoftext|>"
    tokenizer = load(TokenizerConfig(str(model_dir), tokenizer_config_path=str(tmp_path / "b.jinja"))).tokenizer
    assert tokenizer.chat_template == "{{ 'from a file' }}"
    for name in ("c.json", "missing.json"):
        with pytest.raises(ConfigError, match="TOKENIZER_CONFIG_PATH: cannot read"):
            load(TokenizerConfig(str(model_dir), tokenizer_config_path=str(tmp_path / name)))


_FAKE_BACKEND = """
class TritonModelException(Exception): pass
class TritonError(Exception):
    INVALID_ARG, UNSUPPORTED, INTERNAL = "INVALID_ARG", "UNSUPPORTED", "INTERNAL"
    def __init__(self, text, code): self.text, self.code = text, code
class Tensor:
    def __init__(self, name, array): self._name, self._array = name, array
    def name(self): return self._name
    def as_numpy(self): return self._array
class InferenceResponse:
    def __init__(self, output_tensors=(), error=None): self.tensors, self.error = list(output_tensors), error
def get_input_tensor_by_name(request, name): return request.tensors.get(name)
"""


def _run_model(script: str, folder: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `script` in a fresh process, as a stub is one, with a stand-in for Triton's module."""
    (folder / "triton_python_backend_utils.py").write_text(_FAKE_BACKEND)
    path = os.pathsep.join([str(folder), str(TOKENIZER_FOLDER)])
    environ = {**os.environ, **environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)


def test_a_lean_process_that_answers_each_request(model_dir: Path, tmp_path: Path) -> None:
    script = """
import gc, json, sys, numpy as np
import model, triton_python_backend_utils as pb
assert "transformers" not in sys.modules and "tokenizers" not in sys.modules
instance = model.TritonPythonModel()
instance.initialize({"model_config": json.dumps({"parameters": {"model_id": {"string_value": ""}}})})
assert sys.modules.get("torch") is None
assert gc.isenabled() and gc.get_freeze_count() > 0
class Request:
    def __init__(self, **tensors): self.tensors = {k: pb.Tensor(k, v) for k, v in tensors.items()}
    def parameters(self): return json.dumps({"truncate": 1, "max_new_tokens": 5})
string = lambda b: np.array([b], dtype=np.object_)
image = b'[{"role": "user", "content": [{"type": "image_url"}]}]'
responses = instance.execute([
    Request(text_input=string(b"Hello world")), Request(text_input=string(b"")), Request(messages=string(image)),
    Request(action=string(b"decode"), token_ids=np.array([19556], dtype=np.int32)),
    Request(action=string(b"tokenize"), text_input=string("é".encode())),
])
instance._service = None
responses += instance.execute([Request(text_input=string(b"x"))])
print(json.dumps([
    [r.error.code, r.error.text] if r.error else {t.name(): [x.decode() if isinstance(x, bytes) else x
    for x in t.as_numpy().tolist()] for t in r.tensors} for r in responses]))
"""
    done = _run_model(script, tmp_path, {"MODEL_ID": str(model_dir)})
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers[0] == {"input_ids": [905], "prompt_text": ["Hello world"]}
    assert answers[1] == ["INVALID_ARG", "Input validation error: `text_input` must not be empty"]
    assert answers[2][0] == "UNSUPPORTED"
    assert answers[3] == {"text": ["Hello"]}
    assert json.loads(answers[4]["tokens"][0])[0]["text"] == "é"
    assert answers[5] == ["INTERNAL", "Request failed during generation: the tokenizer failed: AttributeError"]
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"MODEL_ID": ""}, "MODEL_ID is not set"),
        ({"MODEL_ID": "/nonexistent/model"}, "/nonexistent/model"),
    ],
)
def test_a_failed_load_says_so_in_one_line(environ: dict[str, str], text: str, tmp_path: Path) -> None:
    script = """
import json, model, triton_python_backend_utils as pb
try:
    model.TritonPythonModel().initialize({"model_config": json.dumps({"parameters": {}})})
except pb.TritonModelException as error:
    print(error)
"""
    done = _run_model(script, tmp_path, {**environ, "HF_HUB_OFFLINE": "1"})
    fatal = [line for line in done.stderr.splitlines() if line.startswith("textgen: fatal: tokenizer: ")]
    assert len(fatal) == 1, done.stderr
    assert text in fatal[0]
    assert len(done.stdout.splitlines()) == 1
    assert text in done.stdout
