"""Adapters' folders that are refused, and loading and unloading while the engine runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from textgen_engine.adapters.layers import AdapterLayers
from textgen_engine.adapters.spec import AdapterCommand, AdapterSpec, find_runs, parse_adapters
from textgen_engine.config import LoraConfig
from textgen_engine.configure import build_config
from textgen_engine.errors import ConfigError, EngineFailure, InvalidParameter, ModelLoadError, Unsupported

from ..tiny import Harness, make_config, make_request
from .folders import linear_sizes, save_adapter

NewEngine = Callable[..., Harness]
PROMPT = list(range(10, 40))


@pytest.fixture(scope="module")
def sizes(llama: Path) -> dict[str, tuple[int, int]]:
    return linear_sizes(llama)


@pytest.fixture
def folder(tmp_path: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """Three adapters: a, b and, one folder further down, team/c."""
    for seed, name in enumerate(("a", "b", "team/c")):
        save_adapter(tmp_path / "adapters" / name, sizes, ["q_proj", "up_proj"], seed=seed)
    return tmp_path / "adapters"


def asked(harness: Harness, action: str, name: str | None = None, path: str | None = None) -> Any:
    request = make_request(
        f"{action} {name} {time.monotonic()}", (), adapter_command=AdapterCommand(action, name, path)
    )  # type: ignore[arg-type]
    harness.submit(request)
    deadline_s = time.monotonic() + 60
    while not harness.answers[request.request_id].num_last:
        assert time.monotonic() < deadline_s
        harness.step()
    return harness.answers[request.request_id]


def command(harness: Harness, action: str, name: str | None = None, path: str | None = None) -> Any:
    """What the engine answers to a command that it carries out."""
    answer = asked(harness, action, name, path)
    assert answer.error is None, answer.error
    return json.loads(answer.text())


def names(answer: Any) -> list[str]:
    return [adapter["name"] for adapter in answer["adapters"]]


# ---- at run time ---------------------------------------------------------------------------------------------------


def test_load_use_unload(new_engine: NewEngine, folder: Path) -> None:
    harness = new_engine(lora=LoraConfig((AdapterSpec("first", str(folder / "a")),), folder=str(folder)))
    assert names(command(harness, "list")) == ["first"]
    assert names(command(harness, "load", "b")) == ["first", "b"]
    loaded = command(harness, "load", "c", "team/c")["adapters"]
    assert [adapter["at_start"] for adapter in loaded] == [True, False, False]
    assert loaded[2] == {
        "name": "c", "rank": 4, "num_layers": 6, "num_bytes": loaded[2]["num_bytes"], "at_start": False,
        "live_requests": 0, "unloading": False,
    }  # fmt: skip
    answers = harness.run([make_request(name, PROMPT, 8, adapter_id=name) for name in ("first", "b", "c")])
    assert len({tuple(answer.ids()) for answer in answers.values()}) == 3
    assert names(command(harness, "unload", "first")) == ["b", "c"]
    refused = harness.run_alone(make_request("late", PROMPT, 8, adapter_id="first"))
    assert isinstance(refused.error, InvalidParameter)
    assert "'first'" in refused.error.message and "loaded are: b, c" in refused.error.message
    again = names(command(harness, "load", "first", "a"))
    assert again == ["b", "c", "first"]
    assert harness.run_alone(make_request("x", PROMPT, 8, adapter_id="first")).ids() == answers["first"].ids()


def test_unloading_lets_live_requests_end(new_engine: NewEngine, folder: Path) -> None:
    harness = new_engine(lora=LoraConfig(folder=str(folder), max_adapters=1))
    command(harness, "load", "a")
    whole = harness.run_alone(make_request("whole", PROMPT, 20, adapter_id="a", ignore_eos_token=True)).ids()
    harness.submit(make_request("live", PROMPT, 20, adapter_id="a", ignore_eos_token=True))
    harness.step(3)
    leaving = command(harness, "unload", "a")["adapters"]
    assert [(adapter["unloading"], adapter["live_requests"]) for adapter in leaving] == [(True, 1)]
    refused = asked(harness, "load", "b").error
    assert isinstance(refused, InvalidParameter) and "1 end with their last request" in refused.message
    harness.until_idle()
    assert harness.answers["live"].ids() == whole
    assert names(command(harness, "load", "b")) == ["b"]
    assert harness.run_alone(make_request("other", PROMPT, 20, adapter_id="b", ignore_eos_token=True)).ids() != whole


def test_what_is_refused_at_run_time(new_engine: NewEngine, folder: Path, tmp_path: Path) -> None:
    harness = new_engine(lora=LoraConfig(folder=str(folder), max_adapters=2))
    save_adapter(tmp_path / "outside", {"model.layers.0.self_attn.q_proj": (64, 64)}, ["q_proj"])
    (folder / "link").symlink_to(tmp_path / "outside")
    command(harness, "load", "a")
    for action, name, path, said in (
        ("load", "a", None, "loaded already"),
        ("load", "d", None, "does not exist"),
        ("load", "d", "../outside", "leads out"),
        ("load", "../outside", None, "leads out"),
        ("load", "d", str(tmp_path / "outside"), "leads out"),
        ("load", "link", None, "leads out"),
        ("load", "d\n", "a", "printable"),
        ("load", "x" * 129, "a", "1 to 128"),
        ("load", "d", "nul\0", "read"),
        ("unload", "d", None, "there is no adapter 'd'; loaded are: a"),
    ):
        error = asked(harness, action, name, path).error
        assert isinstance(error, InvalidParameter) and said in error.message, (name, path, error)
    command(harness, "load", "b")
    error = asked(harness, "load", "c", "team/c").error
    assert isinstance(error, InvalidParameter) and "2 adapters are loaded" in error.message
    assert "TEXTGEN_MAX_LORAS" in error.message


def test_a_server_without_adapters(new_engine: NewEngine, folder: Path) -> None:
    harness = new_engine()
    assert command(harness, "list") == {"adapters": []}
    error = harness.run_alone(make_request("r", PROMPT, adapter_id="a")).error
    assert isinstance(error, InvalidParameter) and "none is loaded" in error.message
    for action in ("load", "unload"):
        error = asked(harness, action, "a").error
        assert isinstance(error, Unsupported) and "TEXTGEN_ADAPTER_FOLDER" in error.message


def test_a_request_that_leaves_while_its_adapter_is_read(new_engine: NewEngine, folder: Path) -> None:
    harness = new_engine(lora=LoraConfig(folder=str(folder)))
    harness.submit(make_request("load", (), adapter_command=AdapterCommand("load", "a")))
    harness.engine.cancel("load")
    harness.until_idle()
    assert harness.answers["load"].error is not None
    assert names(command(harness, "list")) == []


def test_no_memory_changes_nothing(new_engine: NewEngine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = new_engine(lora=LoraConfig(folder=str(folder)))
    command(harness, "load", "a")
    before = harness.run_alone(make_request("before", PROMPT, 8, adapter_id="a")).ids()
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("out of memory")

        patch.setattr("textgen_engine.adapters.layers.AdaptedLinear.grown", fail)
        assert isinstance(asked(harness, "load", "b").error, EngineFailure)
    assert names(command(harness, "list")) == ["a"]
    assert harness.run_alone(make_request("after", PROMPT, 8, adapter_id="a")).ids() == before
    assert names(command(harness, "load", "b")) == ["a", "b"]


# ---- folders -------------------------------------------------------------------------------------------------------


def edited(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def with_weight(folder: Path, name: str, weight: torch.Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    if weight is None:
        del weights[name]
    else:
        weights[name] = weight
    save_file(weights, path)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "dora": (lambda f: edited(f, use_dora=True), "`use_dora`"),
    "modules_to_save": (lambda f: edited(f, modules_to_save=["lm_head"]), "`modules_to_save`"),
    "bias": (lambda f: edited(f, bias="lora_only"), "`bias`"),
    "other method": (lambda f: edited(f, peft_type="IA3"), "IA3"),
    "other task": (lambda f: edited(f, task_type="SEQ_CLS"), "SEQ_CLS"),
    "no rank": (lambda f: edited(f, r=0), "`r`"),
    "no targets": (lambda f: edited(f, target_modules=None), "target_modules"),
    "bad regex": (lambda f: edited(f, target_modules="(q_proj"), "regular expression"),
    "targets that are no texts": (lambda f: edited(f, target_modules=[1]), "list of texts"),
    "fewer targets than weights": (lambda f: edited(f, target_modules=["q_proj"]), "does not name"),
    "more targets than weights": (lambda f: edited(f, target_modules=["q_proj", "up_proj", "k_proj"]), "lacks"),
    "another rank": (lambda f: edited(f, r=8), "have rank 4, its settings say 8"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "a pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickle"),
    "damaged": (lambda f: os.truncate(f / "adapter_model.safetensors", 900), "damaged"),
    "half a product": (lambda f: with_weight(f, f"{Q0}.lora_B.weight", None), "lacks lora_B"),
    "other sizes": (lambda f: with_weight(f, f"{Q0}.lora_A.weight", torch.zeros(4, 32)), "4x32"),
    "not finite": (lambda f: with_weight(f, f"{Q0}.lora_A.weight", torch.full((4, 64), torch.nan)), "finite"),
    "another layer": (lambda f: with_weight(f, f"{Q0}x.lora_A.weight", torch.zeros(4, 64)), "no linear layer"),
    "magnitudes": (lambda f: with_weight(f, f"{Q0}.lora_magnitude_vector", torch.zeros(64)), "not supported"),
    "other embedding": (
        lambda f: with_weight(f, "base_model.model.model.embed_tokens.weight", torch.zeros(512, 64)),
        "another base_model.model.model.embed_tokens.weight than the model",
    ),
}


@pytest.fixture(scope="module")
def refusing_engine(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    harness = Harness(make_config(llama, lora=LoraConfig(folder=str(tmp_path_factory.mktemp("refused")), max_rank=6)))
    yield harness
    harness.close()


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, refusing_engine: Harness, sizes: dict[str, tuple[int, int]]) -> None:
    parent = Path(refusing_engine.engine._adapters._config.folder or "")
    spoil, said = REFUSED[case]
    spoil(save_adapter(parent / case, sizes, ["q_proj", "up_proj"]))
    error = asked(refusing_engine, "load", "x", case).error
    assert isinstance(error, InvalidParameter), error
    assert said in error.message and "'x'" in error.message, error


def test_rank_limit(refusing_engine: Harness, sizes: dict[str, tuple[int, int]]) -> None:
    parent = Path(refusing_engine.engine._adapters._config.folder or "")
    save_adapter(parent / "large", sizes, ["q_proj"], rank=7)
    error = asked(refusing_engine, "load", "large").error
    assert isinstance(error, InvalidParameter)
    assert "rank is 7; at most 6 is allowed (TEXTGEN_MAX_LORA_RANK)" in error.message


def test_which_layers_an_adapter_names(refusing_engine: Harness, sizes: dict[str, tuple[int, int]]) -> None:
    """layers_to_transform and exclude_modules: as PEFT reads them."""
    parent = Path(refusing_engine.engine._adapters._config.folder or "")
    some = {name: size for name, size in sizes.items() if ".1." in name}
    save_adapter(parent / "one layer", some, ["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    most = {name: size for name, size in sizes.items() if ".0." not in name}
    save_adapter(parent / "excluded", most, ["v_proj"], exclude_modules=r".*\.0\..*")
    for name, num_layers in (("one layer", 1), ("excluded", 2)):
        found = command(refusing_engine, "load", name)["adapters"]
        assert found[-1]["num_layers"] == num_layers
        command(refusing_engine, "unload", name)


def test_experts_are_refused() -> None:
    from textgen_engine.adapters.peft_folder import AdapterError, LinearSizes, _check_targets

    name = "model.layers.0.mlp.experts.3.up_proj"
    with pytest.raises(AdapterError, match="experts are not supported"):
        _check_targets({"target_modules": "all-linear"}, [name], {name: LinearSizes(4, 4)}, None)


def test_a_required_adapter_that_cannot_be_loaded(llama: Path, tmp_path: Path) -> None:
    lora = LoraConfig((AdapterSpec("x", str(tmp_path / "nothing")),))
    with pytest.raises(ModelLoadError, match=r"cannot load the adapter 'x': the folder .* does not exist"):
        Harness(make_config(llama, lora=lora))


# ---- pieces --------------------------------------------------------------------------------------------------------


def test_lora_adapters_syntax() -> None:
    assert parse_adapters(" a , b=/x/y, org/c@main ,d=z@1,") == (
        AdapterSpec("a"),
        AdapterSpec("b", "/x/y"),
        AdapterSpec("org/c", None, "main"),
        AdapterSpec("d", "z", "1"),
    )
    for text in ("a=b=c", "a@b@c", "=x", "a,a=b", "x" * 129):
        with pytest.raises(ConfigError, match="LORA_ADAPTERS"):
            build_config({}, {"MODEL_ID": "m", "LORA_ADAPTERS": text})
    with pytest.raises(ConfigError, match="names 3 adapters; at most 2"):
        build_config({}, {"MODEL_ID": "m", "LORA_ADAPTERS": "a,b,c", "TEXTGEN_MAX_LORAS": "2"})
    with pytest.raises(ConfigError, match="BATCH_INVARIANT"):
        build_config({}, {"MODEL_ID": "m", "LORA_ADAPTERS": "a", "TEXTGEN_BATCH_INVARIANT": "1"})
    config = build_config({"lora_adapters": "a=b"}, {"MODEL_ID": "m"}).lora
    assert config.adapters == (AdapterSpec("a", "b"),) and config.is_enabled and config.folder is None


def test_runs() -> None:
    from textgen_engine.adapters.spec import AdapterHandle, AdapterRun

    a, b = AdapterHandle("a", 0, 1), AdapterHandle("b", 3, 2)
    assert find_runs([None, a, a, None, b, a], [2, 1, 3, 1, 0, 2]) == (AdapterRun(0, 2, 6), AdapterRun(0, 7, 9))


def test_steps_without_adapters_run_the_plain_layers(llama: Path) -> None:
    """A model that may take adapters is untouched until one is loaded; then only what that one adapts is wrapped."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama)
    before = dict(model.named_modules())
    AdapterLayers(model, torch.float32, torch.device("cpu"))
    assert dict(model.named_modules()) == before
