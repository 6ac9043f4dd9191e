"""A rank other than 0: holds its part of the model and of the cache, and does what rank 0 says, step by step.

Samples nothing, schedules nothing, knows no requests. `main` is the process; it ends when rank 0 says so or is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch

from textgen_engine.adapters.layers import AdapterLayers
from textgen_engine.attention.base import AttentionBackend
from textgen_engine.attention.compiled import CompiledBackend
from textgen_engine.attention.flash import make_backend
from textgen_engine.attention.invariant import InvariantBackend
from textgen_engine.attention.sdpa import SdpaBackend
from textgen_engine.config import CacheConfig, ModelConfig
from textgen_engine.cuda_graphs import CudaCapturer
from textgen_engine.errors import ModelLoadError, RankFailure
from textgen_engine.host_memory import keep_freed
from textgen_engine.kernels.cpu import load_kernels
from textgen_engine.kv_cache import KVCache
from textgen_engine.logs import configure_logging
from textgen_engine.model_runner import ModelRunner, rank_memory
from textgen_engine.models.loader import LoadedModel, load_model
from textgen_engine.parallel.adapters import ClearAdapter, PutAdapter, put_part
from textgen_engine.parallel.group import Collectives, Stop
from textgen_engine.parallel.launch import Invitation, Meeting, die_with_parent
from textgen_engine.parallel.split import Shard
from textgen_engine.parallel.steps import CaptureGraphs, NewCache, decode_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportMemory:
    """Every rank says what it can give to the cache."""

    cache: CacheConfig
    step_bytes: int


@dataclass(frozen=True)
class Echo:
    """So many sums of so many float32 numbers, one after another: what a sum costs by itself."""

    num_numbers: int
    times: int


def prepare(config: ModelConfig, shard: Shard | None, *, fused: bool = True) -> tuple[LoadedModel, AttentionBackend]:
    """Threads, kernels, attention and the model: the whole one, or one rank's part; for `fused` see load_model. Raises
    ModelLoadError."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = torch.device(config.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # what is launched or captured without naming a device is for this one
    if device.type == "cpu":
        keep_freed()
    kernels = load_kernels(torch.get_num_threads()) if device.type == "cpu" else None
    backend: AttentionBackend
    if config.batch_invariant:
        backend = InvariantBackend()
    elif device.type == "cuda":
        backend = make_backend(device, config.attention)
    else:
        backend = SdpaBackend() if kernels is None else CompiledBackend(kernels)
    return load_model(config, backend, kernels, shard, fused=fused), backend


def serve(
    loaded: LoadedModel, backend: AttentionBackend, collectives: Collectives, *, has_adapters: bool = False
) -> None:
    """Follow rank 0 until it says stop. Raises RankFailure when it, or another rank, is gone."""
    # Before the layers are wrapped: it is layers by their names in the model that adapters adapt.
    adapters = AdapterLayers(loaded.model, loaded.dtype, loaded.device) if has_adapters else None
    loaded.connect(collectives)
    plan = loaded.plan
    assert plan is not None
    runner: ModelRunner | None = None
    cache: KVCache | None = None
    while True:
        message = collectives.receive()
        if isinstance(message, np.ndarray):
            assert runner is not None
            runner.forward(*decode_step(message, runner.cache, runner.device))
        elif isinstance(message, NewCache):
            runner = cache = None  # the old one's memory is free before the new one's is taken
            cache = KVCache(
                loaded.layers,
                num_blocks=message.num_blocks,
                block_size=message.block_size,
                dtype=message.dtype,
                device=loaded.device,
                has_scratch=message.has_scratch,
            )
            cache.populate()
            runner = ModelRunner(loaded, backend, cache, adapters, collectives)
        elif isinstance(message, CaptureGraphs):
            assert runner is not None
            runner.capture_graphs(message.sizes, message.max_seq_len, CudaCapturer(loaded.device))
        elif isinstance(message, ReportMemory):
            collectives.collect(rank_memory(message.cache, loaded, message.step_bytes))
        elif isinstance(message, PutAdapter):
            assert adapters is not None
            put_part(adapters, plan, message.slot, message.weights)
        elif isinstance(message, ClearAdapter):
            assert adapters is not None
            adapters.clear(message.slot)
        elif isinstance(message, Echo):
            for _ in range(message.times):
                collectives.all_reduce(torch.zeros(message.num_numbers))
        else:
            assert isinstance(message, Stop)
            return


def main(file_descriptor: int) -> int:
    """Be one rank, as the process at the other end of this socket says, for as long as that process lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()
    lifeline = Connection(file_descriptor)
    given: Meeting | Invitation = lifeline.recv()
    threading.Thread(target=_end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    configure_logging(given.log_level, as_json=given.json_output, source="textgen rank")
    try:
        if isinstance(given, Invitation):
            return _run(given.accept(), is_elsewhere=True)
        return _run(given, is_elsewhere=False)
    except RankFailure as failure:
        # Rank 0 has noticed as well, or is gone; to its user, it is the one that speaks.
        logger.info("ends: %s", failure)
        return 1


def _run(meeting: Meeting, *, is_elsewhere: bool) -> int:
    guest = meeting.enter()
    if is_elsewhere:
        guest.show_life()
    try:
        loaded, backend = prepare(meeting.model, meeting.shard, fused=not meeting.has_adapters)
    except (ModelLoadError, MemoryError) as error:
        guest.say_failed(str(error) or "not enough memory to load the model")
        return 1
    except Exception as error:  # nobody foresaw it: the log has all of it, the user one line
        logger.exception("the part of %s could not be loaded", meeting.shard)
        guest.say_failed(" ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    guest.say_ready()
    serve(loaded, backend, guest.join(), has_adapters=meeting.has_adapters)
    return 0


def _end_with(lifeline: Connection) -> None:
    """End this process at once when the one that started it is gone."""
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    # Run under the module's own name, so that the messages it reads are rank 0's classes.
    from textgen_engine.parallel import worker as _own_module

    sys.exit(_own_module.main(int(sys.argv[1])))
