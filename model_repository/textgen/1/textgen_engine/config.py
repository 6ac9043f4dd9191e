"""The server's configuration as frozen records, one for each room that receives a part of it.

Plain values with defaults: options are read in options.py, and turned into these records, once, in configure.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from textgen_engine.adapters.spec import AdapterSpec


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint to load, and how."""

    model_id: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quantize: str | None = None
    trust_remote_code: bool = False
    device: str = "cpu"
    batch_invariant: bool = False
    dense_fallback: bool = False
    num_threads: int | None = None
    attention: str = "auto"
    graph_sizes: tuple[int, ...] = ()  # GPU: numbers of decodes for which a step is captured; none: every step is eager


@dataclass(frozen=True)
class ParallelConfig:
    """Over how many processes, on how many hosts, the model is split, and when one that does not answer counts as
    lost. master_address, master_port and secret are for several hosts."""

    world_size: int = 1
    num_nodes: int = 1
    collective_timeout_s: float = 60.0
    join_timeout_s: float = 600.0
    master_address: str = ""
    master_port: int = 0
    secret: str = field(default="", repr=False)

    @property
    def ranks_per_node(self) -> int:
        return self.world_size // self.num_nodes


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache. num_blocks None: as many as memory_fraction of the free memory holds."""

    block_size: int = 16
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    max_cache_bytes: int = 2 << 30
    prefix_caching: bool = True
    dtype: Literal["auto", "fp8_e4m3fn", "fp8_e5m2"] = "auto"


@dataclass(frozen=True)
class SchedulerConfig:
    """What one step may hold: sequences, tokens; and how waiting turns into priority."""

    max_num_sequences: int = 256
    max_tokens_per_step: int = 512
    waiting_served_ratio: float = 0.0
    max_waiting_steps: int = 20
    priority_ageing_s: float = 10.0
    max_step_stretch: float = 1.0
    num_guesses: int = 0  # tokens guessed ahead per sequence; 0: none
    overlap_steps: bool = False  # a step is launched before the last one is read back


@dataclass(frozen=True)
class LimitsConfig:
    """What one request may ask. max_input_tokens and max_total_tokens are None until the model is loaded."""

    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    enable_prefill_logprobs: bool = True
    default_timeout_s: float | None = None


@dataclass(frozen=True)
class TransportConfig:
    """How the adapter gathers tokens into responses."""

    gather_streams: int = 8
    gather_tokens: int = 4
    gather_s: float = 0.02
    keep_alive_s: float = 0.0


@dataclass(frozen=True)
class SupervisionConfig:
    """When the engine process counts as hung, and how often it may be restarted.

    hang_timeout_s: longest step. heartbeat_timeout_s: longest silence of the process itself, which says every second
    that it is alive, in a step or idle.
    """

    max_restarts: int = 5
    hang_timeout_s: float = 120.0
    heartbeat_timeout_s: float = 20.0


@dataclass(frozen=True)
class WatermarkConfig:
    """Strength of the watermark, the same for every request that asks for one."""

    gamma: float = 0.5
    delta: float = 2.0


@dataclass(frozen=True)
class GrammarConfig:
    """Constrained generation: which libraries, and the bounds on one grammar.

    enabled: requests may have a grammar. jump_forward: append forced tokens without a forward pass each.
    """

    enabled: bool = True
    default_backend: str = "llguidance"
    backends: tuple[str, ...] = ("llguidance", "xgrammar", "lmfe")
    jump_forward: bool = True
    compile_timeout_s: float = 5.0
    max_bytes: int = 256 * 1024
    max_nesting: int = 64
    max_regex_bytes: int = 64 * 1024
    max_lmfe_requests: int = 8
    step_timeout_s: float = 2.0
    cache_bytes: int = 256 << 20


@dataclass(frozen=True)
class TracingConfig:
    """Where traces go; endpoint None: nowhere, and nothing is traced."""

    endpoint: str | None = None
    service_name: str = "text-generation-inference.router"
    protocol: Literal["grpc", "http"] = "grpc"
    sample_ratio: float = 1.0
    token_events: bool = False


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters. adapters: loaded before the engine is ready. folder: requests may load adapters from below it,
    and unload them; None: they may not. At most max_adapters at once, of rank at most max_rank."""

    adapters: tuple[AdapterSpec, ...] = ()
    folder: str | None = None
    max_adapters: int = 8
    max_rank: int = 64

    @property
    def is_enabled(self) -> bool:
        """Whether the model must be able to take adapters."""
        return bool(self.adapters) or self.folder is not None


@dataclass(frozen=True)
class EngineConfig:
    """Everything, as the rooms receive it in parts."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    limits: LimitsConfig = LimitsConfig()
    transport: TransportConfig = TransportConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    watermark: WatermarkConfig = WatermarkConfig()
    grammar: GrammarConfig = GrammarConfig()
    tracing: TracingConfig = TracingConfig()
    lora: LoraConfig = LoraConfig()
    log_level: str = "info"
    json_output: bool = False
    log_prompts: bool = False
