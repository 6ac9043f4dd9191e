"""The values of the options -> one `EngineConfig`: what follows from them, and which of them cannot go together.

`build_config` runs once, at load; nothing behind it reads the environment. A function for each theme whose record
takes more than a copy; checks of options of several themes stand in `build_config`'s order.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from typing import Any

from textgen_engine.adapters.spec import parse_adapters
from textgen_engine.config import (
    CacheConfig,
    EngineConfig,
    GrammarConfig,
    LimitsConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SupervisionConfig,
    TracingConfig,
    TransportConfig,
    WatermarkConfig,
)
from textgen_engine.errors import ConfigError
from textgen_engine.options import read_options


def build_config(
    parameters: Mapping[str, str], environ: Mapping[str, str], *, has_gpu: bool = False, num_gpus: int | None = None
) -> EngineConfig:
    """One EngineConfig from config.pbtxt's parameters and the environment; the environment wins.

    has_gpu chooses the device and the defaults that depend on it, num_gpus (1 unless given) how many of them. Raises
    ConfigError for an unknown name, a value out of range, a combination that cannot work, or an option this version
    does not support.
    """
    values = read_options(parameters, environ)
    if not values["model_id"]:
        raise ConfigError("MODEL_ID is not set: give the folder of a Hugging Face checkpoint")
    limits = _limits_config(values)
    if values["batch_invariant"] and (has_gpu or values["dtype"] not in ("auto", "float32")):
        raise ConfigError("TEXTGEN_BATCH_INVARIANT is for float32 on the CPU; this version has no such mode elsewhere")
    parallel = _parallel_config(values, (num_gpus or 1) if has_gpu else None)
    if values["batch_invariant"] and parallel.world_size > 1:
        raise ConfigError("TEXTGEN_BATCH_INVARIANT needs NUM_SHARD=1: sums over ranks depend on the batch")
    lora = _lora_config(values)
    if values["batch_invariant"] and values["quantize"] is not None:
        raise ConfigError("TEXTGEN_BATCH_INVARIANT is for float32 weights: it cannot be combined with QUANTIZE")
    if values["dense_fallback"] and values["kv_cache_dtype"] != "auto":
        raise ConfigError(
            f"KV_CACHE_DTYPE={values['kv_cache_dtype']} cannot be combined with TEXTGEN_DENSE_FALLBACK, which keeps "
            f"token ids in the cache: 8 bits would change them"
        )
    max_sequences, max_tokens_per_step = _step_size(values, has_gpu=has_gpu)
    return EngineConfig(
        model=_model_config(values, max_sequences, has_gpu=has_gpu),
        parallel=parallel,
        cache=_cache_config(values, limits),
        scheduler=SchedulerConfig(
            max_num_sequences=max_sequences,
            max_tokens_per_step=max_tokens_per_step,
            waiting_served_ratio=values["waiting_served_ratio"],
            max_waiting_steps=values["max_waiting_tokens"],
            priority_ageing_s=values["priority_ageing_s"],
            max_step_stretch=values["max_step_stretch"],
            num_guesses=values["speculate"],
            overlap_steps=_overlaps(values, parallel, has_gpu=has_gpu),
        ),
        limits=limits,
        transport=TransportConfig(
            gather_streams=values["gather_streams"],
            gather_tokens=values["gather_tokens"],
            gather_s=values["gather_ms"] / 1000,
            keep_alive_s=values["keep_alive_s"],
        ),
        supervision=SupervisionConfig(
            max_restarts=values["max_engine_restarts"],
            hang_timeout_s=values["engine_hang_timeout_s"],
            heartbeat_timeout_s=values["engine_heartbeat_timeout_s"],
        ),
        watermark=WatermarkConfig(gamma=values["watermark_gamma"], delta=values["watermark_delta"]),
        grammar=_grammar_config(values),
        tracing=TracingConfig(
            endpoint=_collector_url(values["otlp_endpoint"]),
            service_name=values["otlp_service_name"],
            protocol=values["otlp_protocol"],
            sample_ratio=values["trace_sample_ratio"],
            token_events=values["trace_tokens"],
        ),
        lora=lora,
        log_level=values["log_level"],
        json_output=values["json_output"],
        log_prompts=values["log_prompts"],
    )


def _limits_config(values: Mapping[str, Any]) -> LimitsConfig:
    max_input, max_total = values["max_input_tokens"], values["max_total_tokens"]
    if values["max_input_length"] is not None:
        if max_input is not None:
            raise ConfigError("MAX_INPUT_LENGTH is the older name of MAX_INPUT_TOKENS: set only one of them")
        max_input = values["max_input_length"]
    if max_input is not None and max_total is not None and max_input >= max_total:
        raise ConfigError(f"MAX_INPUT_TOKENS ({max_input}) must be less than MAX_TOTAL_TOKENS ({max_total})")
    return LimitsConfig(
        max_concurrent_requests=values["max_concurrent_requests"],
        max_best_of=values["max_best_of"],
        max_stop_sequences=values["max_stop_sequences"],
        max_top_n_tokens=values["max_top_n_tokens"],
        max_input_tokens=max_input,
        max_total_tokens=max_total,
        enable_prefill_logprobs=values["enable_prefill_logprobs"],
        default_timeout_s=values["default_timeout_s"],
    )


def _model_config(values: Mapping[str, Any], max_sequences: int, *, has_gpu: bool) -> ModelConfig:
    graph_sizes = _graph_sizes(values["cuda_graphs"], max_sequences)
    return ModelConfig(
        model_id=values["model_id"],
        revision=values["revision"],
        dtype=values["dtype"],
        quantize=values["quantize"],
        trust_remote_code=values["trust_remote_code"],
        device="cuda" if has_gpu else "cpu",
        batch_invariant=values["batch_invariant"],
        dense_fallback=values["dense_fallback"],
        num_threads=values["num_threads"],
        attention=values["attention"],
        graph_sizes=graph_sizes if has_gpu else (),
    )


def _cache_config(values: Mapping[str, Any], limits: LimitsConfig) -> CacheConfig:
    num_tokens, block_size = values["max_batch_total_tokens"], values["block_size"]
    max_total = limits.max_total_tokens
    if num_tokens is not None and max_total is not None and num_tokens < max_total:
        raise ConfigError(f"MAX_BATCH_TOTAL_TOKENS ({num_tokens}) must be at least MAX_TOTAL_TOKENS ({max_total})")
    return CacheConfig(
        block_size=block_size,
        num_blocks=None if num_tokens is None else -(-num_tokens // block_size),
        memory_fraction=values["cuda_memory_fraction"],
        max_cache_bytes=int(values["max_kv_cache_gib"] * 2**30),
        prefix_caching=values["prefix_caching"],
        dtype=values["kv_cache_dtype"],
    )


def _grammar_config(values: Mapping[str, Any]) -> GrammarConfig:
    return GrammarConfig(
        enabled=not values["disable_grammar_support"],
        default_backend=values["grammar_backend"],
        jump_forward=values["jump_forward"],
        compile_timeout_s=values["grammar_timeout_s"],
        max_bytes=values["grammar_max_bytes"],
        max_nesting=values["grammar_max_nesting"],
        max_regex_bytes=values["grammar_max_regex_bytes"],
        max_lmfe_requests=values["grammar_max_lmfe_requests"],
        step_timeout_s=values["grammar_step_timeout_s"],
        cache_bytes=values["grammar_cache_mib"] << 20,
    )


def _step_size(values: Mapping[str, Any], *, has_gpu: bool) -> tuple[int, int]:
    """Most sequences and most tokens of one step."""
    max_sequences = values["max_batch_size"]
    max_tokens_per_step = values["max_batch_prefill_tokens"] or (4096 if has_gpu else 512)
    if max_sequences is None:
        max_sequences = min(256, max_tokens_per_step)
    elif max_sequences > max_tokens_per_step:
        raise ConfigError(
            f"MAX_BATCH_SIZE ({max_sequences}) must be at most MAX_BATCH_PREFILL_TOKENS ({max_tokens_per_step}): "
            f"every running sequence takes one token of a step"
        )
    return max_sequences, max_tokens_per_step


def _overlaps(values: Mapping[str, Any], parallel: ParallelConfig, *, has_gpu: bool) -> bool:
    possible = parallel.world_size == 1 and not values["speculate"]
    if values["overlap_steps"] is None:
        return has_gpu and possible
    if values["overlap_steps"] and not possible:
        raise ConfigError("TEXTGEN_OVERLAP_STEPS needs NUM_SHARD=1 and SPECULATE=0: both wait for each step's tokens")
    return bool(values["overlap_steps"])


def _graph_sizes(given: str | None, max_sequences: int) -> tuple[int, ...]:
    """The batch sizes to capture, ascending, none larger than a step can be."""
    if given is None:
        sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]
        return tuple(size for size in sizes if size < max_sequences) + (
            (max_sequences,) if max_sequences <= 512 else ()
        )
    try:
        wanted = sorted({int(part) for part in given.split(",")})
    except ValueError:
        wanted = [-1]
    if wanted[0] < 0:
        raise ConfigError(f"CUDA_GRAPHS must be batch sizes separated by commas, or 0; given: {given!r}")
    return tuple(size for size in wanted if 0 < size <= max_sequences)


def _lora_config(values: Mapping[str, Any]) -> LoraConfig:
    try:
        adapters = parse_adapters(values["lora_adapters"] or "")
    except ValueError as error:
        raise ConfigError(f"LORA_ADAPTERS: {error}") from None
    if len(adapters) > values["max_loras"]:
        raise ConfigError(
            f"LORA_ADAPTERS names {len(adapters)} adapters; at most {values['max_loras']} are allowed "
            f"(TEXTGEN_MAX_LORAS)"
        )
    lora = LoraConfig(adapters, values["adapter_folder"], values["max_loras"], values["max_lora_rank"])
    if lora.is_enabled and values["batch_invariant"]:
        raise ConfigError(
            "TEXTGEN_BATCH_INVARIANT does not go with LoRA adapters (LORA_ADAPTERS, TEXTGEN_ADAPTER_FOLDER)"
        )
    return lora


def _parallel_config(values: Mapping[str, Any], num_gpus: int | None) -> ParallelConfig:
    """num_gpus: of this host, None without any."""
    num_nodes, world_size = values["num_nodes"], values["num_shard"]
    if world_size is None:
        world_size = 1 if values["sharded"] is False else (num_gpus or 1) * num_nodes
    if values["sharded"] and world_size == 1:
        raise ConfigError("SHARDED=true needs NUM_SHARD of at least 2, or as many GPUs")
    if world_size % num_nodes:
        raise ConfigError(f"NUM_SHARD ({world_size}) must be a multiple of TEXTGEN_NUM_NODES ({num_nodes})")
    if num_gpus is not None and world_size // num_nodes > num_gpus:
        raise ConfigError(f"NUM_SHARD ({world_size}) needs {world_size // num_nodes} GPUs here; {num_gpus} are visible")
    if num_nodes > 1:
        for name, given in (("MASTER_ADDR", values["master_addr"]), ("TEXTGEN_GROUP_SECRET", values["group_secret"])):
            if not given:
                raise ConfigError(f"TEXTGEN_NUM_NODES={num_nodes} needs {name}, the same on every host")
    return ParallelConfig(
        world_size=world_size,
        num_nodes=num_nodes,
        collective_timeout_s=values["collective_timeout_s"],
        join_timeout_s=values["join_timeout_s"],
        master_address=values["master_addr"] or "",
        master_port=values["master_port"],
        secret=values["group_secret"] or "",
    )


def _collector_url(text: str | None) -> str | None:
    if text is None:
        return None
    problem = ConfigError(f"OTLP_ENDPOINT must be a URL like http://localhost:4317; given: {text!r}")
    try:
        parts = urllib.parse.urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise problem
    except ValueError:
        raise problem from None
    return text
