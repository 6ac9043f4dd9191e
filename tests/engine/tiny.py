"""Tiny random checkpoints, and an engine that the test's own thread steps.

Everything is float32 from fixed seeds, so equalities are exact wherever the order of the arithmetic allows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from textgen_engine.batch import BatchInputs
from textgen_engine.config import (
    CacheConfig,
    EngineConfig,
    LimitsConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SupervisionConfig,
)
from textgen_engine.engine import Engine
from textgen_engine.messages import StepReport
from textgen_engine.parallel.launch import Ranks
from textgen_engine.request import (
    FinishReason,
    GenerationRequest,
    OutputParams,
    StoppingParams,
    TokenDetail,
    TokenOutput,
)
from textgen_engine.sampling.params import SamplingParams

VOCAB_SIZE = 512
EOS_ID = 0
MAX_POSITIONS = 512
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
    # Wide enough for logits that differ: a random model of the usual range is nearly uniform, and repeats itself.
    "initializer_range": 0.3,
}
_LATENT_SIZES: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}
# family -> transformers' configuration class, what differs from _SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "num_hidden_layers": 3}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 1, "head_dim": 32}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "phi": ("PhiConfig", {"num_key_value_heads": 2}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2, "sliding_window": 8}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.1}),
    "gemma3": (
        "Gemma3TextConfig",
        {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7},
    ),
    "gpt2": ("GPT2Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "starcoder2": ("Starcoder2Config", {"num_key_value_heads": 2, "sliding_window": 8}),
    "smollm3": ("SmolLM3Config", {"num_key_value_heads": 2, "num_hidden_layers": 4}),
    "olmo": ("OlmoConfig", {"num_key_value_heads": 2}),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 2}),
    "granite": ("GraniteConfig", {"num_key_value_heads": 2}),
    "cohere": ("CohereConfig", {"num_key_value_heads": 2}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_inner": 96}),
    "mixtral": ("MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
        },
    ),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_LATENT_SIZES,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_LATENT_SIZES,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 2}),
    "mpt": ("MptConfig", {"n_heads": 4, "n_layers": 2, "d_model": 64, "max_seq_len": MAX_POSITIONS}),
    "falcon": ("FalconConfig", {}),
    "falcon_alibi": ("FalconConfig", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon_grouped": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gptj": ("GPTJConfig", {"rotary_dim": 8, "n_inner": 96}),
    "codegen": ("CodeGenConfig", {"rotary_dim": 8, "n_inner": 96}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2, "num_heads": 4},
    ),
    "mamba": ("MambaConfig", {}),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 8,
            "floor_scale": 4,
            "no_rope_layers": [1, 0],
        },
    ),
}


def save_checkpoint(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A random model of the family with its tokenizer; `changes` go into the configuration."""
    class_name, settings = FAMILIES[family]
    config = getattr(transformers, class_name)(**{**_SIZES, **settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; ids 0 and 1 are special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>", "<|start|>"],
        show_progress=False,
    )
    words = ["the quick brown fox jumps over the lazy dog", "a stream of tokens becomes a stream of text"]
    core.train_from_iterator(words * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|start|>")


def set_eos_ids(folder: Path, eos_ids: Any) -> None:
    """Rewrite what generation_config.json names as the end."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, "eos_token_id": eos_ids}))


def make_config(
    model: Path,
    *,
    block_size: int = 16,
    num_blocks: int = 256,
    prefix_caching: bool = True,
    max_sequences: int = 32,
    tokens_per_step: int = 512,
    ageing_s: float = 10.0,
    max_total_tokens: int | None = None,
    max_restarts: int = 5,
    hang_timeout_s: float = 120.0,
    batch_invariant: bool = False,
    dense_fallback: bool = False,
    trust_remote_code: bool = False,
    quantize: str | None = None,
    kv_cache_dtype: Any = "auto",
    lora: LoraConfig | None = None,
    parallel: ParallelConfig | None = None,
    guesses: int = 0,
    overlap: bool = False,
) -> EngineConfig:
    """A configuration for one thread on the CPU."""
    return EngineConfig(
        model=ModelConfig(
            str(model),
            dtype="float32",
            num_threads=1,
            batch_invariant=batch_invariant,
            dense_fallback=dense_fallback,
            trust_remote_code=trust_remote_code,
            quantize=quantize,
        ),
        cache=CacheConfig(
            block_size=block_size, num_blocks=num_blocks, prefix_caching=prefix_caching, dtype=kv_cache_dtype
        ),
        scheduler=SchedulerConfig(
            max_sequences, tokens_per_step, priority_ageing_s=ageing_s, num_guesses=guesses, overlap_steps=overlap
        ),
        limits=LimitsConfig(max_total_tokens=max_total_tokens),
        parallel=parallel or ParallelConfig(),
        supervision=SupervisionConfig(max_restarts, hang_timeout_s),
        lora=lora or LoraConfig(),
        log_level="error",
    )


def make_request(
    request_id: str,
    prompt: Sequence[int],
    max_new_tokens: int | None = 16,
    *,
    sampling: SamplingParams | None = None,
    output: OutputParams | None = None,
    ignore_eos_token: bool = False,
    stopping: StoppingParams | None = None,
    arrival_s: float = 0.0,
    **fields: Any,
) -> GenerationRequest:
    """A greedy request unless `sampling` says otherwise."""
    stopping = stopping or StoppingParams(ignore_eos_token=ignore_eos_token)
    return GenerationRequest(
        request_id,
        tuple(prompt),
        sampling=sampling or SamplingParams(),
        stopping=replace(stopping, max_new_tokens=max_new_tokens),
        output=output or OutputParams(),
        arrival_s=arrival_s,
        **fields,
    )


class Answer:
    """Everything that one request got, joined; refuses what breaks the protocol."""

    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []
        self.num_last = 0

    def add(self, output: TokenOutput) -> None:
        assert not self.num_last, f"an output after the last one of {output.request_id}"
        self.outputs.append(output)
        self.num_last += output.is_last

    @property
    def error(self) -> Exception | None:
        return self.outputs[-1].error if self.outputs else None

    def ids(self, choice: int = 0) -> list[int]:
        return [i for output in self.outputs if output.choice == choice for i in output.token_ids]

    def text(self, choice: int = 0) -> str:
        return "".join(output.text for output in self.outputs if output.choice == choice)

    def reason(self, choice: int = 0) -> FinishReason | None:
        reasons = [o.finish_reason for o in self.outputs if o.choice == choice and o.finish_reason is not None]
        assert len(reasons) <= 1, "a choice finished twice"
        return reasons[0] if reasons else None

    def details(self, choice: int = 0) -> list[TokenDetail]:
        return [d for output in self.outputs if output.choice == choice for d in output.details]

    @property
    def prompt_details(self) -> list[TokenDetail]:
        found = [o.prompt_details for o in self.outputs if o.prompt_details is not None]
        assert len(found) == 1, "prompt details come exactly once"
        return found[0]


class Harness:
    """An engine, stepped by the caller, with every answer collected by request id."""

    def __init__(self, config: EngineConfig, ranks: Ranks | None = None) -> None:
        self.answers: dict[str, Answer] = {}
        self.started: list[str] = []
        self.reports: list[StepReport] = []
        self.engine = Engine(config, self._emit, ranks)

    def _emit(self, report: StepReport) -> None:
        self.reports.append(report)
        for request_id in report.started:
            assert request_id not in self.started, f"{request_id} started twice"
            self.started.append(request_id)
        for output in report.outputs:
            self.answers.setdefault(output.request_id, Answer()).add(output)

    def close(self) -> None:
        """End the engine's threads."""
        self.engine.stop()
        self.engine.run()

    @property
    def num_preemptions(self) -> int:
        return sum(report.metrics.num_preemptions for report in self.reports if report.metrics)

    def submit(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.answers[request.request_id] = Answer()
            self.engine.submit(request)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.step()
            self.engine.check_integrity()

    def until(self, done: Callable[[], bool], limit: int = 2000) -> None:
        """Step until `done()`."""
        for _ in range(limit):
            if done():
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps")

    def until_idle(self, limit: int = 5000) -> None:
        """Step until every submitted request has its last output; then nothing may be held any more."""
        self.until(lambda: all(answer.num_last for answer in self.answers.values()), limit)
        assert not self.engine.step(), "work is left after the last output"
        self.engine.check_integrity()
        assert self.engine._rooms.blocks.num_used == 0
        assert not self.engine._requests.by_id

    def run(self, requests: Iterable[GenerationRequest]) -> dict[str, Answer]:
        """Submit all at once and step until they are done."""
        submitted = list(requests)
        self.submit(*submitted)
        self.until_idle()
        return {request.request_id: self.answers[request.request_id] for request in submitted}

    def run_alone(self, request: GenerationRequest) -> Answer:
        return self.run([request])[request.request_id]


def script_logits(harness: Harness, next_ids: Callable[[int, int], int] | None = None) -> None:
    """Replace the model of the engine by one that is fast and predictable: after token t at position p comes
    `next_ids(t, p)`, by default an id that is never the end."""

    def choose(token_id: int, position: int) -> int:
        if next_ids is not None:
            return next_ids(token_id, position)
        return 2 + (token_id * 7 + position) % (VOCAB_SIZE - 2)

    def forward(inputs: BatchInputs, copies: Iterable[tuple[int, int]]) -> torch.Tensor:
        rows = inputs.logits_rows.tolist()
        ids, positions = inputs.input_ids.tolist(), inputs.positions.tolist()
        logits = torch.zeros(len(rows), VOCAB_SIZE)
        for index, row in enumerate(rows):
            logits[index, choose(ids[row], positions[row])] = 10.0
        return logits

    harness.engine._runner.forward = forward  # type: ignore[method-assign]
