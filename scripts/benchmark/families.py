"""What a family's specialization gains: decode steps of random models of a few hundred megabytes, with layers fused and
compiled, and as transformers computes them on our attention by PyTorch's operations.

Both engines run in one process and take turns, a few steps each. --write puts the results into docs/models.md.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "model_repository/textgen/1")]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from textgen_coverage.page import PAGE, render  # noqa: E402
from textgen_coverage.shapes import SHAPES, processor, record, save_shape  # noqa: E402
from textgen_engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig  # noqa: E402
from textgen_engine.engine import Engine  # noqa: E402
from textgen_engine.models import loader  # noqa: E402
from textgen_engine.models.fusion import Fusion  # noqa: E402
from textgen_engine.parallel import worker  # noqa: E402
from textgen_engine.request import GenerationRequest, StoppingParams  # noqa: E402

BATCHES = (1, 8)
CONTEXT = 200
STEPS_A_ROUND = 4


@click.command(help=__doc__)
@click.argument("families", nargs=-1)
@click.option("--tokenizer", type=click.Path(path_type=Path), default=ROOT / ".cache/models/smollm2-135m-instruct")
@click.option("--rounds", default=6, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--write", is_flag=True)
def main(families: tuple[str, ...], tokenizer: Path, rounds: int, threads: int, write: bool) -> None:
    """Measure FAMILIES, or all."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    for family in families or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            megabytes = save_shape(Path(folder), family, AutoTokenizer.from_pretrained(tokenizer))
            found: dict[str, object] = {"megabytes": round(megabytes)}
            for batch in BATCHES:
                found[f"ratios_{batch}"] = ratios = measure(Path(folder), batch, rounds, threads)
                low, middle, high = statistics.quantiles(ratios, n=4)
                click.echo(f"{family}: {megabytes:.0f} MB, {batch} streams: {middle:.2f} ({low:.2f} to {high:.2f})")
        if write:
            record("gain", {family: found}, {"cpu": processor(), "threads": threads})
            PAGE.write_text(render(), encoding="utf-8")


def measure(folder: Path, batch: int, rounds: int, threads: int) -> list[float]:
    """Time of a stock step over that of a specialized one, for each round."""
    steps = (rounds + 1) * STEPS_A_ROUND + 8
    special = decoding(folder, batch, steps, threads)
    with (
        mock.patch.object(worker, "load_kernels", return_value=None),
        mock.patch.object(loader, "fuse_layers", return_value=Fusion()),
        mock.patch.object(loader, "replace_linears", return_value=0),
    ):
        stock = decoding(folder, batch, steps, threads)
    ratios = []
    for number in range(rounds + 1):
        times = [statistics.median(timed_step(engine) for _ in range(STEPS_A_ROUND)) for engine in (stock, special)]
        if number:  # the first one warms up
            ratios.append(round(times[0] / times[1], 3))
    for engine in (stock, special):
        engine.stop()
        engine.run()
    return ratios


def decoding(folder: Path, batch: int, steps: int, threads: int) -> Engine:
    """An engine in which `batch` sequences of CONTEXT tokens are decoding."""
    config = EngineConfig(
        model=ModelConfig(str(folder), dtype="float32", num_threads=threads),
        cache=CacheConfig(num_blocks=batch * (-(-(CONTEXT + steps + 40) // 16) + 2), prefix_caching=False),
        scheduler=SchedulerConfig(batch, 512),
        log_level="error",
    )
    engine = Engine(config, lambda report: None)
    generator = torch.Generator().manual_seed(0)
    stopping = StoppingParams(max_new_tokens=steps + 30, ignore_eos_token=True)
    for number in range(batch):
        prompt = torch.randint(3, engine.info.vocab_size, (CONTEXT,), generator=generator).tolist()
        engine.submit(GenerationRequest(str(number), tuple(prompt), stopping=stopping))
    while len(engine._requests.choice_of) < batch or any(
        not sequence.num_output_tokens for sequence in engine._requests.choice_of
    ):
        engine.step()
    return engine


def timed_step(engine: Engine) -> float:
    begin = time.perf_counter()
    engine.step()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
