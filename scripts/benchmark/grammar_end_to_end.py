#!/usr/bin/env python3
"""Ask a running server for texts that obey a set of schemas and regexes, sampled, and check every text that comes.

    grammar_end_to_end.py FOLDER --url 127.0.0.1:8001 [--schemas 100] [--seed 0] [--output benchmarks/results]

FOLDER holds schemas.jsonl and regexes.jsonl, as grammar_conformance.py reads them. Schemas are taken in the order of a
hash of their ids until so many gave a finished text; regexes are taken all. A finished text must parse and be valid by
the jsonschema package (in the schema's own dialect), or match by re.fullmatch (by regex.fullmatch where Python's re
cannot read the pattern). Writes grammar_end_to_end.json and .md:
figures, and the ids of what went wrong; no schema and no text. The exit status is 1 if anything did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema
import regex  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "client"), str(ROOT / "scripts")]

from benchmark.grammar_conformance import load_cases, request_form  # noqa: E402

from textgen_client import Client, TextgenError, ValidationError  # noqa: E402

Json = dict[str, Any]

# How a case ended; what is written in capitals is wrong. `cut`: the text reached its length before its grammar was
# complete. `unchecked`: the checker cannot read the schema or the pattern.
OUTCOMES = ("valid", "refused", "cut", "unchecked", "INVALID", "ACCEPTED", "FAILED")
JUDGED = ("valid", "INVALID")
HEADINGS = {
    "valid": "finished and valid",
    "refused": "refused, with a reason",
    "cut": "cut by its length",
    "unchecked": "finished, not checkable",
    "INVALID": "finished and invalid",
    "ACCEPTED": "accepted, though malformed",
    "FAILED": "failed",
}


@dataclass(frozen=True)
class Result:
    """One case. outcome: of OUTCOMES. note: why it was refused, or what is wrong with the text. seconds: to answer."""

    case_id: str
    group: str
    outcome: str
    note: str = ""
    tokens: int = 0
    seconds: float = 0.0
    warned: bool = False


def main() -> int:
    """Run, write both files, print the table."""
    arguments = _arguments()
    cases = sorted(load_cases(arguments.folder), key=lambda case: hashlib.sha256(case["id"].encode()).hexdigest())
    schemas = [case for case in cases if case["kind"] == "json_schema"]
    regexes = [case for case in cases if case["kind"] == "regex"]
    with Client(arguments.url, timeout=600) as client, ThreadPoolExecutor(arguments.concurrency) as threads:
        known = read_pieces(arguments.pieces)

        def ask(case: Json) -> Result:
            if case["id"] in known:
                return known[case["id"]]
            result = ask_one(client, case, arguments)
            if arguments.pieces is not None:
                with arguments.pieces.open("a") as pieces:
                    pieces.write(json.dumps(asdict(result)) + "\n")
            return result

        results = list(threads.map(ask, regexes))
        results += until_finished(threads, ask, schemas, arguments.schemas)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {platform.processor() or 'CPU'}",
        "model": arguments.model_name,
        "temperature": 1.0,
        "seed": arguments.seed,
        "max_new_tokens": arguments.max_new_tokens,
        "concurrency": arguments.concurrency,
        "seconds_of_requests": round(sum(result.seconds for result in results), 1),
        "groups": summarise(results),
        "wrong": [{"id": r.case_id, "outcome": r.outcome, "why": r.note} for r in results if r.outcome.isupper()],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "grammar_end_to_end.json").write_text(json.dumps(report, indent=2) + "\n")
    text = markdown(report)
    (arguments.output / "grammar_end_to_end.md").write_text(text)
    print(text)
    return 1 if report["wrong"] else 0


def read_pieces(path: Path | None) -> dict[str, Result]:
    """What earlier runs found, by the cases' ids."""
    if path is None or not path.is_file():
        return {}
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return {result.case_id: result for result in results}


def until_finished(
    threads: ThreadPoolExecutor, ask: Callable[[Json], Result], cases: list[Json], count: int
) -> list[Result]:
    """Results in order, until `count` texts were finished and could be judged."""
    results: list[Result] = []
    while cases and (missing := count - sum(result.outcome in JUDGED for result in results)) > 0:
        batch, cases = cases[:missing], cases[missing:]
        results += threads.map(ask, batch)
    return results


def ask_one(client: Client, case: Json, arguments: argparse.Namespace) -> Result:
    """One request and the judgement of its answer."""
    group = f"{case['source']} {case['dataset']}" if case["kind"] == "json_schema" else f"regex {case['dataset']}"
    begin_s = time.monotonic()
    try:
        answer = client.generate(
            messages=[{"role": "user", "content": prompt_of(case)}],
            grammar=request_form(case),
            temperature=1.0,
            seed=arguments.seed,
            max_new_tokens=arguments.max_new_tokens,
            details=True,
        )
    except ValidationError as error:
        return Result(case["id"], group, "refused", str(error))
    except TextgenError as error:
        return Result(case["id"], group, "FAILED", str(error))
    seconds = time.monotonic() - begin_s
    warned = bool((answer.details or {}).get("warnings"))
    if case.get("expect") == "error":
        outcome, note = "ACCEPTED", "malformed, and accepted"
    elif answer.finish_reason != "eos_token":
        outcome, note = "cut", str(answer.finish_reason)
    else:
        try:
            note = fault_of(case, answer.text)
            outcome = "INVALID" if note else "valid"
        except Exception as error:  # of the checker: an unresolvable reference, a pattern it cannot read
            outcome, note = "unchecked", type(error).__name__
    return Result(case["id"], group, outcome, note, answer.num_output_tokens or 0, seconds, warned)


def prompt_of(case: Json) -> str:
    """A model that has seen the schema comes to an end sooner; long ones are cut."""
    wanted = case["pattern"] if case["kind"] == "regex" else json.dumps(case["schema"])
    kind = "a text that matches this pattern" if case["kind"] == "regex" else "a short JSON value for this schema"
    return f"Write {kind}, and nothing else: {wanted[:600]}"


def fault_of(case: Json, text: str) -> str:
    """What is wrong with a finished text; empty where nothing is. Kept free of the text and the schema. Raises what the
    checker raises."""
    if case["kind"] == "regex":
        try:
            return "" if re.fullmatch(case["pattern"], text) else "re.fullmatch does not accept it"
        except re.error:  # it knows no \p{...}
            return "" if regex.fullmatch(case["pattern"], text) else "regex.fullmatch does not accept it"
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"no JSON: {type(error).__name__}"
    schema = case["schema"]
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    errors = list(validator(schema).iter_errors(value))
    return ", ".join(sorted({f"{error.validator} at {error.json_path}" for error in errors}))


def summarise(results: Iterable[Result]) -> Json:
    """Figures per data set, and over all schemas and all regexes."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        whole = "all regexes" if result.group.startswith("regex") else "all schemas"
        for name in (result.group, whole):
            groups.setdefault(name, []).append(result)
    return {name: figures(members) for name, members in sorted(groups.items())}


def figures(members: list[Result]) -> Json:
    """Counts of outcomes, and how long the texts were."""
    counts = Counter(member.outcome for member in members)
    tokens = sorted(member.tokens for member in members if member.tokens)
    return {
        "cases": len(members),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "with_warnings": sum(member.warned for member in members),
        "median_tokens": tokens[len(tokens) // 2] if tokens else 0,
    }


def markdown(report: Json) -> str:
    """The report as a page."""
    lines = [
        "# Sampled texts against their grammars, through a server",
        "",
        "Every finished text was checked with the jsonschema package or `re.fullmatch` (`regex.fullmatch` for `\\p`). "
        f"{report['model']}, temperature {report['temperature']:g}, seed {report['seed']}, at most "
        f"{report['max_new_tokens']} tokens, {report['concurrency']} requests at a time; "
        f"{report['machine']}, {report['date']}.",
        "",
        "| set | cases | " + " | ".join(HEADINGS[outcome] for outcome in OUTCOMES) + " | median tokens |",
        "|---|" + "---|" * (len(OUTCOMES) + 2),
    ]
    for name, row in report["groups"].items():
        cells = [name, row["cases"], *(row[outcome] for outcome in OUTCOMES), row["median_tokens"]]
        if name.startswith("all "):
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines.append("")
    lines += [f"- `{wrong['id']}`: {HEADINGS[wrong['outcome']]}: {wrong['why']}" for wrong in report["wrong"]]
    return "\n".join(lines).rstrip() + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds schemas.jsonl and regexes.jsonl")
    parser.add_argument("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC port")
    parser.add_argument("--schemas", type=int, default=100, help="finished texts of schemas to judge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument(
        "--model-name", default="SmolLM2-135M-Instruct, float32", help="what the server serves, in words"
    )
    parser.add_argument("--pieces", type=Path, help="file of the results so far")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
