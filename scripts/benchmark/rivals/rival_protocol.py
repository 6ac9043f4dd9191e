"""What the scripts of this folder share: run by a rival's own interpreter, so standard library only.

First a line with the version, then for each line of input (prompts, concurrency, new_tokens) a line of records.
Whatever a library prints must not get between them: file descriptor 1 is made standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


class Request:
    """One request and what came of it; `next_prompt` of the loop makes them."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.submitted = 0.0
        self.times: list[float] = []
        self.token_ids: list[int] = []

    def submit(self) -> None:
        self.submitted = time.perf_counter()

    def receive(self, token_ids: list[int], now: float) -> None:
        self.token_ids += token_ids
        self.times += [now] * len(token_ids)


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every script takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("model")
    made.add_argument("--threads", type=int, required=True)
    return made


def take_over_stdout() -> Any:
    """The real standard output; from here on anything printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answers: Any, version: str, run: Callable[[list[Request], int, int], None]) -> None:
    """Answer until the input ends. run(requests, concurrency, new_tokens) fills the requests."""
    print(json.dumps({"version": version}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        requests = [Request(ids) for ids in asked["prompts"]]
        run(requests, asked["concurrency"], asked["new_tokens"])
        records = [
            {
                "num_prompt_tokens": len(request.ids),
                "submitted": request.submitted,
                "times": request.times,
                "token_ids": request.token_ids,
            }
            for request in requests
        ]
        print(json.dumps({"records": records}), file=answers, flush=True)
