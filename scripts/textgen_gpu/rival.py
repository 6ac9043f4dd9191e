"""transformers' own continuous batching on the same random weights: the rate of its decode steps."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig

from textgen_gpu.checks import Run
from textgen_gpu.engines import random_model

_SHORT, _LONG = 8, 40


def measure_rival(
    run: Run, config: Any, device: torch.device, dtype: torch.dtype, batches: tuple[int, ...], context: int = 1024
) -> dict[str, Any]:
    """Milliseconds of a decode step at each batch size: what 32 tokens more per sequence take, divided by 32."""
    from transformers import ContinuousBatchingConfig

    model = random_model(config, device, dtype, "sdpa")
    figures: dict[str, Any] = {}
    for batch in batches:
        if run.seconds_left < 25:
            break
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(2, config.vocab_size, (batch, context), generator=generator).tolist()

        def generate(num_tokens: int, prompts: list[list[int]] = prompts) -> float:
            settings = GenerationConfig(
                do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0, use_cache=True
            )
            before_s = time.perf_counter()
            model.generate_batch(
                prompts,
                generation_config=settings,
                continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False),
                progress_bar=False,
            )
            return time.perf_counter() - before_s

        generate(2)
        step_s = (generate(_LONG) - generate(_SHORT)) / (_LONG - _SHORT)
        figures[str(batch)] = {"step_ms": 1000 * step_s, "tokens_per_s": batch / step_s if step_s > 0 else None}
    return figures
