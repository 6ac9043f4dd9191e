"""Greedy text through Triton equals transformers' own `generate`, token for token: alone, and under want of blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..running_server import REPOSITORY_ROOT, SERVER_ENVIRONMENT, RunningServer
from .wire import Wire, wait_until, wait_until_idle

if TYPE_CHECKING:
    from .conftest import Connect

NUM_NEW_TOKENS = 16

# Prompt lengths in tokens. Together several times the server's KV cache. The longest comes first: it is admitted with
# its first chunk, the others beside it, and as it grows it takes their blocks.
TEXT_LENGTHS = (1500, 250, 170, 130, 100, 80, 64, 50, 33, 31, 17, 16, 15, 9, 8, 7, 5)
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain to a child why the sky is blue, and why it is red in the evening.",
)


@pytest.fixture(scope="module")
def cramped_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Small blocks, and a KV cache that the prompts together exceed several times."""
    options = {
        "MODEL_ID": str(model_dir),
        "TEXTGEN_BLOCK_SIZE": "8",
        "MAX_BATCH_TOTAL_TOKENS": "1560",
        "MAX_INPUT_TOKENS": "1520",
        "MAX_TOTAL_TOKENS": "1560",
        "MAX_BATCH_PREFILL_TOKENS": "128",
    }
    running = RunningServer(tmp_path_factory.mktemp("cramped_server"), SERVER_ENVIRONMENT | options)
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> list[list[int]]:
    """Twenty prompts as token ids: English of every length, and chats."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = (REPOSITORY_ROOT / "LICENSE").read_text().split("Definitions.")[1]
    ids: list[int] = tokenizer(text)["input_ids"]
    found, start = [], 0
    for length in TEXT_LENGTHS:
        # Each begins elsewhere, so that the prefix cache does not answer for the rest.
        found.append(ids[start : start + length])
        start += 13
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        found.append(chat["input_ids"])
    assert [len(prompt) for prompt in found[: len(TEXT_LENGTHS)]] == list(TEXT_LENGTHS)
    return found


@pytest.fixture(scope="module")
def model(model_dir: Path) -> PreTrainedModel:
    """The model as transformers runs it, in float32."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def alone(cramped_server: RunningServer, prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """What the server generates for each prompt while it does nothing else."""
    with contextlib.closing(Wire(cramped_server)) as wire:
        yield [wire.ask(**_request(prompt)).token_ids for prompt in prompts]


def _request(prompt: list[int]) -> dict[str, Any]:
    sampling = {"max_new_tokens": NUM_NEW_TOKENS, "details": True}
    return {"input_ids": prompt, "stream": True, "sampling_parameters": sampling}


def test_alone_it_is_what_generate_returns(
    model: PreTrainedModel, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    """By transformers' `generate` for the short prompts; for all, by what it does, in one pass over prompt and text:
    each token is the likeliest after those before it, up to the end of the sequence or of what was asked for."""
    end = model.generation_config.eos_token_id
    for prompt, tokens in zip(prompts, alone, strict=True):
        assert end not in tokens[:-1]
        assert len(tokens) == NUM_NEW_TOKENS or tokens[-1] == end
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]]), logits_to_keep=len(tokens)).logits[0]
        assert logits.argmax(dim=-1).tolist() == tokens
        if len(prompt) < 10:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_NEW_TOKENS)
            assert output[0, len(prompt) :].tolist() == tokens


def test_all_at_once_with_preemption_it_is_the_same(
    cramped_server: RunningServer, connect: Connect, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    wire = connect(cramped_server)
    before = cramped_server.metric("tgi_preemptions")
    outcomes = [waiting.result() for waiting in [wire.ask_soon(**_request(prompt)) for prompt in prompts]]
    assert [outcome.errors for outcome in outcomes] == [[]] * len(prompts)
    assert [outcome.token_ids for outcome in outcomes] == alone
    wait_until(lambda: cramped_server.metric("tgi_preemptions") > before, "a preemption, or this test tests nothing")
    wait_until_idle(cramped_server)
