"""Every option of the server: its name, type, default and range, and the frozen records the rooms receive.

Names and defaults are those of Text Generation Inference's launcher where it has the option. Each may be given as an
environment variable (`Option.env`) or, in lower case, as a parameter of textgen's config.pbtxt; the environment wins.
`build_config` reads both once, at load. Nothing below this file reads the environment.
"""

from __future__ import annotations

import difflib
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from textgen_engine.adapters.spec import AdapterSpec, parse_adapters
from textgen_engine.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """One option. `minimum` and `maximum` are inclusive; `choices` bounds a string; a default of None is derived."""

    name: str
    type: type
    default: Any
    help: str
    env: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def allowed(self) -> str:
        """The allowed values, in words, for messages."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.type]
        if self.minimum is not None and self.maximum is not None:
            return f"{words} from {self.minimum:g} to {self.maximum:g}"
        if self.minimum is not None:
            return f"{words} of at least {self.minimum:g}"
        return words

    def read(self, text: str) -> Any:
        """The value that `text` stands for; raises ConfigError with the name, the text and what is allowed."""
        problem = ConfigError(f"{self.env} must be {self.allowed()}; given: {text!r}")
        if self.type is bool:
            lowered = text.strip().lower()
            if lowered in ("1", "true", "yes", "on"):
                return True
            if lowered in ("0", "false", "no", "off", ""):
                return False
            raise problem
        try:
            value = self.type(text)
        except ValueError:
            raise problem from None
        if self.choices and value not in self.choices:
            raise problem
        if self.type in (int, float):
            if not value == value or value in (float("inf"), float("-inf")):
                raise problem
            if (self.minimum is not None and value < self.minimum) or (
                self.maximum is not None and value > self.maximum
            ):
                raise problem
        return value


def _tgi(name: str, type: type, default: Any, help: str, **bounds: Any) -> Option:
    return Option(name, type, default, help, env=name.upper(), **bounds)


def _own(name: str, type: type, default: Any, help: str, **bounds: Any) -> Option:
    return Option(name, type, default, help, env=f"TEXTGEN_{name.upper()}", **bounds)


OPTIONS: tuple[Option, ...] = (
    # The model.
    _tgi(
        "model_id",
        str,
        None,
        "checkpoint: a folder (safetensors, GGUF), a .gguf file, or the name of a model in the hub's local cache",
    ),
    _tgi("revision", str, None, "branch, tag or commit of a model from the hub; default: main"),
    _tgi("dtype", str, "auto", "weights and arithmetic", choices=("auto", "float32", "float16", "bfloat16")),
    _tgi(
        "quantize",
        str,
        None,
        "how linear layers keep their weights; default: as the checkpoint says",
        choices=(
            "awq",
            "bitsandbytes",
            "bitsandbytes-nf4",
            "bitsandbytes-fp4",
            "compressed-tensors",
            "eetq",
            "fp8",
            "gptq",
            "int8",
        ),
    ),
    _tgi(
        "kv_cache_dtype",
        str,
        "auto",
        "what the KV cache keeps; auto: as dtype",
        choices=("auto", "fp8_e4m3fn", "fp8_e5m2"),
    ),
    _tgi("trust_remote_code", bool, False, "run modelling code that comes with the checkpoint"),
    _tgi("tokenizer_config_path", str, None, "a tokenizer_config.json that overrides the checkpoint's"),
    _own(
        "batch_invariant",
        bool,
        False,
        "results equal to the last bit whatever the batch, at about half the speed (CPU, float32)",
    ),
    _own(
        "dense_fallback",
        bool,
        False,
        "serve a model that paged attention cannot serve, computing each text anew for every token",
    ),
    # GPU: attention, graphs, overlap.
    _own(
        "attention",
        str,
        "auto",
        "GPU: what attends; auto: the first that can serve the model (see docs/gpu.md)",
        choices=("auto", "flash4", "flash3", "flash2", "torch", "paged", "sdpa"),
    ),
    _tgi(
        "cuda_graphs",
        str,
        None,
        "GPU: batch sizes captured as graphs, separated by commas; 0: none; default: 1, 2, 4, 8, 16, 24 and so on"
        " up to max_batch_size",
    ),
    _own(
        "overlap_steps",
        bool,
        None,
        "launch a step before the last one is read back; default: on a GPU with one rank and no speculation",
    ),
    # One model over several processes and hosts.
    _tgi("num_shard", int, None, "ranks the model is split over; default: all visible GPUs, 1 on CPU", minimum=1),
    _tgi("sharded", bool, None, "false: one rank; true: refuse to start with only one"),
    _own("collective_timeout_s", float, 60.0, "a rank that is not heard of for so long counts as lost", minimum=1),
    _own("num_nodes", int, 1, "hosts the ranks are spread over evenly; the others run scripts/worker.py", minimum=1),
    _own("join_timeout_s", float, 600.0, "longest wait for ranks on other hosts, in seconds", minimum=1),
    _own("group_secret", str, None, "with several hosts: a secret that all of them share"),
    _tgi("master_addr", str, None, "with several hosts: address of this one that the others reach"),
    _tgi("master_port", int, 29500, "with several hosts: port the ranks meet at", minimum=1, maximum=65535),
    # Limits of one request.
    _tgi("max_best_of", int, 2, "largest best_of and n", minimum=1),
    _tgi("max_stop_sequences", int, 4, "most stop strings", minimum=0),
    _tgi("max_top_n_tokens", int, 5, "largest top_n_tokens", minimum=0),
    _tgi("max_input_tokens", int, None, "longest prompt, in tokens; default: max_total_tokens - 1", minimum=1),
    _tgi("max_input_length", int, None, "older name of max_input_tokens", minimum=1),
    _tgi(
        "max_total_tokens",
        int,
        None,
        "prompt plus new tokens; default: the model's and the KV cache's limit",
        minimum=2,
    ),
    _tgi("enable_prefill_logprobs", bool, True, "allow decoder_input_details (log-probabilities of the prompt)"),
    _own(
        "default_timeout_s", float, None, "deadline of requests that set none, in seconds; default: none", minimum=0.001
    ),
    # Admission and scheduling.
    _tgi(
        "max_concurrent_requests", int, 128, "requests admitted at once; one more is answered `overloaded`", minimum=1
    ),
    _tgi("max_batch_size", int, None, "sequences that run in one step; default: 256, or the token budget", minimum=1),
    _tgi(
        "max_batch_prefill_tokens", int, None, "token budget of one step; default: 512 on CPU, 4096 on GPU", minimum=16
    ),
    _tgi(
        "waiting_served_ratio",
        float,
        0.0,
        "prompts start only when at least this many times the running sequences wait; 0: at once",
        minimum=0,
    ),
    _tgi(
        "max_waiting_tokens",
        int,
        20,
        "with a waiting_served_ratio: steps after which a prompt starts all the same",
        minimum=0,
    ),
    _own(
        "max_step_stretch",
        float,
        1.8,
        "beside a prompt longer than four steps' budgets: a step takes about this many times as long as without "
        "prompts, at most; 1: no limit",
        minimum=1,
    ),
    _tgi(
        "speculate",
        int,
        0,
        "tokens guessed ahead by n-gram lookup and verified in one step, the same text faster where it repeats; 0: off",
        minimum=0,
        maximum=31,
    ),
    _tgi("max_batch_total_tokens", int, None, "size of the KV cache in tokens; default: from free memory", minimum=16),
    _tgi(
        "cuda_memory_fraction",
        float,
        0.9,
        "share of free device memory for weights and KV cache",
        minimum=0.05,
        maximum=1,
    ),
    _tgi("prefix_caching", bool, True, "share KV blocks between requests with a common prefix"),
    _own("block_size", int, 16, "tokens in one KV block", minimum=1, maximum=1024),
    _own("max_kv_cache_gib", float, 2.0, "upper bound of a KV cache sized from free memory, on the CPU", minimum=0.01),
    _own("priority_ageing_s", float, 10.0, "seconds of waiting that are worth one level of priority", minimum=0.001),
    _own("num_threads", int, None, "CPU threads of the engine; default: all cores", minimum=1),
    # Transport.
    _own(
        "gather_streams",
        int,
        8,
        "with more live streams than this, tokens are gathered before they are sent",
        minimum=0,
    ),
    _own("gather_tokens", int, 4, "most tokens gathered into one response", minimum=1),
    _own("gather_ms", float, 20.0, "longest wait for gathered tokens, in milliseconds", minimum=0),
    _own(
        "keep_alive_s",
        float,
        0.0,
        "empty response after so many silent seconds of a stream (finds dead HTTP clients); 0: off",
        minimum=0,
    ),
    # Sampling and watermark.
    _tgi(
        "watermark_gamma",
        float,
        0.5,
        "share of the vocabulary on the watermark's green list",
        minimum=0.01,
        maximum=0.99,
    ),
    _tgi("watermark_delta", float, 2.0, "bias of the green list", minimum=0),
    # Constrained generation.
    _tgi("disable_grammar_support", bool, False, "refuse requests with a grammar"),
    _own(
        "grammar_backend",
        str,
        "llguidance",
        "library that serves grammars unless the request names one",
        choices=("llguidance", "xgrammar", "lmfe"),
    ),
    _own("jump_forward", bool, True, "append tokens that a grammar forces without a forward pass for each"),
    _own("grammar_timeout_s", float, 5.0, "longest compilation of one grammar, in seconds", minimum=0.01),
    _own("grammar_max_bytes", int, 262144, "largest JSON schema, list of choices or tools, in bytes", minimum=1),
    _own("grammar_max_regex_bytes", int, 65536, "largest regex, Lark or EBNF grammar, in bytes", minimum=1),
    _own("grammar_step_timeout_s", float, 2.0, "longest wait for one mask of lm-format-enforcer", minimum=0.01),
    _own("grammar_max_lmfe_requests", int, 8, "texts that lm-format-enforcer constrains at once", minimum=1),
    _own("grammar_max_nesting", int, 64, "deepest nesting of a schema, regex or grammar", minimum=1, maximum=500),
    _own("grammar_cache_mib", int, 256, "memory for compiled grammars, in MiB", minimum=1),
    # LoRA adapters.
    _tgi("lora_adapters", str, None, "adapters to load, separated by commas: name, name=path, name@revision"),
    _own("adapter_folder", str, None, "requests may load adapters from below this folder, and unload; default: not"),
    _own("max_loras", int, 8, "adapters loaded at once", minimum=1, maximum=256),
    _own("max_lora_rank", int, 64, "largest rank of an adapter", minimum=1, maximum=1024),
    # Engine process.
    _own("max_engine_restarts", int, 5, "restarts within ten minutes after which the model stays not ready", minimum=0),
    _own(
        "engine_hang_timeout_s",
        float,
        120.0,
        "a step that takes longer counts as a hang: the engine is restarted",
        minimum=1,
    ),
    _own(
        "engine_heartbeat_timeout_s",
        float,
        20.0,
        "an engine process that shows no sign of life for so long is restarted",
        minimum=3,
    ),
    _tgi("log_level", str, "info", "what is logged", choices=("debug", "info", "warning", "error")),
    _tgi("json_output", bool, False, "log lines as JSON objects"),
    _own(
        "log_prompts",
        bool,
        False,
        "the line of a request holds its prompt and its text: for debugging, never by default",
    ),
    # Traces.
    _tgi("otlp_endpoint", str, None, "URL of the OpenTelemetry collector that gets a trace of each request"),
    _tgi("otlp_service_name", str, "text-generation-inference.router", "service.name of the traces"),
    _own("otlp_protocol", str, "grpc", "how traces are sent (usual ports: 4317, 4318)", choices=("grpc", "http")),
    _own(
        "trace_sample_ratio",
        float,
        1.0,
        "share of requests that are traced, of those whose client has not decided it",
        minimum=0,
        maximum=1,
    ),
    _own("trace_tokens", bool, False, "an event for every token in every trace, not only where a request asks"),
)

# Options of TGI's launcher that mean something here but that this version cannot honour: name -> harmless values.
UNSUPPORTED_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "rope_scaling": ("",),
}


# Read by the client's command line; a shell that has them set may start a server all the same.
_CLIENT_VARIABLES = frozenset({"TEXTGEN_URL", "TEXTGEN_MODEL"})


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


def build_config(
    parameters: Mapping[str, str], environ: Mapping[str, str], *, has_gpu: bool = False, num_gpus: int | None = None
) -> EngineConfig:
    """One EngineConfig from config.pbtxt's parameters and the environment; the environment wins.

    has_gpu chooses the device and the defaults that depend on it, num_gpus (1 unless given) how many of them. Raises
    ConfigError for an unknown name, a value out of range, a combination that cannot work, or an option this version
    does not support.
    """
    values = _read_values(parameters, environ)
    model_id = values["model_id"]
    if not model_id:
        raise ConfigError("MODEL_ID is not set: give the folder of a Hugging Face checkpoint")
    if values["max_input_length"] is not None:
        if values["max_input_tokens"] is not None:
            raise ConfigError("MAX_INPUT_LENGTH is the older name of MAX_INPUT_TOKENS: set only one of them")
        values["max_input_tokens"] = values["max_input_length"]
    max_input, max_total = values["max_input_tokens"], values["max_total_tokens"]
    if max_input is not None and max_total is not None and max_input >= max_total:
        raise ConfigError(f"MAX_INPUT_TOKENS ({max_input}) must be less than MAX_TOTAL_TOKENS ({max_total})")
    if values["batch_invariant"] and (has_gpu or values["dtype"] not in ("auto", "float32")):
        raise ConfigError("TEXTGEN_BATCH_INVARIANT is for float32 on the CPU; this version has no such mode elsewhere")
    parallel = _parallel_config(values, (num_gpus or 1) if has_gpu else None)
    if values["batch_invariant"] and parallel.world_size > 1:
        raise ConfigError("TEXTGEN_BATCH_INVARIANT needs NUM_SHARD=1: sums over ranks depend on the batch")
    lora = _read_lora(values)
    if values["batch_invariant"] and values["quantize"] is not None:
        raise ConfigError("TEXTGEN_BATCH_INVARIANT is for float32 weights: it cannot be combined with QUANTIZE")
    if values["dense_fallback"] and values["kv_cache_dtype"] != "auto":
        raise ConfigError(
            f"KV_CACHE_DTYPE={values['kv_cache_dtype']} cannot be combined with TEXTGEN_DENSE_FALLBACK, which keeps "
            f"token ids in the cache: 8 bits would change them"
        )
    max_sequences = values["max_batch_size"]
    max_tokens_per_step = values["max_batch_prefill_tokens"] or (4096 if has_gpu else 512)
    if max_sequences is None:
        max_sequences = min(256, max_tokens_per_step)
    elif max_sequences > max_tokens_per_step:
        raise ConfigError(
            f"MAX_BATCH_SIZE ({max_sequences}) must be at most MAX_BATCH_PREFILL_TOKENS ({max_tokens_per_step}): "
            f"every running sequence takes one token of a step"
        )
    graph_sizes = _graph_sizes(values["cuda_graphs"], max_sequences)
    block_size, cache_tokens = values["block_size"], values["max_batch_total_tokens"]
    if cache_tokens is not None and max_total is not None and cache_tokens < max_total:
        raise ConfigError(f"MAX_BATCH_TOTAL_TOKENS ({cache_tokens}) must be at least MAX_TOTAL_TOKENS ({max_total})")
    return EngineConfig(
        model=ModelConfig(
            model_id=model_id,
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
        ),
        parallel=parallel,
        cache=CacheConfig(
            block_size=block_size,
            num_blocks=None if cache_tokens is None else -(-cache_tokens // block_size),
            memory_fraction=values["cuda_memory_fraction"],
            max_cache_bytes=int(values["max_kv_cache_gib"] * 2**30),
            prefix_caching=values["prefix_caching"],
            dtype=values["kv_cache_dtype"],
        ),
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
        limits=LimitsConfig(
            max_concurrent_requests=values["max_concurrent_requests"],
            max_best_of=values["max_best_of"],
            max_stop_sequences=values["max_stop_sequences"],
            max_top_n_tokens=values["max_top_n_tokens"],
            max_input_tokens=max_input,
            max_total_tokens=max_total,
            enable_prefill_logprobs=values["enable_prefill_logprobs"],
            default_timeout_s=values["default_timeout_s"],
        ),
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
        grammar=GrammarConfig(
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
        ),
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


def _read_lora(values: Mapping[str, Any]) -> LoraConfig:
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


def _read_values(parameters: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, Any]:
    by_name = {option.name: option for option in OPTIONS}
    by_env = {option.env: option for option in OPTIONS}
    for name in parameters:
        if name not in by_name and name not in UNSUPPORTED_OPTIONS and name.upper() != name:
            # Upper-case parameters of config.pbtxt (EXECUTION_ENV_PATH, ...) belong to Triton's Python backend.
            raise ConfigError(f"unknown parameter {name!r} in config.pbtxt{_closest(name, by_name)}")
    for name in environ:
        if name.startswith("TEXTGEN_") and name not in by_env and name not in _CLIENT_VARIABLES:
            raise ConfigError(f"unknown environment variable {name}{_closest(name, by_env)}")
    for name, harmless in UNSUPPORTED_OPTIONS.items():
        given = environ.get(name.upper(), parameters.get(name, ""))
        if given.strip().lower() not in harmless:
            raise ConfigError(f"{name.upper()}={given} is not supported by this version")
    values: dict[str, Any] = {}
    for option in OPTIONS:
        text = environ.get(option.env, parameters.get(option.name, ""))
        values[option.name] = option.default if text == "" else option.read(text)
    return values


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


def _closest(name: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
