#!/usr/bin/env python3
"""Walk a set of schemas, regexes and grammars through the engine's own mask path and count what goes wrong.

    grammar_conformance.py --data FOLDER --tokenizer FOLDER --backend llguidance --out results.json [--resume]
    grammar_conformance.py --report results.json [results2.json ...] --markdown docs/grammar_conformance.md \\
        --json docs/grammar_conformance.json

FOLDER holds schemas.jsonl, regexes.jsonl, grammars.jsonl: one case a line with texts it must accept and refuse. Each
text is tokenized; every token must be allowed by the mask, then is fed; at the end the text must be allowed to stop.
Each case runs in a worker process that is killed when it overruns, so a crash or hang is counted, not suffered.

A slow backend is run in pieces: --budget-s ends a run between two cases, --resume goes on with what results.json lacks,
--case-s bounds the walks of one case (what was walked until then counts, and the case counts as cut).
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
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENGINE = Path(__file__).resolve().parents[2] / "model_repository" / "textgen" / "1"
MAX_TEXT_TOKENS = 600
CASE_LIMIT_S = 60.0
OUT_OF_TIME = "the case's time is over"

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


def worker(pipe: Connection, backend_name: str, tokenizer_path: str, rewrite: bool, order: str, case_s: float) -> None:
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

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    pipe.send("ready")
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            backend.close()
            return
        start = time.perf_counter()
        try:
            spec = parse_grammar(request_form(case), limits=limits, backend=backend_name, property_order=order)
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
        mask_us: list[float] = []
        walks = []
        is_cut = False
        deadline = time.perf_counter() + case_s
        for text, must_accept in texts_of(case):
            token_ids = encode(text)
            if len(token_ids) > MAX_TEXT_TOKENS:
                continue
            matcher = compiled.matcher()
            num_taken, failure = walk(matcher, token_ids, row, mask_us, deadline)
            if failure == OUT_OF_TIME:
                is_cut = True
                matcher.close()
                break
            accepted = num_taken == len(token_ids) and matcher.can_stop()
            failure = failure or matcher.error()
            matcher.close()
            place = f"{text[:200]!r} at token {num_taken} of {len(token_ids)}"
            only_order = False
            if must_accept and not accepted and case["kind"] == "json_schema":
                matcher = compiled.matcher()
                only_order = accepts_in_some_order(matcher, encode, json.loads(text), mention_order(case["schema"]))
                matcher.close()
            walks.append((must_accept, accepted, None if accepted == must_accept else place, failure, only_order))
        pipe.send({"mask_us": mask_us, "walks": walks, "cut": is_cut})


def walk(matcher: Any, token_ids: list[int], row: Any, mask_us: list[float], deadline: float) -> tuple[int, str | None]:
    """Feed tokens while the masks allow them: how many, and what went wrong. Appends each mask's microseconds."""
    for num_taken, token_id in enumerate(token_ids):
        begin = time.perf_counter_ns()
        if begin > deadline * 1e9:
            return num_taken, OUT_OF_TIME
        matcher.fill(row)
        mask_us.append((time.perf_counter_ns() - begin) / 1e3)
        if not (int(row[token_id >> 5]) >> (token_id & 31)) & 1:
            return num_taken, None
        if not matcher.advance([token_id]):
            return num_taken, "the mask allowed a token that was refused"
    return len(token_ids), None


def mention_order(schema: Any) -> dict[str, int]:
    """Each key of a schema's text and where it first stands: a good first guess at an order."""
    order: dict[str, int] = {}
    pending = [schema]
    while pending:
        node = pending.pop(0)
        if isinstance(node, dict):
            for key in node:
                order.setdefault(key, len(order))
        pending[:0] = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return order


def accepts_in_some_order(matcher: Any, encode: Any, value: Any, order: dict[str, int], max_steps: int = 5000) -> bool:
    """Whether a matcher at the start takes `value` with the keys of its objects in some order (depth-first search)."""
    steps = 0

    def write(node: Any, go_on: Any) -> bool:
        """Try to write `node`, then whatever `go_on` writes."""
        if isinstance(node, dict):
            return take("{", lambda: write_members(dict(node), True, lambda: take("}", go_on)))
        if isinstance(node, list):
            return take("[", lambda: write_items(node, 0, lambda: take("]", go_on)))
        return take(json.dumps(node, ensure_ascii=False), go_on)

    def write_members(left: Json, is_first: bool, go_on: Any) -> bool:
        if not left:
            return bool(go_on())
        for key in sorted(left, key=lambda k: order.get(k, len(order))):
            rest = {other: inner for other, inner in left.items() if other != key}
            text = ("" if is_first else ", ") + json.dumps(key, ensure_ascii=False) + ": "
            if take(text, partial(write, left[key], partial(write_members, rest, False, go_on))):
                return True
        return False

    def write_items(items: list[Any], index: int, go_on: Any) -> bool:
        if index == len(items):
            return bool(go_on())
        return take(", " if index else "", lambda: write(items[index], lambda: write_items(items, index + 1, go_on)))

    def take(text: str, go_on: Any) -> bool:
        nonlocal steps
        steps += 1
        if steps > max_steps:
            return False
        token_ids = encode(text)
        num_taken = matcher.advance(token_ids)
        if num_taken == len(token_ids) and go_on():
            return True
        matcher.rollback(num_taken)
        return False

    return write(value, matcher.can_stop)


class WorkerProcess:
    """A worker that is killed when it does not answer in time."""

    def __init__(self, *how: Any) -> None:
        """how: the arguments of `worker` behind its pipe."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=worker, args=(other, *how))
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


@dataclass(frozen=True)
class Run:
    """What is asked of one backend. order: of properties, `any` or `schema`. Times in seconds."""

    backend: str
    tokenizer: str
    rewrite: bool
    order: str
    case_s: float
    budget_s: float | None
    only: str | None

    def over(self, data: Path, before: Json | None) -> Json:
        """All cases but those that `before` has; its results come first."""
        cases = load_cases(data)
        cases.sort(key=lambda case: hashlib.sha256(case["id"].encode()).hexdigest())  # a budget cuts a fair sample
        if self.only:
            cases = [case for case in cases if re.search(self.only, case["id"])]
        results: list[Json] = list(before["results"]) if before else []
        done = {result["id"] for result in results}
        process: WorkerProcess | None = None
        start = time.monotonic()
        for case in cases:
            if case["id"] in done:
                continue
            if self.budget_s is not None and time.monotonic() - start > self.budget_s:
                break
            process = process or WorkerProcess(self.backend, self.tokenizer, self.rewrite, self.order, self.case_s)
            result, is_alive = self._one(process, case)
            if not is_alive:
                process.stop(kill=True)
                process = None
            results.append(result)
        if process is not None:
            process.stop()
        return {
            "backend": self.backend,
            "rewriting": self.rewrite,
            "order": self.order,
            "seconds": round(time.monotonic() - start + (before["seconds"] if before else 0), 1),
            "cases_left": len(cases) - len(results),
            "results": results,
        }

    def _one(self, process: WorkerProcess, case: Json) -> tuple[Json, bool]:
        """The result of one case; False where the worker is dead or hangs."""
        process.send(case)
        result: Json = {key: case.get(key) for key in ("id", "kind", "source", "dataset", "keyword", "expect")}
        answer = process.receive(CASE_LIMIT_S)
        if isinstance(answer, dict):
            result.update(answer)
        if isinstance(answer, dict) and "first_mask_ms" in answer:
            answer = process.receive(CASE_LIMIT_S + self.case_s)
            if isinstance(answer, dict):
                result.update(answer)
        if isinstance(answer, str):
            result[answer] = True
        return result, isinstance(answer, dict)


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
        "false_reject_order": sum(only_order for *_, only_order in walks),
        "false_reject_format": sum(
            accept and not got
            for result in results
            if "format" in str(result.get("keyword"))
            for accept, got, *_ in result.get("walks", [])
        ),
        "invalid": sum(not accept for accept, *_ in walks),
        "false_accept": sum(got and not accept for accept, got, *_ in walks),
        "crash": sum("crash" in r for r in results),
        "hang": sum("hang" in r for r in results),
        "cut": sum(bool(r.get("cut")) for r in results),
        "run_time_errors": sum(_failed(r) for r in results),
        "malformed_accepted": sum("first_mask_ms" in r for r in must_fail),
        "first_mask_ms": [round(quantile(first, q), 1) for q in (0.5, 0.9, 0.99, 1.0)],
        "mask_us": [round(quantile(masks, q)) for q in (0.5, 0.9, 0.99, 1.0)],
        "masks": len(masks),
    }


def summary_of(paths: list[Path]) -> Json:
    """{backend / rewriting: {dataset: figures}}: figures only, no schema and no text of the sets."""
    summary: Json = {}
    for path in paths:
        one = json.loads(path.read_text())
        groups: dict[str, list[Json]] = collections.defaultdict(list)
        for result in one["results"]:
            groups[_set_of(result)].append(result)
            groups[_dataset_of(result)].append(result)
        name = f"{one['backend']}, {_way(one)}"
        summary[name] = {
            "seconds": one["seconds"],
            "cases_left": one["cases_left"],
            "sets": {key: summarise(groups[key]) for key in sorted(groups)},
        }
    return summary


def _way(one: Json) -> str:
    """How the schemas of a run were treated."""
    if not one["rewriting"]:
        return "as they are"
    return "rewritten" if one["order"] == "any" else "rewritten, schema order"


def _failed(result: Json) -> bool:
    return any(failure for _, _, _, failure, _ in result.get("walks", []))


COLUMNS = (
    "| Set | Backend | Schemas | Cases | Compiled | Refused with a reason | All right "
    "| False reject | of these only key order | False accept "
    "| Crash | Hang | Cut | Run-time error | First mask ms p50/p90/p99/max | Mask us p50/p90/p99/max |"
)


def report(paths: list[Path]) -> str:
    """Markdown tables: per set, then per dataset, then what was refused and why."""
    runs = [json.loads(path.read_text()) for path in paths]
    lines = [
        "# Grammar conformance",
        "",
        (__doc__ or "").split("\n\n")[0],
        "",
        "Made by `scripts/benchmark/grammar_conformance.py`. `jsts` is the JSON-Schema-Test-Suite, `maskbench` real",
        "schemas with instances, `handwritten` the project's regexes and grammars. False reject: a valid text that the",
        "masks do not let through; false accept: an invalid text that they do. As they are: the schema as the client",
        "wrote it, cleaned; rewritten: what the backend does not take is rebuilt from its set of values, llguidance",
        "makes properties in any order (`schema order`: with `grammar_property_order`). First mask: parsing, cleaning,",
        "rewriting and compiling included. Times on a busy machine with one thread: read ratios.",
        "",
        "Where properties come in the schema's order, a valid text in another order is a false reject by construction;",
        "the column says how many are of that kind (found by search, so at least that many). Cut: the walks of the",
        "case took longer than its time; what was walked until then counts.",
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
        lines += [f"### {one['backend']}, {_way(one)}", ""]
        lines += [f"- {count} x {reason}" for reason, count in reasons.most_common(40)]
        if one["cases_left"]:
            lines += [f"- ({one['cases_left']} cases not run: time budget)"]
        lines.append("")
    return "\n".join(lines)


def _table_row(name: str, one: Json, s: Json) -> str:
    return (
        f"| {name} | {one['backend']} | {_way(one)} | {s['cases']} | {s['compiled']} "
        f"| {s['refused']} | {s['all_right']} | {s['false_reject']}/{s['valid']} "
        f"| {s['false_reject_order']} | {s['false_accept']}/{s['invalid']} "
        f"| {s['crash']} | {s['hang']} | {s['cut']} | {s['run_time_errors']} "
        f"| {'/'.join(map(str, s['first_mask_ms']))} | {'/'.join(map(str, s['mask_us']))} |"
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
    parser.add_argument("--order", choices=["any", "schema"], default="any", help="of properties")
    parser.add_argument("--budget-s", type=float)
    parser.add_argument("--case-s", type=float, default=CASE_LIMIT_S)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--only", help="regular expression on case ids")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path, nargs="+")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path, help="figures of --report, without any text of the sets")
    arguments = parser.parse_args()
    if arguments.report:
        text = report(arguments.report)
        if arguments.markdown:
            arguments.markdown.write_text(text)
        else:
            print(text)
        if arguments.json:
            arguments.json.write_text(json.dumps(summary_of(arguments.report), indent=1) + "\n")
        return
    how = Run(
        arguments.backend,
        arguments.tokenizer,
        not arguments.no_rewriting,
        arguments.order,
        arguments.case_s,
        arguments.budget_s,
        arguments.only,
    )
    before = json.loads(arguments.out.read_text()) if arguments.resume and arguments.out.exists() else None
    one = how.over(arguments.data, before)
    if arguments.out:
        arguments.out.write_text(json.dumps(one))
    groups = collections.defaultdict(list)
    for result in one["results"]:
        groups[_set_of(result)].append(result)
    for name in sorted(groups):
        print(name, json.dumps(summarise(groups[name])))


if __name__ == "__main__":
    main()
