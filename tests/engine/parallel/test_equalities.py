"""Several ranks answer as one does: the same tokens, and logits that differ only by the order of float32 additions.

How near is said in threads.py.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from textgen_engine.sampling.params import SamplingParams

from ..test_engine_equalities import ids_of, requests_of
from ..test_speculation import consult, counts
from ..tiny import make_request, save_checkpoint
from .threads import PROMPTS, NewRanks, assert_alike

# family, ranks, what differs from tiny.FAMILIES
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("llama", 2, {}),
    ("llama", 4, {}),  # two key-value heads on four ranks
    ("llama", 2, {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}),  # two groups and one
    ("llama", 4, {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "attention_bias": True}),
    ("llama", 3, {"tie_word_embeddings": True, "vocab_size": 515, "num_attention_heads": 6, "hidden_size": 96}),
    ("mistral", 2, {}),
    ("qwen2", 2, {}),
    ("qwen3", 2, {}),
    ("qwen3", 4, {}),
    ("gemma", 2, {}),
    ("gemma", 4, {}),
    ("gemma3", 2, {}),
    ("mixtral", 2, {}),
    ("mixtral", 4, {}),
    ("starcoder2", 2, {}),
    ("starcoder2", 4, {}),
    ("gpt2", 2, {}),
    ("gpt2", 4, {}),
    ("gpt_bigcode", 2, {}),
    ("gpt_bigcode", 2, {"multi_query": False}),
    ("gpt_neox", 2, {}),
    ("falcon", 2, {}),
    ("falcon", 4, {}),
    ("falcon_alibi", 4, {}),
    ("falcon_grouped", 2, {}),
    ("falcon_grouped", 4, {}),
    ("bloom", 2, {}),
    ("mpt", 2, {}),
    ("gptj", 2, {}),
    ("gemma2", 2, {}),
    ("opt", 2, {}),
    ("phi", 2, {}),
    ("phi3", 2, {}),
    ("phi3", 4, {}),
    ("olmo2", 2, {}),
    ("smollm3", 2, {}),
    ("granite", 2, {}),
    ("cohere", 2, {}),
    ("cohere", 2, {"use_qk_norm": True}),
    ("qwen3_moe", 2, {}),
    ("deepseek_v2", 2, {}),
    ("deepseek_v3", 4, {}),
    ("deepseek_v3", 2, {"q_lora_rank": None, "attention_bias": True}),
    ("gpt_oss", 2, {}),
    ("gpt_oss", 4, {"intermediate_size": 64}),
    ("codegen", 2, {"num_attention_heads": 8, "rotary_dim": 4}),
]


@pytest.mark.parametrize(("family", "world_size", "changes"), CASES, ids=lambda value: str(value))
def test_ranks_equal_one(
    new_ranks: NewRanks,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    world_size: int,
    changes: dict[str, Any],
) -> None:
    folder = save_checkpoint(tmp_path / "model", family, **changes) if changes else checkpoint(family)
    folder = with_biases(folder, tmp_path / "biased")
    assert_alike(new_ranks(folder, world_size), new_ranks(folder, 1))


def with_biases(folder: Path, copy: Path) -> Path:
    """The checkpoint with random numbers for biases, if it has any: transformers makes them zeros, which may be added
    on every rank and never be noticed."""
    weights = load_file(folder / "model.safetensors")
    biases = [name for name in weights if name.endswith("bias")]
    if not biases:
        return folder
    generator = torch.Generator().manual_seed(1)
    for name in biases:
        weights[name] = 0.3 * torch.randn(weights[name].shape, generator=generator)
    shutil.copytree(folder, copy)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (4, {"tokens_per_step": 16}),
        (2, {"block_size": 4, "num_blocks": 40, "max_total_tokens": 150, "tokens_per_step": 32}),
    ],
    ids=["chunked", "preempted"],
)
def test_chunking_preemption_and_prefix_cache(
    new_ranks: NewRanks, llama: Path, world_size: int, options: dict[str, int]
) -> None:
    found, expected = new_ranks(llama, world_size, **options), new_ranks(llama, 1, **options)
    assert_alike(found, expected, num_tokens=24)
    assert found.num_preemptions == expected.num_preemptions
    assert bool(found.num_preemptions) == ("num_blocks" in options)
    again = found.run(requests_of(PROMPTS, 24, prefix="again"))
    assert ids_of(again) == ids_of(expected.run(requests_of(PROMPTS, 24, prefix="again")))
    assert any(answer.outputs[0].num_cached_tokens for answer in again.values())


def test_sampled_choices_that_share_a_prompt(new_ranks: NewRanks, llama: Path) -> None:
    """Copy-on-write of blocks reaches every rank."""
    sampling = SamplingParams(do_sample=True, seed=3, temperature=0.9)
    request = make_request("n", PROMPTS[4], 20, sampling=sampling, ignore_eos_token=True, n=3)
    found, expected = (new_ranks(llama, world_size).run_alone(request) for world_size in (2, 1))
    assert [found.ids(choice) for choice in range(3)] == [expected.ids(choice) for choice in range(3)]


def test_guesses_change_no_token(new_ranks: NewRanks, llama: Path) -> None:
    """Rows of guessed tokens, each a decode of its own, reach every rank as such."""
    found, expected = new_ranks(llama, 2, guesses=4), new_ranks(llama, 1)
    told = expected.run(requests_of(PROMPTS, 20))
    consult(found, told, random.Random(3))
    assert ids_of(found.run(requests_of(PROMPTS, 20))) == ids_of(told)
    num_guessed, num_right = counts(found)
    assert num_guessed > num_right > 20


@pytest.mark.faults
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_real_model(new_ranks: NewRanks, model_dir: Path, world_size: int) -> None:
    """Nine heads in three groups: of two ranks one has two; of four one has a group, the others share two, and none has
    as much as another. In chunks, beside each other, and with cached prefixes."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = ("The capital of France is", "Once upon a time, in a village by the sea, there lived an old man who")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    found, expected = (new_ranks(model_dir, size, tokens_per_step=12, block_size=8) for size in (world_size, 1))
    assert_alike(found, expected, prompts, num_tokens=6)
    again = found.run(requests_of(prompts, 6, prefix="again"))
    assert ids_of(again) == ids_of(expected.run(requests_of(prompts, 6, prefix="again")))
    assert any(answer.outputs[0].num_cached_tokens for answer in again.values())
