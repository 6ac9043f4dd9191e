"""An engine's rooms, made and connected once, in the order in which each needs the others: `assemble`.

Loads the model, measures its largest step where the KV cache is sized from free memory, and captures graphs. Knows
nothing of requests or of the loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from textgen_engine.adapters.layers import AdapterLayers
from textgen_engine.adapters.registry import AdapterPlaces, AdapterRegistry
from textgen_engine.block_manager import BlockManager
from textgen_engine.config import EngineConfig
from textgen_engine.constraints import Constraints
from textgen_engine.cuda_graphs import CudaCapturer
from textgen_engine.detokenizer import Detokenizer
from textgen_engine.errors import ConfigError
from textgen_engine.grammar import GrammarCompiler, grammar_limits
from textgen_engine.kv_cache import KVCache, cache_dtype
from textgen_engine.messages import EngineInfo
from textgen_engine.model_runner import ModelRunner, num_cache_blocks, rank_memory
from textgen_engine.models.loader import LoadedModel
from textgen_engine.parallel.adapters import AdaptersOfAllRanks
from textgen_engine.parallel.launch import Ranks
from textgen_engine.parallel.worker import ReportMemory, prepare
from textgen_engine.sampling.sampler import Sampler
from textgen_engine.scheduler import Scheduler
from textgen_engine.warmup import measure_largest_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rooms:
    """What the engine's loop works with."""

    info: EngineInfo
    tokenizer: PreTrainedTokenizerBase
    detokenizer: Detokenizer
    adapters: AdapterRegistry
    constraints: Constraints
    blocks: BlockManager
    scheduler: Scheduler
    runner: ModelRunner
    sampler: Sampler


def assemble(config: EngineConfig, ranks: Ranks | None, notify: Callable[[], None]) -> Rooms:
    """Load the model and allocate everything; with `ranks`, as rank 0 of them.

    notify: called from any thread when a grammar, a check or an adapter is ready. Raises ModelLoadError or ConfigError,
    and RankFailure when a rank is lost meanwhile.
    """
    fused = not config.lora.is_enabled
    if ranks is None:
        loaded, backend = prepare(config.model, None, fused=fused)
    else:
        loaded, backend = prepare(ranks.model, ranks.shard, fused=fused)
    layers = AdapterLayers(loaded.model, loaded.dtype, loaded.device) if config.lora.is_enabled else None
    places: AdapterPlaces | None = layers
    collectives = None
    if ranks is not None:
        collectives = ranks.join()
        loaded.connect(collectives)
        if layers is not None:
            assert loaded.plan is not None
            places = AdaptersOfAllRanks(layers, loaded.plan, collectives)
    adapters = AdapterRegistry(config.lora, places, notify)
    num_slots = config.scheduler.max_num_sequences
    longest = config.limits.max_total_tokens or loaded.max_positions
    sampler = Sampler(
        vocab_size=loaded.vocab_size,
        num_slots=num_slots,
        device=loaded.device,
        watermark_gamma=config.watermark.gamma,
        watermark_delta=config.watermark.delta,
        cpu_kernels=loaded.kernels,
    )
    num_blocks = config.cache.num_blocks
    if num_blocks is None:
        step_bytes = measure_largest_step(
            loaded,
            backend,
            sampler,
            config.cache,
            config.scheduler,
            config.limits.max_top_n_tokens,
            collectives,
        )
        if config.model.graph_sizes:
            step_bytes *= 2  # the graphs' pool holds a decode step of its own, which is no larger
        memory = [rank_memory(config.cache, loaded, step_bytes)]
        if collectives is not None:
            collectives.send(ReportMemory(config.cache, step_bytes))
            memory = collectives.collect(memory[0])
        num_blocks = num_cache_blocks(
            config.cache,
            memory,
            is_cpu=loaded.device.type == "cpu",
            max_useful_tokens=longest * num_slots,
        )
        logger.info("the largest step takes %.0f MiB; %d KV blocks", step_bytes / 2**20, num_blocks)
    info = _derive_info(config, loaded, num_blocks)
    cache = KVCache(
        loaded.layers,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        dtype=cache_dtype(config.cache, loaded.dtype),
        device=loaded.device,
        has_scratch=bool(config.model.graph_sizes),
    )
    # Nobody needs to wait for it: within seconds after the start all of it is there.
    cache.populate_aside()
    blocks = BlockManager(
        num_blocks, config.cache.block_size, prefix_caching=config.cache.prefix_caching, window=loaded.window
    )
    scheduler = Scheduler(config.scheduler, blocks)
    runner = ModelRunner(loaded, backend, cache, layers, collectives)
    if config.model.graph_sizes:
        capturer = CudaCapturer(loaded.device)
        runner.capture_graphs(config.model.graph_sizes, info.max_total_tokens, capturer)
    assert loaded.tokenizer is not None
    constraints = Constraints(
        GrammarCompiler(
            loaded.tokenizer,
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            limits=grammar_limits(config.grammar),
            backends=config.grammar.backends,
            on_ready=notify,
        ),
        jump_forward=config.grammar.jump_forward,
        on_checked=notify,
    )
    return Rooms(
        info=info,
        tokenizer=loaded.tokenizer,
        detokenizer=Detokenizer(loaded.tokenizer),
        adapters=adapters,
        constraints=constraints,
        blocks=blocks,
        scheduler=scheduler,
        runner=runner,
        sampler=sampler,
    )


def _derive_info(config: EngineConfig, loaded: LoadedModel, num_blocks: int) -> EngineInfo:
    """The limits of one request, from the options, the architecture and the KV cache. Raises ConfigError."""
    limits, num_cache_tokens = config.limits, num_blocks * config.cache.block_size
    max_total = limits.max_total_tokens
    if max_total is None:
        max_total = min(loaded.max_positions, num_cache_tokens)
        if limits.max_input_tokens is not None and limits.max_input_tokens >= max_total:
            raise ConfigError(
                f"MAX_INPUT_TOKENS ({limits.max_input_tokens}) must be less than the {max_total} tokens that the model "
                f"and the KV cache allow"
            )
    if max_total > loaded.max_positions:
        raise ConfigError(f"MAX_TOTAL_TOKENS ({max_total}) exceeds the model's {loaded.max_positions} positions")
    if max_total > num_cache_tokens:
        raise ConfigError(f"MAX_TOTAL_TOKENS ({max_total}) exceeds the KV cache of {num_cache_tokens} tokens")
    return EngineInfo(
        vocab_size=loaded.vocab_size,
        max_input_tokens=limits.max_input_tokens or max_total - 1,
        max_total_tokens=max_total,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        eos_token_ids=loaded.eos_token_ids,
    )
