"""transformers' own continuous batching on the same random weights: the rate of its decode steps."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from textgen_gpu.checks import Check, Run
from textgen_gpu.engines import random_model

_SHORT, _LONG = 8, 40
# Its masks have a row for each token and a column for each place of the cache, so four times the sequences may take
# sixteen times as long.
_GROWTH = 2


def measure_rival(
    run: Run,
    name: str,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    batches: tuple[int, ...],
    context: int = 1024,
) -> None:
    """Milliseconds of a decode step at each batch size: what 32 tokens more per sequence take, divided by 32. The
    figures become those of the rival's `name` as they come; a batch that would probably take too long is left out."""
    from transformers import ContinuousBatchingConfig

    # With "sdpa" alone it takes the flash-attn that is installed, or else fetches one, where it has the means to.
    has_flash = is_flash_attn_2_available() or is_flash_attn_3_available()
    model = random_model(config, device, dtype, "sdpa" if has_flash else "paged|sdpa")
    figures: dict[str, Any] = run.figures.setdefault("rivals", {}).setdefault(name, {})
    last_batch, last_s = 0, 0.0
    for batch in batches:
        expected_s = last_s * (batch / last_batch) ** _GROWTH if last_batch else 0.0
        if run.seconds_left < expected_s:
            note = f"{run.seconds_left:.0f} s are left, it may take {expected_s:.0f}"
            run.add(Check(f"transformers' speed of {name} with {batch} sequences", None, note))
            break
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(2, config.vocab_size, (batch, context), generator=generator).tolist()

        def generate(num_tokens: int, prompts: list[list[int]] = prompts) -> float:
            gc.collect()  # the last call's cache: this one's takes most of what memory is left
            if device.type == "cuda":
                torch.cuda.empty_cache()
            settings = GenerationConfig(
                do_sample=False, max_new_tokens=num_tokens, eos_token_id=-1, pad_token_id=0, use_cache=True
            )
            before_s = time.perf_counter()
            results = model.generate_batch(
                prompts,
                generation_config=settings,
                continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False),
                progress_bar=False,
            )
            took_s = time.perf_counter() - before_s
            # It reports what goes wrong in its log alone.
            lengths = [len(result.generated_tokens) for result in results.values() if not result.error]
            if lengths != [num_tokens] * len(prompts):
                raise RuntimeError(f"{len(lengths)} of {len(prompts)} sequences were generated, or not to their end")
            return took_s

        begun_s = time.perf_counter()
        generate(2)
        step_s = (generate(_LONG) - generate(_SHORT)) / (_LONG - _SHORT)
        last_batch, last_s = batch, time.perf_counter() - begun_s
        if step_s <= 0:
            run.add(Check(f"transformers' speed of {name} with {batch} sequences", None, "too uneven to be measured"))
            continue
        figures[str(batch)] = {"step_ms": 1000 * step_s, "tokens_per_s": batch / step_s}
        run.keep()
