"""The equalities that the engine promises: nothing about a batch, a chunk, a cache or a preemption changes a token.

All on tiny float32 checkpoints. Token ids are compared exactly. Log-probabilities may differ by the order in which
sums are taken, so they are compared within 1e-4 (float32, sums of 64 to 512 terms).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from textgen_engine.errors import ModelLoadError
from textgen_engine.request import GenerationRequest, OutputParams
from textgen_engine.sampling.params import SamplingParams

from .tiny import VOCAB_SIZE, Answer, Harness, make_request

NewEngine = Callable[..., Harness]
LOGPROB_TOLERANCE = 1e-4
SAMPLING = {
    "free": SamplingParams(do_sample=True, seed=1234, temperature=0.9),
    "cut": SamplingParams(do_sample=True, seed=99, temperature=1.3, top_k=20, top_p=0.9),
    "penalized": SamplingParams(do_sample=True, seed=5, repetition_penalty=1.3, frequency_penalty=0.5),
}


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def requests_of(prompts: list[list[int]], num_tokens: int = 24, prefix: str = "r") -> list[GenerationRequest]:
    return [make_request(f"{prefix}{index}", prompt, num_tokens) for index, prompt in enumerate(prompts)]


def ids_of(answers: dict[str, Answer]) -> list[list[int]]:
    for answer in answers.values():
        assert answer.error is None, answer.error
    return [answer.ids() for answer in answers.values()]


def generate(folder: Path, prompts: list[list[int]], num_tokens: int = 24) -> list[list[int]]:
    """What transformers' own generate makes of each prompt, greedily, with its own attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens, pad_token_id=0
            )
        texts.append(whole[0, len(prompt) :].tolist())
    return texts


PROMPTS = prompts_of([5, 1, 17, 64, 33, 100, 16, 48])


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[int]]:
    texts = generate(llama, PROMPTS)
    assert len({tuple(text) for text in texts}) == len(texts), "a model that always says the same proves nothing"
    return texts


def test_alone_equals_generate(new_engine: NewEngine, expected: list[list[int]]) -> None:
    harness = new_engine()
    assert [harness.run_alone(request).ids() for request in requests_of(PROMPTS)] == expected


@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
def test_batched_equals_generate(new_engine: NewEngine, expected: list[list[int]], block_size: int) -> None:
    harness = new_engine(block_size=block_size, num_blocks=1024 // block_size)
    assert ids_of(harness.run(requests_of(PROMPTS))) == expected


@pytest.mark.parametrize("tokens_per_step", [3, 16, 50])
def test_chunked_equals_whole(new_engine: NewEngine, expected: list[list[int]], tokens_per_step: int) -> None:
    harness = new_engine(tokens_per_step=tokens_per_step)
    assert ids_of(harness.run(requests_of(PROMPTS))) == expected
    assert max(report.metrics.num_prefill_tokens for report in harness.reports if report.metrics) <= tokens_per_step


def test_joining_and_leaving_changes_nothing(new_engine: NewEngine, expected: list[list[int]]) -> None:
    harness = new_engine()
    for index, request in enumerate(requests_of(PROMPTS)):
        harness.submit(request, make_request(f"neighbour {index}", PROMPTS[index][:7], 2 + index))
        harness.step(3)
        if index % 2:
            harness.engine.cancel(f"neighbour {index}")
    harness.until_idle()
    assert [harness.answers[f"r{index}"].ids() for index in range(len(PROMPTS))] == expected


def test_preempted_equals_undisturbed(new_engine: NewEngine, expected: list[list[int]]) -> None:
    harness = new_engine(block_size=4, num_blocks=40, max_total_tokens=150)
    assert ids_of(harness.run(requests_of(PROMPTS))) == expected
    assert harness.num_preemptions > 0, "the cache was meant to be too small"


def test_preempted_without_a_prefix_cache(new_engine: NewEngine, expected: list[list[int]]) -> None:
    harness = new_engine(block_size=4, num_blocks=40, max_total_tokens=150, prefix_caching=False, tokens_per_step=16)
    assert ids_of(harness.run(requests_of(PROMPTS))) == expected
    assert harness.num_preemptions > 0, "the cache was meant to be too small"


def test_cached_prefix_equals_uncached(new_engine: NewEngine, llama: Path) -> None:
    common = PROMPTS[5]
    prompts = [common + tail for tail in prompts_of([1, 9, 30], seed=1)] + [common[:50]]
    expected = generate(llama, prompts)
    harness = new_engine()
    harness.run(requests_of([common], prefix="first"))
    answers = harness.run(requests_of(prompts))
    assert ids_of(answers) == expected
    assert [answer.outputs[0].num_cached_tokens for answer in answers.values()] == [96, 96, 96, 48]
    # And again, when their own blocks are there as well, generated tokens included.
    longer = [prompt + text[:20] for prompt, text in zip(prompts, expected, strict=True)]
    again = harness.run(requests_of(longer, 4, prefix="again"))
    assert ids_of(again) == [text[20:] for text in expected]
    assert again["again0"].outputs[0].num_cached_tokens == 112


def test_a_prefix_is_shared_with_one_that_still_runs(new_engine: NewEngine, expected: list[list[int]]) -> None:
    harness = new_engine()
    harness.submit(make_request("first", PROMPTS[5], 24))
    harness.step(3)
    harness.submit(make_request("second", PROMPTS[5], 24))
    harness.until_idle()
    assert harness.answers["first"].ids() == harness.answers["second"].ids() == expected[5]
    assert harness.answers["second"].outputs[0].num_cached_tokens == 96


def test_salts_keep_prefixes_apart(new_engine: NewEngine, expected: list[list[int]]) -> None:
    harness = new_engine()
    harness.run_alone(make_request("a", PROMPTS[5], 24, cache_salt="a"))
    other = harness.run_alone(make_request("b", PROMPTS[5], 24, cache_salt="b"))
    assert other.outputs[0].num_cached_tokens == 0 and other.ids() == expected[5]


# ---- sampling ------------------------------------------------------------------------------------------------------


def sampled(request_id: str, index: int, sampling: SamplingParams, num_tokens: int = 24) -> GenerationRequest:
    return make_request(request_id, PROMPTS[index], num_tokens, sampling=sampling, ignore_eos_token=True)


@pytest.mark.parametrize("kind", SAMPLING)
def test_a_seed_gives_the_same_tokens_whatever_happens_around_it(new_engine: NewEngine, kind: str) -> None:
    sampling = SAMPLING[kind]
    alone = new_engine().run_alone(sampled("alone", 2, sampling)).ids()
    assert new_engine(max_sequences=3, block_size=4).run_alone(sampled("fresh", 2, sampling)).ids() == alone

    harness = new_engine()
    rng = random.Random(0)
    harness.submit(*(sampled(f"before {i}", i, SamplingParams(do_sample=True, seed=i), 3 + i) for i in range(5)))
    harness.step(2)
    harness.submit(sampled("amid", 2, sampling))
    for step in range(24):
        harness.submit(sampled(f"joins {step}", rng.randrange(8), SAMPLING[rng.choice(list(SAMPLING))], step % 7 + 1))
        if step % 3 == 0:
            harness.engine.cancel(f"joins {step // 2}")
        harness.step()
    harness.until_idle()
    assert harness.answers["amid"].ids() == alone

    harness = new_engine(block_size=4, num_blocks=40, max_total_tokens=150)
    harness.submit(*(sampled(f"other {i}", i, SAMPLING["free"]) for i in range(8)))
    harness.submit(sampled("preempted", 2, sampling, 24))
    harness.until_idle()
    assert harness.num_preemptions > 0
    assert harness.answers["preempted"].ids() == alone


def test_seeds_differ(new_engine: NewEngine) -> None:
    harness = new_engine()
    texts = harness.run(sampled(f"s{seed}", 2, SamplingParams(do_sample=True, seed=seed)) for seed in range(8))
    assert len({tuple(ids) for ids in ids_of(texts)}) == 8


@pytest.mark.parametrize("options", [{}, {"max_sequences": 2}, {"block_size": 4, "num_blocks": 24}])
def test_choices_share_the_prompt_and_go_their_own_ways(new_engine: NewEngine, options: dict[str, int]) -> None:
    """With fewer slots than choices, and with preemption, too."""
    sampling = SAMPLING["free"]
    alone = new_engine().run_alone(sampled("alone", 4, sampling, 40)).ids()
    harness = new_engine(**options, max_total_tokens=90)
    request = make_request("n", PROMPTS[4], 40, sampling=sampling, ignore_eos_token=True, n=4)
    answer = harness.run_alone(request)
    choices = [answer.ids(choice) for choice in range(4)]
    assert choices[0] == alone
    assert len({tuple(ids) for ids in choices}) == 4 and {len(ids) for ids in choices} == {40}
    if "num_blocks" in options:
        assert harness.num_preemptions > 0
    undisturbed = new_engine().run_alone(request)
    assert choices == [undisturbed.ids(choice) for choice in range(4)]


def test_each_choice_can_be_repeated_by_the_seed_it_reports(new_engine: NewEngine) -> None:
    harness = new_engine()
    answer = harness.run_alone(make_request("n", PROMPTS[4], 12, sampling=SAMPLING["cut"], ignore_eos_token=True, n=3))
    for choice in range(3):
        seed = next(o.seed for o in answer.outputs if o.choice == choice and o.finish_reason is not None)
        alone = SamplingParams(do_sample=True, seed=seed, temperature=1.3, top_k=20, top_p=0.9)
        assert harness.run_alone(sampled(f"again {choice}", 4, alone, 12)).ids() == answer.ids(choice)


def test_choices_share_blocks(new_engine: NewEngine) -> None:
    harness = new_engine(block_size=16)
    harness.submit(make_request("n", PROMPTS[5], 8, sampling=SAMPLING["free"], ignore_eos_token=True, n=4))
    harness.step()
    assert harness.engine._rooms.blocks.num_used == 7, "100 tokens in blocks of 16, once for all choices"
    harness.step()
    assert harness.engine._rooms.blocks.num_used == 10, "six full ones shared, and each choice's own last one"
    harness.until_idle()


# ---- log-probabilities ---------------------------------------------------------------------------------------------


def true_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """transformers' log-softmax after each token, [num_tokens, vocab]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)


@pytest.mark.parametrize("options", [{}, {"tokens_per_step": 16}, {"block_size": 4, "num_blocks": 40}])
def test_logprobs_equal_transformers(new_engine: NewEngine, llama: Path, options: dict[str, int]) -> None:
    harness = new_engine(**options, max_total_tokens=150)
    wanted = OutputParams(logprobs=True, token_details=True, prompt_logprobs=True, top_n_tokens=3)
    answers = harness.run(
        make_request(f"r{index}", prompt, 10, output=wanted, ignore_eos_token=True)
        for index, prompt in enumerate(PROMPTS)
    )
    if options.get("num_blocks") == 40:
        assert harness.num_preemptions > 0, "the cache was meant to be too small"
    for prompt, answer in zip(PROMPTS, answers.values(), strict=True):
        ids = prompt + answer.ids()
        scores = true_logprobs(llama, ids)
        details = answer.prompt_details + answer.details()
        assert [detail.id for detail in details] == ids
        assert details[0].logprob is None
        for position, detail in enumerate(details[1:]):
            assert detail.logprob is not None
            assert detail.logprob == pytest.approx(scores[position, ids[position + 1]].item(), abs=LOGPROB_TOLERANCE)
            best = scores[position].topk(3)
            assert [top.id for top in detail.top] == best.indices.tolist()
            found = [top.logprob for top in detail.top]
            assert found == pytest.approx(best.values.tolist(), abs=LOGPROB_TOLERANCE)


# ---- architectures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        "mistral",
        "qwen2",
        "qwen3",
        "gpt_neox",
        "phi",
        "phi3",
        "gemma",
        "gemma3",
        "gpt2",
        "opt",
        "starcoder2",
        "smollm3",
        "olmo",
        "olmo2",
        "granite",
        "cohere",
        "gpt_bigcode",
        "mixtral",
        "gemma2",
        "gpt_oss",
        "deepseek_v2",
        "deepseek_v3",
        "qwen3_moe",
        "bloom",
        "mpt",
        "falcon",
        "falcon_alibi",
        "falcon_grouped",
        "gptj",
        "codegen",
        "gpt_neo",
        "llama4",
    ],
)
def test_families_equal_generate(new_engine: NewEngine, checkpoint: Callable[[str], Path], family: str) -> None:
    """Grouped heads, norms on heads, partial rotation, learned positions, windows of 8 in all or some layers."""
    folder = checkpoint(family)
    prompts = PROMPTS[:6]
    expected = generate(folder, prompts)
    assert len({tuple(text) for text in expected}) > 3
    assert ids_of(new_engine(folder).run(requests_of(prompts))) == expected
    small = new_engine(folder, tokens_per_step=16, block_size=4, num_blocks=40, max_total_tokens=150)
    assert ids_of(small.run(requests_of(prompts))) == expected


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "MambaMixer"),
    ],
)
def test_what_the_attention_cannot_serve_is_refused_when_it_is_loaded(
    new_engine: NewEngine, checkpoint: Callable[[str], Path], family: str, reason: str
) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        new_engine(checkpoint(family))
