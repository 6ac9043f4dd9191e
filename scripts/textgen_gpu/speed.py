"""How fast, and how fast it could be: decode and prefill beside the device's own measured rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from textgen_engine.attention.flash import FlashBackend
from textgen_engine.config import CacheConfig, EngineConfig, LimitsConfig, ModelConfig, SchedulerConfig
from textgen_engine.engine import Engine
from textgen_engine.models.loader import LoadedModel
from textgen_engine.request import GenerationRequest, StoppingParams
from textgen_gpu.checks import Run
from textgen_gpu.engines import Collector, load_random, make_engine

_BLOCK_SIZE = 16


def measure_rates(device: torch.device, *, copied_bytes: int = 4 << 30, size: int = 8192) -> dict[str, float]:
    """Bytes per second of a copy (read plus written), and bf16 floating-point operations per second of a product of
    square matrices: the best of several."""
    source = torch.empty(copied_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    copy_s = _best_s(lambda: target.copy_(source), device)
    product_s = _best_s(lambda: left @ right, device)
    return {"bytes_per_s": 2 * source.numel() / copy_s, "flops_per_s": 2 * size**3 / product_s}


def measure_model(
    run: Run,
    name: str,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    rates: dict[str, float],
    *,
    batches: tuple[int, ...] = (1, 16, 64, 256),
    context: int = 1024,
    prompts: tuple[int, ...] = (2048, 16_384),
    steps: int = 48,
    tokens_per_step: int = 8192,
) -> None:
    """Decode at each batch size, with `context` tokens of each sequence in the cache, and prefill of one prompt of each
    length, by the engine with graphs and overlapped steps; the figures become those of the model `name` as they come.
    Batches whose cache does not fit are left out."""
    loaded, backend = load_random(config, device, dtype)
    per_token = sum(layer.bytes_per_token(dtype) for layer in loaded.layers)
    # The first sequences decode while the last ones' prompts are computed: so many steps more than are timed.
    room = context + 4 * steps + 64
    longest = max((*prompts, room)) + _BLOCK_SIZE
    needed = max(max(batches) * room, longest)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        fitting = int(free * 0.8) // per_token
        batches = tuple(batch for batch in batches if batch * room <= fitting)
        needed = min(needed, fitting)
    settings = EngineConfig(
        model=ModelConfig("", dtype="bfloat16", device=device.type),
        cache=CacheConfig(
            block_size=_BLOCK_SIZE, num_blocks=-(-needed // _BLOCK_SIZE) + 4 * max(batches), prefix_caching=False
        ),
        scheduler=SchedulerConfig(max(batches), tokens_per_step),
        limits=LimitsConfig(max_total_tokens=longest),
        log_level="error",
    )
    graphs = batches if device.type == "cuda" else ()
    engine, collector = make_engine(loaded, backend, settings, graphs=graphs, overlap=True)
    figures: dict[str, Any] = {"decode": {}, "prefill": {}, "attention": []}
    run.figures.setdefault("models", {})[name] = figures
    timer = _DeviceTimer(engine, device)
    for length in prompts:
        figures["prefill"][str(length)] = _prefill(engine, collector, config, loaded, device, length, rates)
        run.keep()
    for batch in batches:
        if run.seconds_left < 20:
            break
        figures["decode"][str(batch)] = _decode(
            engine, collector, loaded, device, batch, context, steps, per_token, rates, timer
        )
        run.keep()
    figures["graphs"] = engine._runner._graphs is not None
    figures["attention"] = [str(choice) for choice in backend.choices] if isinstance(backend, FlashBackend) else []
    engine.stop()
    engine.run()


def _decode(
    engine: Engine,
    collector: Collector,
    loaded: LoadedModel,
    device: torch.device,
    batch: int,
    context: int,
    steps: int,
    bytes_per_token: int,
    rates: dict[str, float],
    timer: _DeviceTimer,
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(batch)
    names = [f"decode {batch} {index}" for index in range(batch)]
    for name in names:
        ids = torch.randint(2, loaded.vocab_size, (context,), generator=generator).tolist()
        stopping = StoppingParams(max_new_tokens=4 * steps + 48, ignore_eos_token=True)
        engine.submit(GenerationRequest(name, tuple(ids), stopping=stopping))
    while any(not collector.ids.get(name) for name in names):
        engine.step()
        collector.raise_error()
    for _ in range(4):
        engine.step()
    _wait(device)
    timer.start()
    durations = []
    for _ in range(steps):
        before_s = time.perf_counter()
        engine.step()
        durations.append(time.perf_counter() - before_s)
    _wait(device)
    gap = timer.stop()
    collector.raise_error()
    if not collector.done.isdisjoint(names):
        raise RuntimeError(f"not all of {batch} sequences were still running when the last step was timed")
    for name in names:
        engine.cancel(name)
    engine.step()
    collector.errors.clear()
    step_s = statistics.median(durations)
    read = weight_bytes(loaded) + batch * (context + steps // 2) * bytes_per_token
    bound_s = read / rates["bytes_per_s"]
    return {
        "step_ms": 1000 * step_s,
        "tokens_per_s": batch / step_s,
        "bound_ms": 1000 * bound_s,
        "share_of_bandwidth": bound_s / step_s,
        "host_gap_ms": 1000 * gap,
        "host_gap_share": gap / step_s,
    }


def _prefill(
    engine: Engine,
    collector: Collector,
    config: Any,
    loaded: LoadedModel,
    device: torch.device,
    length: int,
    rates: dict[str, float],
) -> dict[str, float]:
    durations = []
    for attempt in range(3):
        generator = torch.Generator().manual_seed(attempt)
        ids = torch.randint(2, loaded.vocab_size, (length,), generator=generator).tolist()
        name = f"prefill {length} {attempt}"
        engine.submit(
            GenerationRequest(name, tuple(ids), stopping=StoppingParams(max_new_tokens=1, ignore_eos_token=True))
        )
        _wait(device)
        before_s = time.perf_counter()
        while name not in collector.done:
            engine.step()
        durations.append(time.perf_counter() - before_s)
        collector.raise_error()
    took_s = min(durations)
    flops = prefill_flops(config, loaded, length)
    return {
        "ms": 1000 * took_s,
        "tokens_per_s": length / took_s,
        "share_of_flops": flops / took_s / rates["flops_per_s"],
    }


def weight_bytes(loaded: LoadedModel) -> int:
    """What one step reads: all weights once, of an embedding that is no output layer a row."""
    model: Any = loaded.model
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    total: int = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return total if head is embedding else total - int(embedding.numel() * embedding.element_size())


def prefill_flops(config: Any, loaded: LoadedModel, length: int) -> float:
    """Products with the weights of all layers, and causal attention; the output layer serves one row."""
    model: Any = loaded.model
    heads = {id(model.get_output_embeddings().weight), id(model.get_input_embeddings().weight)}
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in heads)
    attention: float = config.num_hidden_layers * config.num_attention_heads * config.head_dim * 2 * length**2
    products: float = 2.0 * weights * length
    return products + attention


class _DeviceTimer:
    """How long the device waits between two steps: from the end of one step's sampling to the next forward's begin."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._is_on = False
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if device.type != "cuda":
            return
        forward, sample = engine._runner.forward, engine._rooms.sampler.sample

        def timed_forward(*arguments: Any) -> torch.Tensor:
            if self._is_on:
                self._begin = torch.cuda.Event(enable_timing=True)
                self._begin.record()
            return forward(*arguments)

        def timed_sample(*arguments: Any) -> Any:
            result = sample(*arguments)
            if self._is_on:
                end = torch.cuda.Event(enable_timing=True)
                end.record()
                self._events.append((self._begin, end))
            return result

        engine._runner.forward = timed_forward  # type: ignore[method-assign, assignment]
        engine._rooms.sampler.sample = timed_sample  # type: ignore[method-assign, assignment]

    def start(self) -> None:
        self._events.clear()
        self._is_on = True

    def stop(self) -> float:
        """Seconds, median over the steps; 0 where nothing was timed. The device has to be done."""
        self._is_on = False
        pairs = zip(self._events, self._events[1:], strict=False)
        gaps = [earlier[1].elapsed_time(later[0]) / 1000 for earlier, later in pairs]
        return statistics.median(gaps) if gaps else 0.0


def _best_s(work: Callable[[], Any], device: torch.device, rounds: int = 6) -> float:
    times = []
    for _ in range(rounds):
        _wait(device)
        before_s = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - before_s)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
