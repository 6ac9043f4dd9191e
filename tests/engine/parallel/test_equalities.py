"""Several ranks answer as one does: the same tokens, and logits that differ only by the order of float32 additions.

Each step's logits are compared within 2e-5 of the largest logit of the model: partial sums over two to four ranks, of
64 to 512 terms each, through two or three layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from textgen_engine.sampling.params import SamplingParams

from ..test_engine_equalities import ids_of, prompts_of, requests_of
from ..tiny import Harness, make_config, make_request, save_checkpoint
from .threads import RankThreads, record_logits

RELATIVE_TOLERANCE = 2e-5
PROMPTS = prompts_of([5, 1, 33, 64, 17, 100])
NewRanks = Callable[..., Harness]


@pytest.fixture
def new_ranks() -> Iterator[NewRanks]:
    """Makes an engine over so many ranks, or over one; options are those of tiny.make_config."""
    made: list[Harness] = []

    def make(model: Path, world_size: int, **options: Any) -> Harness:
        config = make_config(model, **options)
        ranks = RankThreads(config, world_size) if world_size > 1 else None
        made.append(Harness(config, ranks))
        return made[-1]

    yield make
    for harness in made:
        harness.close()


def assert_alike(found: Harness, expected: Harness, prompts: list[list[int]] = PROMPTS, num_tokens: int = 12) -> None:
    """The same requests give the same tokens in the same steps, and logits within the tolerance."""
    ours, theirs = record_logits(found), record_logits(expected)
    ids = ids_of(found.run(requests_of(prompts, num_tokens)))
    assert ids == ids_of(expected.run(requests_of(prompts, num_tokens)))
    assert len({tuple(text) for text in ids}) > len(prompts) // 2, "a model that always says the same proves nothing"
    assert len(ours.logits) == len(theirs.logits)
    for given, right in zip(ours.logits, theirs.logits, strict=True):
        if not right.numel():
            continue  # a step of nothing but a chunk
        torch.testing.assert_close(given, right, rtol=0, atol=RELATIVE_TOLERANCE * float(right.abs().max()))


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
    assert_alike(new_ranks(folder, world_size), new_ranks(folder, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"tokens_per_step": 16},
        {"block_size": 4, "num_blocks": 40, "max_total_tokens": 150, "tokens_per_step": 32},
    ],
    ids=["chunked", "preempted"],
)
def test_chunking_preemption_and_prefix_cache(new_ranks: NewRanks, llama: Path, options: dict[str, int]) -> None:
    found, expected = new_ranks(llama, 2, **options), new_ranks(llama, 1, **options)
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
