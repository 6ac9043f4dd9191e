"""Every option of the server: its name, type, default, range and sentence of help; and how their texts are read.

Names and defaults are those of Text Generation Inference's launcher where it has the option. Each may be given as an
environment variable (`Option.env`) or, in lower case, as a parameter of textgen's config.pbtxt; the environment wins.
What an option means, alone or beside others, configure.py knows.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


def read_options(parameters: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The value of every option, by its name; the default where it is not given.

    Raises ConfigError for an unknown name, a value out of range, or an option that this version does not support.
    """
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


def _closest(name: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
