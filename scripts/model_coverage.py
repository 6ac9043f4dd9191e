"""Try every causal language model of the installed transformers on the engine, and write down what came of it.

Each model type gets a tiny random checkpoint and a process of its own, bounded in time. Without --write the results
are compared with docs/model_coverage.json: the script ends with status 1 when a model that works there does not any
more, or when one gives a wrong answer or an error where it should be refused. With --write they are put there, and
into docs/models.md.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import click
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "model_repository/textgen/1")]

from textgen_coverage.check import Verdict, try_model  # noqa: E402
from textgen_coverage.page import read_results, write_results  # noqa: E402
from textgen_coverage.recipes import model_types  # noqa: E402


@click.command()
@click.argument("names", nargs=-1)
@click.option("--parallel", default=2, show_default=True, help="models tried at once")
@click.option("--timeout", default=240.0, show_default=True, help="seconds for one model")
@click.option("--write", is_flag=True, help="record the results in docs/")
def main(names: tuple[str, ...], parallel: int, timeout: float, write: bool) -> None:
    """Try the model types NAMES, or all of them."""
    torch.set_num_threads(1)
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(parallel) as pool:
        for verdict in pool.map(lambda name: _in_process(name, timeout), names or model_types()):
            verdicts.append(verdict)
            click.echo(f"{verdict.model_type:28} {verdict.outcome:9} {verdict.reason}")
    counts = Counter(verdict.outcome for verdict in verdicts)
    click.echo(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    if write:
        write_results(verdicts, transformers.__version__)
        return
    worked = {verdict.model_type for verdict in read_results() if verdict.outcome == "works"}
    worse = [
        verdict.model_type
        for verdict in verdicts
        if verdict.outcome in ("differs", "fails") or (verdict.outcome != "works" and verdict.model_type in worked)
    ]
    if worse:
        raise click.ClickException(f"worse than docs/model_coverage.json says: {', '.join(worse)}")


def _in_process(model_type: str, timeout_s: float) -> Verdict:
    """The verdict of a process that shares what is imported already; one that hangs or dies is a verdict as well."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(model_type, sender), daemon=True)
    process.start()
    sender.close()
    deadline_s = time.monotonic() + timeout_s
    try:
        if receiver.poll(timeout_s):
            verdict = receiver.recv()
            assert isinstance(verdict, Verdict)
            return verdict
        return Verdict(model_type, "fails", f"not done within {timeout_s:.0f} seconds")
    except EOFError:
        process.join(max(deadline_s - time.monotonic(), 1))
        return Verdict(model_type, "fails", f"its process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _try(model_type: str, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        sender.send(try_model(model_type, Path(folder)))


if __name__ == "__main__":
    main()
