"""Runs the largest steps that the limits allow, once, before the KV cache is sized.

What these steps need beside weights and cache (activations, logits, sampling buffers) is memory the cache must leave
alone, or a warm server runs out of it under load. Measured, not estimated: every model and backend differs. Running
them also warms up kernels and allocators.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import torch

from textgen_engine.attention.base import AttentionBackend
from textgen_engine.batch import build_inputs
from textgen_engine.config import CacheConfig, SchedulerConfig
from textgen_engine.errors import ModelLoadError
from textgen_engine.kv_cache import KVCache, cache_dtype
from textgen_engine.model_runner import ModelRunner
from textgen_engine.models.loader import LoadedModel
from textgen_engine.parallel.group import Collectives
from textgen_engine.request import GenerationRequest, OutputParams
from textgen_engine.sampling.params import SamplingParams
from textgen_engine.sampling.sampler import GrammarRows, Sampler, prompt_logprobs
from textgen_engine.scheduler import MAX_SCORED_TOKENS, ScheduledBatch, ScheduledSequence
from textgen_engine.sequence import Sequence

# Every option on, so that the sampler allocates all it may ever need.
_ALL_OPTIONS = SamplingParams(
    do_sample=True,
    seed=0,
    temperature=0.7,
    top_p=0.9,
    typical_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    logit_bias=((0, 1.0),),
    allowed_token_ids=(0, 1, 2),
    watermark=True,
)


def measure_largest_step(
    loaded: LoadedModel,
    backend: AttentionBackend,
    sampler: Sampler,
    cache_config: CacheConfig,
    scheduler_config: SchedulerConfig,
    max_top_n_tokens: int,
    ranks: Collectives | None = None,
) -> int:
    """Bytes that the largest prompt step, the largest scored step and the largest decode step take at their peak,
    beyond what is held now. (What long sequences add to a decode step is counted by model_runner.num_cache_blocks.)

    Leaves the sampler without sequences. Raises ModelLoadError when the memory does not even suffice for them.
    """
    num_slots, num_tokens = scheduler_config.max_num_sequences, scheduler_config.max_tokens_per_step
    num_tokens = min(num_tokens, loaded.max_positions - 1)
    block_size = cache_config.block_size
    cache = KVCache(
        loaded.layers,
        num_blocks=max(-(-num_tokens // block_size), num_slots),
        block_size=block_size,
        dtype=cache_dtype(cache_config, loaded.dtype),
        device=loaded.device,
    )
    cache.populate()  # it is not the step that takes this memory
    runner = ModelRunner(loaded, backend, cache, ranks=ranks)

    def largest_steps() -> None:
        blocks = list(range(-(-num_tokens // block_size)))
        _run_step(runner, sampler, [_sequence(num_tokens, blocks)], max_top_n_tokens)
        num_scored = min(MAX_SCORED_TOKENS, num_tokens)
        _run_step(runner, sampler, [_sequence(num_scored, blocks, scored=True)], max_top_n_tokens)
        _run_step(runner, sampler, [_sequence(1, [block]) for block in range(num_slots)], max_top_n_tokens)

    try:
        return _peak_bytes(largest_steps, loaded.device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ModelLoadError(
            f"not enough memory for a step of {num_tokens} tokens and {num_slots} sequences; "
            f"lower MAX_BATCH_PREFILL_TOKENS or MAX_BATCH_SIZE"
        ) from error


def _sequence(num_tokens: int, blocks: list[int], *, scored: bool = False) -> Sequence:
    request = GenerationRequest(
        "warm-up",
        prompt_token_ids=(0,) * num_tokens,
        sampling=_ALL_OPTIONS,
        output=OutputParams(prompt_logprobs=scored),
    )
    return Sequence(request, block_table=blocks)


def _run_step(runner: ModelRunner, sampler: Sampler, sequences: list[Sequence], top_n: int) -> None:
    batch = ScheduledBatch([ScheduledSequence(s, 0, len(s.token_ids), is_last=True) for s in sequences])
    inputs = build_inputs(batch, runner.cache, runner.device)
    logits = runner.forward(inputs, ())
    if inputs.prompt_scored:
        scored = logits[len(sequences) :]
        prompt_logprobs(scored, torch.zeros(len(scored), dtype=torch.int64, device=scored.device), top_n)
    slots = list(range(len(sequences)))
    for slot, sequence in zip(slots, sequences, strict=True):
        sampler.add(
            slot,
            _ALL_OPTIONS,
            choice=0,
            prompt_ids=sequence.token_ids,
            output_ids=[],
            want_logprobs=True,
            top_n_tokens=top_n,
        )
    all_allowed = torch.full((len(slots), -(-logits.shape[1] // 32)), -1, dtype=torch.int32, device=logits.device)
    grammar_rows = GrammarRows(torch.tensor(slots, device=logits.device), all_allowed)
    sampler.sample(logits[: len(slots)], slots, [0] * len(slots), grammar_rows).token_ids.tolist()
    for slot in slots:
        sampler.remove(slot)


def _peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left in the allocator would serve the work, and not be counted
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device) - before
    import psutil  # here: on a GPU the engine gets by without it

    before = psutil.Process().memory_info().rss
    with contextlib.suppress(OSError):  # some containers forbid it: then an earlier peak may hide part of this one
        # Linux: writing 5 resets the process's peak resident size, so that it is the peak of the work alone.
        Path("/proc/self/clear_refs").write_text("5")
    work()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return max(int(peak[1]) * 1024 - before, 0)
