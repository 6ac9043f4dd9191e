"""Engines on random weights, without a checkpoint: shapes of known models, a tokenizer made up on the spot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from textgen_engine.attention import bridge
from textgen_engine.attention.base import AttentionBackend
from textgen_engine.attention.flash import FlashBackend, make_backend
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import EngineConfig
from textgen_engine.engine import Engine
from textgen_engine.messages import StepReport
from textgen_engine.models.gpu_layers import fuse_gpu_layers, triton_kernels
from textgen_engine.models.loader import LoadedModel
from textgen_engine.models.trial import probe_layers

# The published shapes: sizes of meta-llama/Llama-3.1-8B and Qwen/Qwen3-0.6B.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-0.6B": (
        "Qwen3Config",
        {
            "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        },
    ),
    "Llama-3.1-8B": (
        "LlamaConfig",
        {
            "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
# For equalities: large enough for every kernel, wide enough logits for tokens that do not nearly tie.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    name: (
        class_name,
        {
            "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
            "initializer_range": 0.2,
        },
    )
    for name, class_name in (("tiny Llama", "LlamaConfig"), ("tiny Qwen3", "Qwen3Config"))
}  # fmt: skip
EOS_ID = 0


def model_config(shape: tuple[str, dict[str, Any]]) -> Any:
    """transformers' configuration of a shape."""
    class_name, sizes = shape
    return getattr(transformers, class_name)(**sizes, bos_token_id=1, eos_token_id=EOS_ID, pad_token_id=None)


def random_model(config: Any, device: torch.device, dtype: torch.dtype, attention: str, seed: int = 0) -> Any:
    """transformers' model with random weights, made where it stays."""
    bridge.register()
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def load_random(
    config: Any, device: torch.device, dtype: torch.dtype, *, fused: bool = True, attention: str = "auto"
) -> tuple[LoadedModel, AttentionBackend]:
    """What models/loader.py makes of a checkpoint, of random weights."""
    backend: AttentionBackend = make_backend(device, attention) if device.type == "cuda" else SdpaBackend()
    model = random_model(config, device, dtype, bridge.ATTENTION_NAME)
    needs = probe_layers(model, device, {"logits_to_keep": 1})
    num_fused = 0
    if fused and isinstance(backend, FlashBackend):
        num_fused = fuse_gpu_layers(model, backend, triton_kernels(), needs.scorings)
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer(),
        layers=[needs.shapes[layer] for layer in range(len(needs.shapes))],
        dtype=dtype,
        device=device,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        eos_token_ids=frozenset({EOS_ID}),
        takes_logits_rows=True,
        reads_masks=num_fused < len(needs.shapes),
    )
    return loaded, backend


def tokenizer() -> Any:
    """One token per byte, and an end; ids beyond have no text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|end|>", "<|start|>", *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|start|>")


class Collector:
    """The `emit` of an engine: token ids of each request and choice, and who is done."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[float]] = {}
        self.done: set[str] = set()
        self.errors: list[str] = []

    def __call__(self, report: StepReport) -> None:
        for output in report.outputs:
            self.ids.setdefault(output.request_id, []).extend(output.token_ids)
            scores = [detail.logprob for detail in output.details if detail.logprob is not None]
            self.logprobs.setdefault(output.request_id, []).extend(scores)
            if output.error is not None:
                self.errors.append(f"{output.request_id}: {output.error}")
            if output.is_last:
                self.done.add(output.request_id)

    def raise_error(self) -> None:
        """Raise RuntimeError if a request has failed: whoever waits for its tokens would wait forever."""
        if self.errors:
            raise RuntimeError(self.errors[0])


def make_engine(
    loaded: LoadedModel, backend: AttentionBackend, config: EngineConfig, *, graphs: tuple[int, ...], overlap: bool
) -> tuple[Engine, Collector]:
    """An engine on a model that is loaded already."""
    collector = Collector()
    config = replace(
        config,
        model=replace(config.model, graph_sizes=graphs),
        scheduler=replace(config.scheduler, overlap_steps=overlap),
    )
    with mock.patch("textgen_engine.assembly.prepare", return_value=(loaded, backend)):
        return Engine(config, collector), collector
