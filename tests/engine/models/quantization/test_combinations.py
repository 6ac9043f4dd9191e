"""Quantized weights and caches together with adapters, guessed tokens and cached prefixes; and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from textgen_engine.adapters.spec import AdapterSpec
from textgen_engine.config import LoraConfig
from textgen_engine.configure import build_config
from textgen_engine.errors import ConfigError
from textgen_quantization import packers

from ...adapters.folders import linear_sizes, save_adapter
from ...test_speculation import consult
from ...tiny import Harness, make_request, save_checkpoint
from .test_methods import STORED

NewEngine = Callable[..., Harness]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [100], [33, 34] * 20, [2, 300, 4]]
ADAPTERS = ("attention", "everything", None, "everything")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "model", intermediate_size=128)


@pytest.fixture(scope="module")
def lora(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> LoraConfig:
    folder, sizes = tmp_path_factory.mktemp("adapters"), linear_sizes(plain)
    save_adapter(folder / "attention", sizes, ["q_proj", "v_proj"], seed=1)
    save_adapter(folder / "everything", sizes, "all-linear", rank=3, seed=3)
    return LoraConfig(tuple(AdapterSpec(name, str(folder / name)) for name in ("attention", "everything")))


def answers(harness: Harness, *, adapters: bool = False, num_tokens: int = 12) -> list[list[int]]:
    """All in one batch; the first one alone afterwards must not differ."""
    requests = [
        make_request(
            f"r{row}", prompt, num_tokens, ignore_eos_token=True, adapter_id=ADAPTERS[row] if adapters else None
        )
        for row, prompt in enumerate(PROMPTS)
    ]
    found = harness.run(requests)
    texts = [found[request.request_id].ids() for request in requests]
    assert harness.run_alone(replace(requests[0], request_id="alone")).ids() == texts[0]
    return texts


@pytest.mark.parametrize("name", ["awq", "gptq 4 bits, act-order", "fp8 by uneven blocks", "bitsandbytes nf4, nested"])
def test_adapters_add_to_quantized_layers(
    plain: Path, tmp_path: Path, lora: LoraConfig, new_engine: NewEngine, name: str
) -> None:
    """Three adapters' rows in one batch: the texts are those of the same adapters on the weights meant."""
    folder = packers.repack(plain, tmp_path, *STORED[name])
    found = answers(new_engine(folder / "packed", lora=lora), adapters=True)
    assert found == answers(new_engine(folder / "meant", lora=lora), adapters=True)
    assert found[1] != answers(new_engine(folder / "packed"))[1], "an adapter that changes nothing proves nothing"


@pytest.mark.parametrize("method", ["int8", "bitsandbytes-nf4", "fp8"])
def test_adapters_and_guesses_with_weights_quantized_at_load(
    plain: Path, lora: LoraConfig, new_engine: NewEngine, method: str
) -> None:
    """Guesses change nothing, with adapters or without; adapters change what they are asked for."""
    without = new_engine(plain, quantize=method, lora=lora)
    guessing = new_engine(plain, quantize=method, lora=lora, guesses=3)
    expected = answers(without, adapters=True, num_tokens=24)
    consult(guessing, without.answers, random.Random(0))
    assert answers(guessing, adapters=True, num_tokens=24) == expected
    base = answers(new_engine(plain, quantize=method), num_tokens=24)
    assert [text == plain_text for text, plain_text in zip(expected, base, strict=True)] == [False, False, True, False]
    assert sum(report.metrics.num_guessed_right for report in guessing.reports if report.metrics) > 0


@pytest.mark.parametrize("method", [None, "int8", "bitsandbytes-nf4"])
@pytest.mark.parametrize("kind", ["fp8_e4m3fn", "fp8_e5m2"])
def test_a_small_cache_with_prefixes_chunks_guesses_and_adapters(
    plain: Path, lora: LoraConfig, new_engine: NewEngine, method: str | None, kind: str
) -> None:
    """Keys and values are read back as they were rounded, whoever computed them and in whatever pieces."""
    whole = new_engine(plain, quantize=method, kv_cache_dtype=kind, lora=lora, block_size=4)
    expected = answers(whole, adapters=True)
    again = make_request("again", PROMPTS[2], 12, ignore_eos_token=True)
    cached = whole.run_alone(again)
    assert cached.ids() == expected[2]
    assert cached.outputs[0].num_cached_tokens >= 36
    chunked = new_engine(
        plain, quantize=method, kv_cache_dtype=kind, lora=lora, tokens_per_step=16, max_sequences=4, guesses=2
    )
    found = answers(chunked, adapters=True)
    num_same = sum(text == other for text, other in zip(found, expected, strict=True))
    # A last bit that differs may take an activation to the next of 255 integers.
    assert num_same >= (len(PROMPTS) - 1 if method == "int8" else len(PROMPTS))


def test_a_small_cache_in_the_batch_invariant_mode(plain: Path, new_engine: NewEngine) -> None:
    whole, chunked = (
        new_engine(plain, kv_cache_dtype="fp8_e4m3fn", batch_invariant=True, **sizes)
        for sizes in ({}, {"tokens_per_step": 16, "max_sequences": 4})
    )
    assert answers(whole) == answers(chunked)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"QUANTIZE": "int8", "TEXTGEN_BATCH_INVARIANT": "true"}, "cannot be combined with QUANTIZE"),
        (
            {"KV_CACHE_DTYPE": "fp8_e5m2", "TEXTGEN_DENSE_FALLBACK": "true"},
            "KV_CACHE_DTYPE=fp8_e5m2 cannot be combined",
        ),
        ({"QUANTIZE": "int4"}, "QUANTIZE"),
    ],
)
def test_what_does_not_go_together_is_refused_at_start(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_config({}, {"MODEL_ID": "/models/m", **environment})
