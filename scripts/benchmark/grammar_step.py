"""What grammars cost a step: masks at batch 32 per backend, and new schemas beside a running stream.

    python scripts/benchmark/grammar_step.py --model FOLDER [--output benchmarks/results/grammar_step.json]

1. Mask cost: the time to fill the masks of `--batch` sequences in the middle of a JSON text, against the time of the
   engine's decode step with that many free sequences. Of lm-format-enforcer, which computes in processes of its own, as
   many as the server allows at once. What is filled in must be ready first: the time for that, from a token on, is
   given too. A step does not wait for it; the sequences whose masks are not ready do.
2. What a step loses: masks are filled while the forward pass runs, on the same cores. So `--batch` sequences are run
   free and under one schema (the default backend), taking turns, and the times from step to step are compared. Forced
   tokens are switched off, so that both do the same forward passes.
3. Arrivals: the gaps between the tokens of one running stream, alone, beside 64 requests that share one schema, and
   beside 64 with a schema each (never seen before). The second is the fair comparison: those requests cost forward
   passes either way, and what is left is the compilation.

The engine runs in this process, without Triton. Numbers are ratios within one run; quote them with the machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_repository" / "textgen" / "1"))
# As the engine's process has it: PyTorch's threads that spin would take the cores from the kernels' own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from textgen_engine.config import EngineConfig
from textgen_engine.configure import build_config
from textgen_engine.engine import Engine
from textgen_engine.errors import Unsupported
from textgen_engine.grammar import GrammarCompiler, GrammarLimits, GrammarMatcher, MaskFiller, parse_grammar
from textgen_engine.messages import StepReport
from textgen_engine.request import GenerationRequest, StoppingParams

_TEXT = '{"first_name": "Ada", "age": 36, "tags": ["mathematics", "poe'
_LIMITS = GrammarLimits()
_NUM_STEPS, _NUM_ROUNDS = 12, 3  # few enough steps for every text to be unfinished after them
_NUM_TOKENS, _NUM_TURNS = 40, 4  # of a sequence in the second part


def _schema(number: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "first_name": {"type": "string", "maxLength": 20 + number},
            "age": {"type": "integer", "minimum": 0, "maximum": 150 + number},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 5},
        },
        "required": ["first_name", "age", "tags"],
        "additionalProperties": False,
    }


class _Recorder:
    """Token times per request and step times, from the engine's reports."""

    def __init__(self) -> None:
        self.token_times: dict[str, list[float]] = {}
        self.step_times: list[tuple[int, float]] = []
        self.step_ends: list[tuple[int, float]] = []  # sequences, and when; a step with a prompt in it: 0 sequences
        self.finished = threading.Condition()
        self.num_finished = 0

    def __call__(self, report: StepReport) -> None:
        now = time.perf_counter()
        if report.metrics is not None and report.metrics.batch_size:
            is_decode = not report.metrics.num_prefill_tokens
            self.step_ends.append((report.metrics.batch_size if is_decode else 0, now))
            if is_decode:
                self.step_times.append((report.metrics.batch_size, report.metrics.step_s))
        with self.finished:
            for output in report.outputs:
                if output.error is not None:
                    raise output.error
                self.token_times.setdefault(output.request_id, []).extend([now] * len(output.token_ids))
                self.num_finished += output.is_last
            self.finished.notify_all()

    def wait(self, num_finished: int) -> None:
        with self.finished:
            self.finished.wait_for(lambda: self.num_finished >= num_finished)


def _request(name: str, prompt: list[int], num_tokens: int, schema: dict[str, Any] | None = None) -> GenerationRequest:
    grammar = None if schema is None else parse_grammar({"type": "json", "value": schema}, limits=_LIMITS)
    return GenerationRequest(
        name,
        tuple(prompt),
        grammar=grammar,
        stopping=StoppingParams(max_new_tokens=num_tokens, ignore_eos_token=True),
        arrival_s=time.monotonic(),
    )


def _what_steps_lose(config: EngineConfig, batch: int) -> dict[str, Any]:
    """From step to step, in ms, with `batch` free sequences and with as many under a schema."""
    recorder = _Recorder()
    grammar = dataclasses.replace(config.grammar, jump_forward=False)
    engine = Engine(dataclasses.replace(config, grammar=grammar), recorder)
    thread = threading.Thread(target=engine.run)
    thread.start()
    schema = {"type": "array", "items": _schema(0), "minItems": 50}
    turns: dict[str, list[list[float]]] = {"free": [], "constrained": []}
    try:
        for turn in range(_NUM_TURNS + 1):  # the first warms up
            for index, kind in enumerate(turns):
                begin = len(recorder.step_ends)
                for number in range(batch):
                    prompt = [*range(1000, 1032), number]
                    wanted = schema if kind == "constrained" else None
                    engine.submit(_request(f"{kind} {turn} {number}", prompt, _NUM_TOKENS, wanted))
                recorder.wait((2 * turn + index + 1) * batch)
                ends = recorder.step_ends[begin:]
                gaps = [
                    (b - a) * 1e3
                    for (size, a), (next_size, b) in itertools.pairwise(ends)
                    if size == next_size == batch
                ]
                if turn:
                    turns[kind].append(gaps)
    finally:
        engine.stop()
        thread.join()
    ratios = [
        statistics.median(constrained) / statistics.median(free)
        for constrained, free in zip(turns["constrained"], turns["free"], strict=True)
    ]
    return {
        **{kind: _quantiles([gap for gaps in found for gap in gaps]) for kind, found in turns.items()},
        "ratios": [round(ratio, 4) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 4),
    }


def _mask_costs(
    tokenizer: Any, names: Sequence[str], eos_ids: frozenset[int], width: int, batch: int
) -> dict[str, Any]:
    costs: dict[str, Any] = {}
    prefix = tokenizer.encode(_TEXT, add_special_tokens=False)
    # Two letters at a time: however they follow each other, the text stays inside of its string.
    words = [tokenizer.encode(a + b, add_special_tokens=False) for a in "aeiou" for b in "lmnrst"]
    letters = [ids[0] for ids in words if len(ids) == 1]
    for name in names:
        compiler = GrammarCompiler(tokenizer, vocab_size=width, eos_token_ids=eos_ids, backends=(name,))
        num_texts = min(batch, _LIMITS.max_worker_matchers) if name == "lmfe" else batch
        try:
            costs[name] = _mask_cost(compiler, name, prefix, letters, num_texts)
        except Unsupported as error:  # a library that is not installed
            costs[name] = f"not measured: {error}"
        finally:
            compiler.close()
    return costs


def _mask_cost(
    compiler: GrammarCompiler, name: str, prefix: list[int], letters: list[int], num_texts: int
) -> dict[str, float]:
    spec = parse_grammar({"type": "json", "value": _schema(0), "backend": name}, limits=_LIMITS)
    assert spec is not None
    handle = compiler.submit(spec)
    while not handle.done():
        time.sleep(0.001)
    compiled = handle.result()
    fill: list[float] = []
    ready: list[float] = []
    for seed in range(_NUM_ROUNDS):
        matchers = [compiled.matcher() for _ in range(num_texts)]
        try:
            for index, matcher in enumerate(matchers):
                for token_id in [*prefix, *letters[: index % 5]]:  # not all at the same place
                    _settle([matcher])
                    assert matcher.advance([token_id]) == 1
            _time_masks(compiler.masks, matchers, letters, np.random.default_rng(seed), fill, ready)
        finally:
            for matcher in matchers:
                matcher.close()
    return {"texts": num_texts, **_quantiles(fill), "ready_median_ms": statistics.median(ready)}


def _settle(matchers: list[GrammarMatcher]) -> None:
    while not all(matcher.ready() for matcher in matchers):
        time.sleep(0.0002)


def _time_masks(
    masks: MaskFiller,
    matchers: list[GrammarMatcher],
    letters: list[int],
    random: np.random.Generator,
    fill: list[float],
    ready: list[float],
) -> None:
    """Step by step: fill in the masks, give each text one of the tokens of `letters`, wait until the next are ready.

    (The same masks again would cost less: a library may have kept them.)
    """
    for _ in range(_NUM_STEPS):
        begin = time.perf_counter()
        mask = masks.fill(list(enumerate(matchers)))
        fill.append((time.perf_counter() - begin) * 1e3)
        assert not mask.errors, mask.errors
        begin = time.perf_counter()
        for matcher in matchers:
            assert matcher.advance([int(random.choice(letters))]) == 1
        _settle(matchers)
        ready.append((time.perf_counter() - begin) * 1e3)


def _quantiles(times: list[float]) -> dict[str, float]:
    """The median, and the lowest quarter, which what else the machine does moves less."""
    return {"median_ms": statistics.median(times), "quarter_ms": statistics.quantiles(times, n=4)[0]}


def _gaps(times: list[float]) -> dict[str, float]:
    gaps = sorted((b - a) * 1e3 for a, b in itertools.pairwise(times))
    return {
        "median_ms": statistics.median(gaps),
        "p99_ms": gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))],
        "max_ms": gaps[-1],
    }


@click.command()
@click.option("--model", required=True, help="folder of a checkpoint")
@click.option("--batch", default=32, show_default=True)
@click.option("--tokens", default=160, show_default=True, help="length of the running stream")
@click.option(
    "--arrivals/--no-arrivals", default=True, show_default=True, help="measure the gaps beside new schemas, too"
)
@click.option("--losses/--no-losses", default=True, show_default=True, help="measure what a step loses, too")
@click.option("--masks/--no-masks", default=True, show_default=True, help="measure the masks, too")
@click.option("--backends", default="", help="those whose masks are measured, with commas; all without it")
@click.option("--output", type=Path, default=None, help="JSON file for the numbers")
def main(
    model: str, batch: int, tokens: int, arrivals: bool, losses: bool, masks: bool, backends: str, output: Path | None
) -> None:
    """Measure and print; see the module's docstring."""
    options = {"model_id": model, "max_total_tokens": "1024", "max_batch_total_tokens": "65536"}
    config = build_config(options, {})
    recorder = _Recorder()
    engine = Engine(config, recorder)
    thread = threading.Thread(target=engine.run)
    thread.start()
    prompt = list(range(1000, 1032))
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "batch": batch}
    try:
        finished = 0
        for turn in ("warm", "free"):  # the first after a start is slower
            recorder.step_times.clear()
            for number in range(batch):
                engine.submit(_request(f"{turn} {number}", [*prompt, number], 24))
            finished += batch
            recorder.wait(finished)
        steps = [seconds * 1e3 for size, seconds in recorder.step_times if size == batch]
        results["decode_step"] = _quantiles(steps)

        cases = {"alone": [], "one schema": [0] * 64, "64 new schemas": list(range(1, 65))} if arrivals else {}
        for case, schemas in cases.items():
            engine.submit(_request(f"stream {case}", prompt, tokens))
            while len(recorder.token_times.get(f"stream {case}", [])) < 5:
                time.sleep(0.005)
            for index, number in enumerate(schemas):
                engine.submit(_request(f"{case} {index}", [*prompt, index], 8, _schema(number)))
                time.sleep(0.05)
            finished += 1 + len(schemas)
            recorder.wait(finished)
            results[f"gaps, {case}"] = _gaps(recorder.token_times[f"stream {case}"])
    finally:
        engine.stop()
        thread.join()
    if losses:
        results["free and constrained steps"] = _what_steps_lose(config, batch)
    if masks:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        names = tuple(filter(None, backends.split(","))) or config.grammar.backends
        results["masks"] = _mask_costs(tokenizer, names, engine.info.eos_token_ids, engine.info.vocab_size, batch)
        step = results["free and constrained steps"]["free"] if losses else results["decode_step"]
        for cost in results["masks"].values():
            if isinstance(cost, dict):
                cost["share_of_step"] = cost["median_ms"] / step["median_ms"]
    text = json.dumps(results, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
