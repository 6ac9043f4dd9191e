"""Models of one's own, models nothing else serves, and checkpoints that lack what most have."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from textgen_engine.errors import ModelLoadError
from textgen_engine.request import FinishReason

from .test_engine_equalities import PROMPTS, generate, ids_of, requests_of
from .tiny import Harness, make_request, save_checkpoint, set_eos_ids

NewEngine = Callable[..., Harness]

# A Llama whose attention adds a bias of its own making to the values, and says its name.
_MODELLING = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda module, given, found: found * 1.5)
"""


@pytest.fixture
def own_code(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint whose modelling code lies beside it."""
    folder = Path(shutil.copytree(llama, tmp_path / "own"))
    (folder / "modeling_own.py").write_text(_MODELLING)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_modelling_code_of_the_checkpoint_runs_if_it_is_trusted(
    new_engine: NewEngine, own_code: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ModelLoadError, match="custom code which must be executed"):
        new_engine(own_code)
    model = AutoModelForCausalLM.from_pretrained(own_code, dtype=torch.float32, trust_remote_code=True).eval()
    expected = []
    for prompt in PROMPTS[:4]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        expected.append(whole[0, len(prompt) :].tolist())
    assert expected != generate(llama, PROMPTS[:4]), "the code was meant to make a difference"
    harness = new_engine(own_code, trust_remote_code=True, tokens_per_step=16)
    assert ids_of(harness.run(requests_of(PROMPTS[:4]))) == expected


class RegisteredConfig(LlamaConfig):
    model_type = "registered_llama"


class RegisteredForCausalLM(LlamaForCausalLM):
    config_class = RegisteredConfig


@pytest.fixture
def registered() -> Iterator[None]:
    AutoConfig.register("registered_llama", RegisteredConfig)
    AutoModelForCausalLM.register(RegisteredConfig, RegisteredForCausalLM)
    yield
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    CONFIG_MAPPING._extra_content.pop("registered_llama")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(RegisteredConfig)


@pytest.mark.usefixtures("registered")
def test_a_class_that_the_user_registered_is_found(new_engine: NewEngine, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "registered"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "registered_llama", "architectures": ["RegisteredForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    harness = new_engine(folder)
    assert ids_of(harness.run(requests_of(PROMPTS[:4]))) == generate(llama, PROMPTS[:4])


def test_what_attention_cannot_serve_is_computed_densely_if_that_is_wanted(
    new_engine: NewEngine, checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Batched, in chunks, with a cached prefix and with preemption."""
    folder = checkpoint("mamba")
    with pytest.raises(ModelLoadError, match=r"MambaMixer.*TEXTGEN_DENSE_FALLBACK"):
        new_engine(folder)
    prompts = PROMPTS[:4]
    expected = generate(folder, prompts, 6)
    with caplog.at_level(logging.WARNING):
        harness = new_engine(folder, dense_fallback=True, tokens_per_step=16)
    assert "SLOW: MambaForCausalLM" in caplog.text
    assert ids_of(harness.run(requests_of(prompts, 6))) == expected
    again = harness.run(requests_of(prompts, 6, prefix="again"))
    assert ids_of(again) == expected and again["again3"].outputs[0].num_cached_tokens == 48
    small = new_engine(folder, dense_fallback=True, block_size=4, num_blocks=20, max_total_tokens=80)
    small.submit(*requests_of([PROMPTS[3]] * 3, 6, prefix="crowd"))
    assert ids_of(small.run(requests_of(prompts, 6))) == expected
    assert small.num_preemptions > 0, "the cache was meant to be too small"


def test_the_dense_fallback_leaves_alone_what_attention_can_serve(new_engine: NewEngine, llama: Path) -> None:
    harness = new_engine(llama, dense_fallback=True)
    assert len(harness.engine._runner.cache.keys) == 3


def test_tied_embeddings(new_engine: NewEngine, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, tie_word_embeddings=True)
    assert ids_of(new_engine(folder).run(requests_of(PROMPTS[:3]))) == generate(folder, PROMPTS[:3])


def test_each_of_several_end_ids_ends_the_text(new_engine: NewEngine, llama: Path, tmp_path: Path) -> None:
    text = generate(llama, PROMPTS[2:3])[0]
    folder = Path(shutil.copytree(llama, tmp_path / "ends"))
    for end in (text[4], text[9]):
        set_eos_ids(folder, [511, end])
        answer = new_engine(folder).run_alone(make_request("r", PROMPTS[2], 24))
        assert answer.ids() == text[: text.index(end) + 1]
        assert answer.reason() is FinishReason.EOS_TOKEN


def test_no_chat_template_and_no_padding_token(new_engine: NewEngine, llama: Path) -> None:
    """The tiny tokenizer has neither: texts are served, and a batch of unlike lengths needs no padding."""
    harness = new_engine()
    assert harness.engine._rooms.tokenizer.pad_token is None and not harness.engine._rooms.tokenizer.chat_template
    assert ids_of(harness.run(requests_of(PROMPTS[:3]))) == generate(llama, PROMPTS[:3])
