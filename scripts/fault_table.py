"""Writes the table of faults in docs/operations.md from what `pytest --record-faults` measured.

What the operator does stands here; what clients see and how long it took comes from the record.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

_PLACE = re.compile(r"(<!-- faults: [^>]*-->\n).*(<!-- /faults -->)", re.DOTALL)

# fault -> what the operator does; the order of the table.
_OPERATOR: dict[str, str] = {
    "engine killed": "nothing; the log says why. If the kernel killed it: less memory (`TextgenEngineRestarts`)",
    "engine hangs": "nothing; `TEXTGEN_ENGINE_HEARTBEAT_TIMEOUT_S` (20, here 3) bounds it",
    "a step never ends": "nothing; `TEXTGEN_ENGINE_HANG_TIMEOUT_S` (120, here 4) bounds it",
    "a request crashes the engine": "the log has a refused request with `error_type=validation`: report it",
    "out of memory in a step": "if it repeats: smaller `MAX_BATCH_PREFILL_TOKENS` or `MAX_BATCH_SIZE`",
    "rank killed": "nothing; the log says why (`NUM_SHARD=2`)",
    "rank hangs": "nothing; `TEXTGEN_COLLECTIVE_TIMEOUT_S` (60, here 3) bounds it",
    "KV cache full": "see `TextgenKvCacheNearlyFull`",
    "stub of textgen killed": "nothing; the launcher starts the server again",
    "stub of two ranks killed": "the same (`NUM_SHARD=2`)",
    "stub of tokenizer killed": "nothing; the launcher loads the tokenizer again",
    "tritonserver killed": "nothing; the launcher starts it again",
    "/dev/shm full": "a larger `/dev/shm`; see who else fills it",
    "disk full for logs": "make room; logging goes on by itself",
    "connects and disconnects": "nothing",
    "slow readers": "nothing; `max_new_tokens` bounds what waits for them",
    "time jump": "nothing",
    "SIGTERM": "`GRACEFUL_TERMINATION_TIMEOUT` as long as your longest answer",
}


@click.command(help=__doc__)
@click.argument("record", type=click.Path(path_type=Path, exists=True))
@click.argument("page", type=click.Path(path_type=Path, exists=True))
def main(record: Path, page: Path) -> None:
    """Rewrite what is between the marks in `page`."""
    found: dict[str, dict[str, Any]] = json.loads(record.read_text())
    unknown = found.keys() - _OPERATOR.keys()
    if unknown:
        raise click.ClickException(f"no advice for {', '.join(sorted(unknown))}")
    rows = ["| fault | clients see | told after | answers again after | the operator |", "|---|---|---|---|---|"]
    for fault, advice in _OPERATOR.items():
        if fault in found:
            seen = found[fault]
            times = f"{_seconds(seen['told_after_s'])} | {_seconds(seen['recovered_after_s'])}"
            rows.append(f"| {fault} | {seen['clients_see']} | {times} | {advice} |")
    text = page.read_text()
    if not _PLACE.search(text):
        raise click.ClickException(f"{page} has no marks for the table")
    page.write_text(_PLACE.sub(lambda place: place[1] + "\n".join(rows) + "\n" + place[2], text))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


if __name__ == "__main__":
    main()
