"""Runs the engine with one method of quantization: how well it predicts a text, what memory it takes, how fast it is.

Weights are those of a plain checkpoint, quantized at load, or packed first by packers.py where a method is one of
checkpoints alone.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from textgen_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from textgen_engine.engine import Engine
from textgen_engine.messages import StepReport
from textgen_engine.request import GenerationRequest, OutputParams, StoppingParams
from textgen_quantization import packers

TEXT = Path(__file__).with_name("alice.txt")
QUESTION = "What is the capital of France? Answer in one sentence."
# As much of the text is scored, in pieces with no other context. The engine scores prompts in chunks of at most 128
# tokens, so most keys and values are read back as the cache has rounded them.
WINDOW = 1024
_CHUNK = WINDOW // 2
_ANSWER_TOKENS = 24
_STEPS_A_ROUND = 4
_WARM_UP_STEPS = 4

Packer = Callable[[torch.Tensor], packers.Packed]


@dataclass(frozen=True)
class Method:
    """One row of the table. quantize, kv_cache: as QUANTIZE and KV_CACHE_DTYPE have them. settings and pack: of a
    checkpoint that is quantized already."""

    quantize: str | None = None
    kv_cache: Any = "auto"
    settings: dict[str, Any] | None = None
    pack: Packer | None = None


def _packed(bits: int, group_size: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


# Groups of 64: the usual 128 do not divide the demonstration model's 576 inputs.
METHODS: dict[str, Method] = {
    "float32": Method(),
    "int8": Method("int8"),
    "eetq": Method("eetq"),
    "bitsandbytes": Method("bitsandbytes"),
    "fp8": Method("fp8"),
    "bitsandbytes-nf4": Method("bitsandbytes-nf4"),
    "bitsandbytes-fp4": Method("bitsandbytes-fp4"),
    "gptq, 8 bits": Method(
        settings={"quant_method": "gptq", "bits": 8, "group_size": 64},
        pack=packers.gptq(8, 64),
    ),
    "gptq, 4 bits": Method(
        settings={"quant_method": "gptq", "bits": 4, "group_size": 64},
        pack=packers.gptq(4, 64),
    ),
    "gptq, 4 bits, act-order": Method(
        settings={"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True},
        pack=packers.gptq(4, 64, act_order=True),
    ),
    "awq": Method(settings={"quant_method": "awq", "bits": 4, "group_size": 64}, pack=packers.awq(64)),
    "fp8 checkpoint, blocks": Method(
        settings={"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"},
        pack=packers.float8_blocks(64, 64),
    ),
    "compressed-tensors, 4 bits": Method(settings=_packed(4, 64), pack=packers.packed_groups(4, 64)),
    "KV cache fp8_e4m3fn": Method(kv_cache="fp8_e4m3fn"),
    "KV cache fp8_e5m2": Method(kv_cache="fp8_e5m2"),
    "int8 + KV cache fp8_e4m3fn": Method("int8", kv_cache="fp8_e4m3fn"),
}


@dataclass(frozen=True)
class Quality:
    """num_tokens: predicted ones. rss_mib: of the process once the model is loaded, less what it was before."""

    perplexity: float
    num_tokens: int
    rss_mib: float
    layer_mib: float
    kv_bytes_per_token: int
    load_s: float
    answer: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def folder_of(method: Method, plain: Path, scratch: Path) -> Path:
    """The checkpoint to load: the plain one, or one packed in `scratch` now."""
    if method.settings is None or method.pack is None:
        return plain
    return packers.repack(plain, scratch, method.settings, method.pack) / "packed"


class Run:
    """An engine on a checkpoint, stepped by the caller."""

    def __init__(self, folder: Path, method: Method, threads: int, *, num_blocks: int, num_sequences: int) -> None:
        self.logprobs: dict[str, list[float]] = {}
        self.texts: dict[str, str] = {}
        config = EngineConfig(
            model=ModelConfig(str(folder), dtype="float32", num_threads=threads, quantize=method.quantize),
            cache=CacheConfig(num_blocks=num_blocks, prefix_caching=False, dtype=method.kv_cache),
            scheduler=SchedulerConfig(num_sequences, _CHUNK),
            log_level="error",
        )
        self.engine = Engine(config, self._take)

    def _take(self, report: StepReport) -> None:
        for output in report.outputs:
            if output.error is not None:
                raise RuntimeError(f"{output.request_id}: {output.error}")
            self.texts[output.request_id] = self.texts.get(output.request_id, "") + output.text
            if output.prompt_details is not None:
                scores = [detail.logprob for detail in output.prompt_details]
                self.logprobs[output.request_id] = [score for score in scores if score is not None]

    def until_idle(self) -> None:
        while self.engine.step():
            pass

    def close(self) -> None:
        self.engine.stop()
        self.engine.run()


def measure_quality(folder: Path, tokenizer_folder: Path, method: Method, threads: int, *, num_tokens: int) -> Quality:
    """In a process that has done nothing else, for the memory's sake."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids: list[int] = tokenizer(TEXT.read_text(encoding="ascii"))["input_ids"][:num_tokens]
    chat = [{"role": "user", "content": QUESTION}]
    prompt: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    before, started = _rss_mib(), time.perf_counter()
    run = Run(folder, method, threads, num_blocks=2 * WINDOW // 16, num_sequences=1)
    load_s, loaded = time.perf_counter() - started, _rss_mib()
    stop_now, scores = StoppingParams(max_new_tokens=1), OutputParams(prompt_logprobs=True)
    for start in range(0, len(ids), WINDOW):
        window = tuple(ids[start : start + WINDOW])
        run.engine.submit(GenerationRequest(f"text {start}", window, stopping=stop_now, output=scores))
    run.engine.submit(
        GenerationRequest("question", tuple(prompt), stopping=StoppingParams(max_new_tokens=_ANSWER_TOKENS))
    )
    run.until_idle()
    logprobs = [score for scores_of_one in run.logprobs.values() for score in scores_of_one]
    cache = run.engine._runner.cache
    kept_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*cache.keys, *cache.values))
    layers = run.engine._runner._loaded.model.get_submodule("model.layers")
    tensors = {
        id(tensor): tensor
        for module in layers.modules()
        for tensor in vars(module).values()
        if isinstance(tensor, torch.Tensor)
    }
    tensors |= {id(tensor): tensor for tensor in (*layers.parameters(), *layers.buffers())}
    run.close()
    return Quality(
        perplexity=math.exp(-statistics.fmean(logprobs)),
        num_tokens=len(logprobs),
        rss_mib=loaded - before,
        layer_mib=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20,
        kv_bytes_per_token=kept_bytes // (cache.num_blocks * cache.block_size),
        load_s=load_s,
        answer=" ".join(run.texts["question"].split()),
    )


def measure_speed(
    plain: Path, folder: Path, method: Method, threads: int, *, batches: Sequence[int], context: int, rounds: int
) -> dict[int, list[float]]:
    """For each of these numbers of streams, and for each round, how many times faster a decode step is than with
    float32. The two engines take turns; `batches` rise."""
    steps = len(batches) * ((rounds + 1) * _STEPS_A_ROUND + _WARM_UP_STEPS + 40) + batches[-1] * context // _CHUNK
    runs = [
        _engine(where, how, threads, batch=batches[-1], context=context, steps=steps)
        for where, how in ((plain, METHODS["float32"]), (folder, method))
    ]
    ratios: dict[int, list[float]] = {}
    for batch in batches:
        for run in runs:
            _start_decoding(run, batch, context, steps)
        ratios[batch] = []
        for number in range(rounds + 1):
            medians = []
            for run in runs:
                times = []
                for _ in range(_STEPS_A_ROUND):
                    begin = time.perf_counter()
                    run.engine.step()
                    times.append(time.perf_counter() - begin)
                medians.append(statistics.median(times))
            if number:  # the first one warms up
                ratios[batch].append(medians[0] / medians[1])
    for run in runs:
        run.close()
    return ratios


def _engine(folder: Path, method: Method, threads: int, *, batch: int, context: int, steps: int) -> Run:
    num_blocks = batch * (-(-(context + steps) // 16) + 2)
    return Run(folder, method, threads, num_blocks=num_blocks, num_sequences=batch)


def _start_decoding(run: Run, batch: int, context: int, steps: int) -> None:
    """Have `batch` sequences, each of which came with `context` tokens, decode in this engine."""
    generator = torch.Generator().manual_seed(0)
    stopping = StoppingParams(max_new_tokens=steps, ignore_eos_token=True)
    sequences = run.engine._requests.choice_of
    for number in range(batch):
        prompt = torch.randint(3, run.engine.info.vocab_size, (context,), generator=generator).tolist()
        if number >= len(sequences):
            run.engine.submit(GenerationRequest(str(number), tuple(prompt), stopping=stopping))
    while len(sequences) < batch or any(not sequence.num_output_tokens for sequence in sequences):
        run.engine.step()
    for _ in range(_WARM_UP_STEPS):
        run.engine.step()


def _rss_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
