"""An adapter in a mixed batch gives what the model with that adapter merged into its weights gives alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from textgen_engine.adapters.spec import AdapterSpec
from textgen_engine.config import LoraConfig
from textgen_engine.request import GenerationRequest, OutputParams
from textgen_engine.sampling.params import SamplingParams

from ..test_engine_equalities import generate, ids_of, prompts_of
from ..tiny import Answer, Harness, make_request, save_checkpoint
from .folders import linear_sizes, save_adapter, save_merged

NewEngine = Callable[..., Harness]
NAMES = ("attention", "mlp", "everything", None)  # None: the model as it is
PROMPTS = prompts_of([5, 1, 17, 64, 33, 100, 16, 48, 9, 70, 24, 3])
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three adapters of unlike layers, ranks and scales."""
    folder = tmp_path_factory.mktemp("adapters")
    sizes = linear_sizes(llama)
    save_adapter(folder / "attention", sizes, ["q_proj", "v_proj"], seed=1)
    save_adapter(
        folder / "mlp",
        sizes,
        r"model\.layers\.[01]\.mlp\.(up|down|gate)_proj",
        rank=12,
        alpha=4,
        seed=2,
        use_rslora=True,
    )
    save_adapter(
        folder / "everything",
        sizes,
        [*("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj"), "lm_head"],
        rank=3,
        seed=3,
        ranks={"o_proj": 5},
        alpha_pattern={"up_proj": 2},
    )
    return folder


@pytest.fixture(scope="module")
def merged(llama: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """Adapter -> the checkpoint with it in its weights."""
    folder = tmp_path_factory.mktemp("merged")
    return {name: save_merged(folder / name, llama, adapters / name) if name else llama for name in NAMES}


@pytest.fixture(scope="module")
def expected(merged: dict[str | None, Path]) -> list[list[int]]:
    """What transformers makes of each prompt with the weights of its adapter."""
    texts: list[list[int]] = [[] for _ in PROMPTS]
    for index, name in enumerate(NAMES):
        rows = range(index, len(PROMPTS), len(NAMES))
        found = generate(merged[name], [PROMPTS[row] for row in rows], NUM_TOKENS)
        for row, text in zip(rows, found, strict=True):
            texts[row] = text
    plain = generate(merged[None], PROMPTS, NUM_TOKENS)
    changed = [text != base for text, base in zip(texts, plain, strict=True)]
    assert changed == [name is not None for name in NAMES] * 3, "an adapter that changes nothing proves nothing"
    return texts


def lora(adapters: Path, **options: Any) -> LoraConfig:
    return LoraConfig(tuple(AdapterSpec(name, str(adapters / name)) for name in NAMES if name), **options)


def requests_of(prefix: str = "r", **fields: Any) -> list[GenerationRequest]:
    return [
        make_request(f"{prefix}{row}", prompt, NUM_TOKENS, adapter_id=NAMES[row % len(NAMES)], **fields)
        for row, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokens_per_step": 16, "max_sequences": 16},
        {"block_size": 4, "num_blocks": 48, "max_total_tokens": 150},
        {"prefix_caching": False, "tokens_per_step": 50},
    ],
    ids=["whole", "chunked", "preempted", "uncached"],
)
def test_mixed_batch_equals_merged_weights(
    new_engine: NewEngine, adapters: Path, expected: list[list[int]], options: dict[str, Any]
) -> None:
    harness = new_engine(lora=lora(adapters), **options)
    assert ids_of(harness.run(requests_of())) == expected
    assert (harness.num_preemptions > 0) == ("num_blocks" in options)


def test_alone_and_one_by_one_over_one_cache(new_engine: NewEngine, adapters: Path, expected: list[list[int]]) -> None:
    harness = new_engine(lora=lora(adapters))
    assert [harness.run_alone(request).ids() for request in requests_of()] == expected
    assert ids_of(harness.run(requests_of("again"))) == expected


def test_prefixes_are_shared_within_an_adapter_alone(new_engine: NewEngine, adapters: Path) -> None:
    harness = new_engine(lora=lora(adapters))
    for round_number, cached in ((0, 0), (1, 96)):
        for name in NAMES:
            request = make_request(f"{name} {round_number}", PROMPTS[5], 4, adapter_id=name)
            assert harness.run_alone(request).outputs[0].num_cached_tokens == cached, name


def test_seeds_and_choices(new_engine: NewEngine, adapters: Path) -> None:
    """A sampled text is the same alone and beside unlike neighbours; choices of one prompt share its adapter."""
    sampling = SamplingParams(do_sample=True, seed=11, temperature=0.8, repetition_penalty=1.2)
    harness = new_engine(lora=lora(adapters))
    requests = requests_of(sampling=sampling, n=2, ignore_eos_token=True)
    together = harness.run(requests)
    for request in requests[:6]:
        alone = new_engine(lora=lora(adapters)).run_alone(request)
        for choice in range(2):
            assert alone.ids(choice) == together[request.request_id].ids(choice)


def test_log_probabilities(new_engine: NewEngine, adapters: Path, merged: dict[str | None, Path]) -> None:
    output = OutputParams(logprobs=True, prompt_logprobs=True, token_details=True)
    found = new_engine(lora=lora(adapters)).run(requests_of(output=output))
    plain = {name: new_engine(merged[name]) for name in NAMES}

    def values(answer: Answer) -> torch.Tensor:
        details = [*answer.prompt_details[1:], *answer.details()]
        return torch.tensor([detail.logprob for detail in details])

    for row, request in enumerate(requests_of(output=output)):
        name = NAMES[row % len(NAMES)]
        base = make_request(request.request_id, PROMPTS[row], NUM_TOKENS, output=output)
        torch.testing.assert_close(
            values(found[request.request_id]), values(plain[name].run_alone(base)), atol=1e-3, rtol=0
        )


def test_equals_peft(llama: Path, adapters: Path, merged: dict[str | None, Path]) -> None:
    """PEFT reads the folders as the formula of these tests does."""
    ids = torch.tensor([PROMPTS[4]])
    for name in filter(None, NAMES):
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapters / name)
        ours = AutoModelForCausalLM.from_pretrained(merged[name])
        with torch.inference_mode():
            torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox", "phi3", "mixtral", "starcoder2"])
def test_families(family: str, checkpoint: Callable[[str], Path], new_engine: NewEngine, tmp_path: Path) -> None:
    """Every kind of linear layer: transposed ones, with biases, joined by the model itself."""
    model = checkpoint(family)
    sizes = linear_sizes(model)
    # Wide models of this kind repeat themselves less; lm_head is left out where it is the embedding as well.
    save_adapter(tmp_path / "a", sizes, "all-linear", rank=4, alpha=4)
    texts = generate(save_merged(tmp_path / "merged", model, tmp_path / "a"), PROMPTS[:4], 8)
    plain = generate(model, PROMPTS[:4], 8)
    assert texts != plain
    harness = new_engine(model, lora=LoraConfig((AdapterSpec("a", str(tmp_path / "a")),)))
    requests = [make_request(f"a{row}", prompt, 8, adapter_id="a") for row, prompt in enumerate(PROMPTS[:4])]
    requests += [make_request(f"b{row}", prompt, 8) for row, prompt in enumerate(PROMPTS[:4])]
    assert ids_of(harness.run(requests)) == texts + plain


def test_the_models_own_weights_beside_the_adapter(
    tmp_path: Path, new_engine: NewEngine, llama: Path, adapters: Path
) -> None:
    """PEFT saves the embeddings too when they are among the targets; equal ones are no reason to refuse."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    PeftModel.from_pretrained(model, adapters / "everything").save_pretrained(tmp_path / "a")
    spec = AdapterSpec("a", str(tmp_path / "a"))
    answer = new_engine(lora=LoraConfig((spec,))).run_alone(make_request("r", PROMPTS[4], 8, adapter_id="a"))
    same = new_engine(lora=lora(adapters)).run_alone(make_request("r", PROMPTS[4], 8, adapter_id="everything"))
    assert answer.ids() == same.ids()


def test_a_name_loaded_anew_shares_nothing(tmp_path: Path, new_engine: NewEngine, llama: Path, adapters: Path) -> None:
    """Neither the old adapter's cached prefix nor its matrices."""
    from .test_registry import command

    harness = new_engine(lora=LoraConfig(folder=str(tmp_path)))
    texts = []
    for source in ("everything", "attention"):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(adapters / source, tmp_path / "a")
        assert command(harness, "load", "a")["adapters"][0]["name"] == "a"
        texts.append(harness.run_alone(make_request(source, PROMPTS[5], 8, adapter_id="a")).ids())
        command(harness, "unload", "a")
    fresh = new_engine(lora=lora(adapters))
    for source, text in zip(("everything", "attention"), texts, strict=True):
        assert fresh.run_alone(make_request(source, PROMPTS[5], 8, adapter_id=source)).ids() == text


def test_sliding_checkpoint_with_tied_embeddings(tmp_path: Path, new_engine: NewEngine) -> None:
    """An adapter of an output layer that shares its weight with the embedding changes the output alone."""
    model = save_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    sizes = linear_sizes(model)
    save_adapter(tmp_path / "a", sizes, ["lm_head"], rank=2)
    harness = new_engine(model, lora=LoraConfig((AdapterSpec("a", str(tmp_path / "a")),)))
    requests = [make_request("a", PROMPTS[2], 8, adapter_id="a"), make_request("b", PROMPTS[2], 8)]
    answers = harness.run(requests)
    assert answers["b"].ids() == generate(model, [PROMPTS[2]], 8)[0]
    assert answers["a"].ids() != answers["b"].ids()
