#!/usr/bin/env python3
"""Walk a set of schemas, regexes and grammars through the engine's own mask path and count what goes wrong.

    grammar_conformance.py --data FOLDER --tokenizer FOLDER --backend llguidance [--budget-s 300] --out results.json
    grammar_conformance.py --report results.json [results2.json ...] --markdown docs/grammar_conformance.md

FOLDER holds schemas.jsonl, regexes.jsonl, grammars.jsonl: one case a line with texts it must accept and refuse. Each
text is tokenized; every token must be allowed by the mask, then is fed; at the end the text must be allowed to stop.
Each case runs in a worker process that is killed when it overruns, so a crash or hang is counted, not suffered.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENGINE = Path(__file__).resolve().parents[2] / "model_repository" / "textgen" / "1"
MAX_TEXT_TOKENS = 600
CASE_LIMIT_S = 60.0

Json = dict[str, Any]


def load_cases(folder: Path) -> list[Json]:
    cases = []
    for name in ("schemas", "regexes", "grammars"):
        path = folder / f"{name}.jsonl"
        if path.exists():
            cases += [json.loads(line) for line in path.read_text().splitlines() if line]
    return cases


def texts_of(case: Json) -> list[tuple[str, bool]]:
    """(text, must it be accepted) of one case; JSON values compact, spaced, and the first one indented too."""
    if case["kind"] != "json_schema":
        return [(t, True) for t in case.get("accept", [])] + [(t, False) for t in case.get("reject", [])]
    texts = []
    for index, test in enumerate(case["tests"]):
        if test.get("disputed"):
            continue
        value = test["data"]
        spaced = json.dumps(value, ensure_ascii=False)
        if not test["valid"]:
            texts.append((spaced, False))
            continue
        compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        texts.append((compact, True))
        if spaced != compact:
            texts.append((spaced, True))
        if index == 0 and isinstance(value, dict | list) and value:
            texts.append((json.dumps(value, ensure_ascii=False, indent=2), True))
    return texts


def request_form(case: Json) -> Json:
    """The request parameter that asks for a case."""
    kind = case["kind"]
    if kind == "tool_call":
        return {"type": "tools", "value": {"tools": case["tools"], "tool_choice": "required"}}
    if kind == "json_object":
        return {"type": "json_object"}
    value = case.get({"json_schema": "schema", "regex": "pattern", "choice": "choices"}.get(kind, "grammar"))
    return {"type": kind, "value": value}


def worker(pipe: Connection, backend_name: str, tokenizer_path: str, rewrite: bool) -> None:
    """Answer cases until the pipe closes: ("compiled", ...) then ("walked", ...)."""
    sys.path.insert(0, str(ENGINE))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    from textgen_engine.errors import RequestError
    from textgen_engine.grammar import GrammarLimits, Vocabulary, parse_grammar
    from textgen_engine.grammar.compiler import load_backend

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    limits = GrammarLimits() if rewrite else GrammarLimits(max_rewritten_nodes=0)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, vocab_size=len(tokenizer), eos_token_ids=[tokenizer.eos_token_id])
    backend = load_backend(backend_name, vocabulary, limits)
    import numpy as np

    row = np.zeros(vocabulary.num_words, dtype=np.int32)
    pipe.send("ready")
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            backend.close()
            return
        start = time.perf_counter()
        try:
            spec = parse_grammar(request_form(case), limits=limits, backend=backend_name)
            assert spec is not None
            compiled = backend.compile(spec)
            matcher = compiled.matcher()
            matcher.fill(row)
            matcher.close()
        except RequestError as error:
            pipe.send({"error": str(error)})
            continue
        except BaseException as error:
            pipe.send({"crash": f"{type(error).__name__}: {error}"[:500]})
            continue
        pipe.send({"first_mask_ms": (time.perf_counter() - start) * 1e3, "warnings": list(compiled.warnings)})
        mask_us, walks = [], []
        for text, must_accept in texts_of(case):
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            if len(token_ids) > MAX_TEXT_TOKENS:
                continue
            matcher = compiled.matcher()
            num_taken, failure = 0, None
            for token_id in token_ids:
                begin = time.perf_counter_ns()
                matcher.fill(row)
                mask_us.append((time.perf_counter_ns() - begin) / 1e3)
                allowed = bool((int(row[token_id >> 5]) >> (token_id & 31)) & 1)
                took = matcher.advance([token_id]) if allowed else 0
                if allowed and not took:
                    failure = "the mask allowed a token that was refused"
                num_taken += took
                if not took:
                    break
            accepted = num_taken == len(token_ids) and matcher.can_stop()
            failure = failure or matcher.error()
            matcher.close()
            place = None if accepted == must_accept else f"{text[:200]!r} at token {num_taken} of {len(token_ids)}"
            walks.append((must_accept, accepted, place, failure))
        pipe.send({"mask_us": mask_us, "walks": walks})


class WorkerProcess:
    """A worker that is killed when it does not answer in time."""

    def __init__(self, backend: str, tokenizer: str, rewrite: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=worker, args=(other, backend, tokenizer, rewrite))
        self._process.start()
        other.close()
        assert self.receive(300.0) == "ready", "the backend cannot be loaded"

    def send(self, case: Json) -> None:
        self._pipe.send(case)

    def receive(self, limit_s: float) -> Any:
        """The next answer; "hang" past the limit, "crash" when the process died."""
        if not self._pipe.poll(limit_s):
            return "hang"
        try:
            return self._pipe.recv()
        except EOFError:
            return "crash"

    def stop(self, *, kill: bool = False) -> None:
        self._pipe.close()
        if kill:
            self._process.kill()
        self._process.join()


def run(data: Path, tokenizer: str, backend: str, rewrite: bool, budget_s: float | None, only: str | None) -> Json:
    cases = load_cases(data)
    cases.sort(key=lambda case: hashlib.sha256(case["id"].encode()).hexdigest())  # a budget cuts a fair sample
    if only:
        cases = [case for case in cases if re.search(only, case["id"])]
    results: list[Json] = []
    process: WorkerProcess | None = None
    start = time.monotonic()
    for case in cases:
        if budget_s is not None and time.monotonic() - start > budget_s:
            break
        process = process or WorkerProcess(backend, tokenizer, rewrite)
        process.send(case)
        result: Json = {key: case.get(key) for key in ("id", "kind", "source", "dataset", "keyword", "expect")}
        answer = process.receive(CASE_LIMIT_S)
        if isinstance(answer, dict):
            result.update(answer)
        if isinstance(answer, dict) and "first_mask_ms" in answer:
            answer = process.receive(CASE_LIMIT_S)
            if isinstance(answer, dict):
                result.update(answer)
        if isinstance(answer, str):
            result[answer] = True
            process.stop(kill=True)
            process = None
        results.append(result)
    if process is not None:
        process.stop()
    return {
        "backend": backend,
        "rewriting": rewrite,
        "seconds": round(time.monotonic() - start, 1),
        "cases_left": len(cases) - len(results),
        "results": results,
    }


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def summarise(results: list[Json]) -> Json:
    walks = [walk for result in results for walk in result.get("walks", [])]
    wrong = {r["id"] for r in results if any(accept != got for accept, got, *_ in r.get("walks", []))}
    compiled = [r for r in results if "first_mask_ms" in r]
    must_fail = [r for r in results if r.get("expect") == "error"]
    first = [r["first_mask_ms"] for r in compiled]
    masks = [us for r in results for us in r.get("mask_us", [])]
    return {
        "cases": len(results),
        "compiled": len(compiled),
        "refused": sum("error" in r for r in results),
        "all_right": sum(r["id"] not in wrong and "walks" in r and not _failed(r) for r in compiled),
        "valid": sum(bool(accept) for accept, *_ in walks),
        "false_reject": sum(accept and not got for accept, got, *_ in walks),
        "invalid": sum(not accept for accept, *_ in walks),
        "false_accept": sum(got and not accept for accept, got, *_ in walks),
        "crash": sum("crash" in r for r in results),
        "hang": sum("hang" in r for r in results),
        "run_time_errors": sum(_failed(r) for r in results),
        "malformed_accepted": sum("first_mask_ms" in r for r in must_fail),
        "first_mask_ms": [round(quantile(first, q), 1) for q in (0.5, 0.9, 0.99, 1.0)],
        "mask_us": [round(quantile(masks, q)) for q in (0.5, 0.9, 0.99, 1.0)],
        "masks": len(masks),
    }


def _failed(result: Json) -> bool:
    return any(failure for *_, failure in result.get("walks", []))


COLUMNS = (
    "| Set | Backend | Rewriting | Cases | Compiled | Refused with a reason | All right | False reject | False accept "
    "| Crash | Hang | Run-time error | First mask ms p50/p90/p99/max | Mask us p50/p90/p99/max |"
)


def report(paths: list[Path]) -> str:
    """Markdown tables: per set, then per dataset, then what was refused and why."""
    runs = [json.loads(path.read_text()) for path in paths]
    lines = ["# Grammar conformance", "", (__doc__ or "").split("\n\n")[0], ""]
    lines += ["Made by `scripts/benchmark/grammar_conformance.py`. Schemas: MaskBench (real schemas) and the", ""]
    lines[-2:] = [
        "Made by `scripts/benchmark/grammar_conformance.py`. `jsts` is the JSON-Schema-Test-Suite, `maskbench` real",
        "schemas with instances, `handwritten` the project's regexes and grammars. False reject: a valid text that the",
        "masks do not let through; false accept: an invalid text that they do. Times on a shared machine with one",
        "thread: read ratios.",
        "",
    ]
    for title, key in (
        ("By set", _set_of),
        ("By dataset", _dataset_of),
        ("JSON-Schema-Test-Suite by keyword", _keyword_of),
    ):
        lines += [f"## {title}", "", COLUMNS, "|" + "---|" * COLUMNS.count(" |")]
        groups: dict[str, dict[int, list[Json]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        for index, one in enumerate(runs):
            for result in one["results"]:
                name = key(result)
                if name:
                    groups[name][index].append(result)
        for name in sorted(groups):
            for index, results in groups[name].items():
                lines.append(_table_row(name, runs[index], summarise(results)))
        lines.append("")
    lines += ["## Refused, by reason", ""]
    for one in runs:
        reasons = collections.Counter(_reason(r["error"]) for r in one["results"] if "error" in r)
        lines += [f"### {one['backend']}, rewriting {'on' if one['rewriting'] else 'off'}", ""]
        lines += [f"- {count} x {reason}" for reason, count in reasons.most_common(40)]
        if one["cases_left"]:
            lines += [f"- ({one['cases_left']} cases not run: time budget)"]
        lines.append("")
    return "\n".join(lines)


def _table_row(name: str, one: Json, s: Json) -> str:
    return (
        f"| {name} | {one['backend']} | {'on' if one['rewriting'] else 'off'} | {s['cases']} | {s['compiled']} "
        f"| {s['refused']} | {s['all_right']} | {s['false_reject']}/{s['valid']} | {s['false_accept']}/{s['invalid']} "
        f"| {s['crash']} | {s['hang']} | {s['run_time_errors']} | {'/'.join(map(str, s['first_mask_ms']))} "
        f"| {'/'.join(map(str, s['mask_us']))} |"
    )


def _set_of(result: Json) -> str:
    return f"{result['source']}: {result['kind']}"


def _dataset_of(result: Json) -> str:
    return f"{result['source']}/{result['dataset']}"


def _keyword_of(result: Json) -> str:
    return str(result.get("keyword") or "")


def _reason(error: str) -> str:
    """An error text without its variable parts, so that equal reasons count together."""
    text = error.removeprefix("Input validation error: ").split("\n")[0]
    return re.sub(r" at #\S*|; given: .*|\"[^\"]{30,}\"", "", text)[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokenizer")
    parser.add_argument("--backend", default="llguidance")
    parser.add_argument("--no-rewriting", action="store_true")
    parser.add_argument("--budget-s", type=float)
    parser.add_argument("--only", help="regular expression on case ids")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path, nargs="+")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if arguments.report:
        text = report(arguments.report)
        if arguments.markdown:
            arguments.markdown.write_text(text)
        else:
            print(text)
        return
    one = run(
        arguments.data,
        arguments.tokenizer,
        arguments.backend,
        not arguments.no_rewriting,
        arguments.budget_s,
        arguments.only,
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(one))
    groups = collections.defaultdict(list)
    for result in one["results"]:
        groups[_set_of(result)].append(result)
    for name in sorted(groups):
        print(name, json.dumps(summarise(groups[name])))


if __name__ == "__main__":
    main()
