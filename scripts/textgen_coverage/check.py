"""One checkpoint through the engine and through transformers' own `generate`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from textgen_coverage.recipes import VOCAB_SIZE, NoRecipe, save_checkpoint
from textgen_engine.config import CacheConfig, EngineConfig, LimitsConfig, ModelConfig, SchedulerConfig
from textgen_engine.engine import Engine
from textgen_engine.errors import ConfigError, EngineError, ModelLoadError
from textgen_engine.messages import StepReport
from textgen_engine.models.loader import DENSE_HINT
from textgen_engine.request import GenerationRequest, OutputParams, StoppingParams

Outcome = Literal["works", "refused", "differs", "fails", "untried"]
_PROMPT_LENGTHS = (5, 1, 17, 40, 11, 29)
_NUM_TOKENS = 12
# Float32 sums in another order, through layers that amplify: log-probabilities of a wrong mask are off by 0.1 to 10.
_TOLERANCE = 5e-3


@dataclass
class Verdict:
    """What became of one model type. differs: tokens or log-probabilities unlike transformers'. fails: an error that
    is no refusal. untried: no checkpoint could be made, or transformers' own generate fails on it."""

    model_type: str
    outcome: Outcome
    reason: str = ""
    worst_logprob_error: float | None = None


def try_model(model_type: str, folder: Path) -> Verdict:
    """Make a checkpoint in the folder and compare. Never raises for what a model does."""
    try:
        save_checkpoint(folder, model_type)
    except NoRecipe as error:
        return Verdict(model_type, "untried", str(error))
    except Exception as error:
        return Verdict(model_type, "untried", _line(error))
    return compare(model_type, folder)


def compare(model_type: str, folder: Path) -> Verdict:
    """The engine's greedy texts (batched, in chunks, on small blocks) against `generate`, one prompt at a time."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in _PROMPT_LENGTHS]
    try:
        answers = _run_engine(folder, prompts)
    except (ModelLoadError, ConfigError) as error:
        reason = str(error).replace(str(folder), "the checkpoint").removesuffix(f" ({DENSE_HINT})")
        return Verdict(model_type, "refused", " ".join(reason.split()))
    except Exception as error:
        return Verdict(model_type, "fails", _line(error))
    try:
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        expected = [_generate(stock, prompt) for prompt in prompts]
    except Exception as error:
        return Verdict(model_type, "untried", f"transformers' own generate: {_line(error)}")
    if len({tuple(text) for text in expected}) < 3:
        return Verdict(model_type, "untried", "this random model always says the same")
    try:
        return _compare(model_type, stock, prompts, answers, expected)
    except Exception as error:
        return Verdict(model_type, "untried", f"transformers' own forward: {_line(error)}")


def _compare(
    model_type: str,
    stock: Any,
    prompts: list[list[int]],
    answers: list[tuple[list[int], list[float]]],
    expected: list[list[int]],
) -> Verdict:
    worst = 0.0
    for prompt, (ids, logprobs), text in zip(prompts, answers, expected, strict=True):
        errors, is_best = _errors(stock, prompt, ids, logprobs)
        worst = max(worst, errors)
        # Where two tokens are equally likely, the last bits decide; the log-probabilities still have to agree.
        if worst > _TOLERANCE or (ids != text and not is_best):
            return Verdict(model_type, "differs", f"{ids[:6]} for {text[:6]}", float(f"{worst:.2g}"))
    return Verdict(model_type, "works", "", float(f"{worst:.2g}"))


def _generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=_NUM_TOKENS, pad_token_id=2
        )
    return [int(token_id) for token_id in whole[0, len(prompt) :]]


def _errors(model: Any, prompt: list[int], ids: list[int], logprobs: list[float]) -> tuple[float, bool]:
    """Largest difference between our log-probabilities and transformers' for the same text, without its cache; and
    whether each token is the likeliest one or as good as that."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    scores = torch.log_softmax(logits, dim=-1)
    chosen = scores.gather(1, torch.tensor(ids)[:, None])[:, 0]
    error = float((chosen - torch.tensor(logprobs)).abs().max())
    return error, bool((chosen >= scores.amax(-1) - _TOLERANCE).all())


def _run_engine(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Token ids and log-probabilities of each answer. Raises what the engine raises at load, or a request's error."""
    config = EngineConfig(
        model=ModelConfig(str(folder), dtype="float32", num_threads=1),
        cache=CacheConfig(block_size=4, num_blocks=200),
        scheduler=SchedulerConfig(max_num_sequences=4, max_tokens_per_step=24),
        limits=LimitsConfig(max_total_tokens=100),
        log_level="error",
    )
    outputs: dict[str, tuple[list[int], list[float]]] = {str(row): ([], []) for row in range(len(prompts))}
    open_ids = set(outputs)
    errors: list[EngineError] = []

    def emit(report: StepReport) -> None:
        for output in report.outputs:
            ids, logprobs = outputs[output.request_id]
            ids += output.token_ids
            logprobs += [detail.logprob or 0.0 for detail in output.details]
            if output.error is not None:
                errors.append(output.error)
            if output.is_last:
                open_ids.discard(output.request_id)

    engine = Engine(config, emit)
    for row, prompt in enumerate(prompts):
        engine.submit(
            GenerationRequest(
                str(row),
                tuple(prompt),
                stopping=StoppingParams(max_new_tokens=_NUM_TOKENS),
                output=OutputParams(logprobs=True, token_details=True),
            )
        )
    for _ in range(1000):
        if not open_ids or errors:
            break
        engine.step()
    engine.stop()
    engine.run()
    if errors:
        raise RuntimeError(f"a request failed: {errors[0]}")
    return list(outputs.values())


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
