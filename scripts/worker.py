"""Joins this host's ranks to a model that a server on another host holds part of; see docs/parallel.md.

Start it on every host but the server's, with the same MASTER_ADDR, MASTER_PORT, NUM_SHARD, TEXTGEN_NUM_NODES and
TEXTGEN_GROUP_SECRET as there, and a NODE_RANK of its own from 1 up. Everything else of the model (type, limits, ...)
comes from the server. It waits for the server, serves, and waits anew when the server has restarted, until SIGTERM.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import click

_REPOSITORY_ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(_REPOSITORY_ROOT / "model_repository" / "textgen" / "1"))

from textgen_engine.parallel.launch import Invitation, RankProcess  # noqa: E402
from textgen_serve.terminal import Terminal  # noqa: E402

_LOOK_S = 0.2
_PAUSE_S = 1.0


def main(**given: Any) -> None:
    """Turn what click parsed into ranks, again and again until a signal says stop."""
    terminal = Terminal()
    problem = _problem(given)
    if problem is not None:
        terminal.error(problem)
        sys.exit(1)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    ranks = _ranks(given)
    names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    place = f"{given['master_addr']}:{given['master_port']}"
    terminal.say(f"{names} of {given['num_shard']}: waiting for the server at {place}")
    while not stop.is_set():
        ended = _serve_once(given, ranks, stop)
        if ended is not None:
            terminal.warn(f"{ended}; all ranks of this host start anew")
            stop.wait(_PAUSE_S)
    terminal.say("stopped")


def _problem(given: dict[str, Any]) -> str | None:
    """What is wrong with the options, in one line."""
    for name in ("master_addr", "group_secret", "num_shard"):
        if not given[name]:
            variable = "TEXTGEN_GROUP_SECRET" if name == "group_secret" else name.upper()
            return f"{variable} is not set: give what the server has"
    if given["rank"] is None and given["node_rank"] is None:
        return "NODE_RANK (or RANK, for a single rank) is not set: which host of the group this is, from 1 up"
    if given["num_shard"] % given["num_nodes"]:
        return f"NUM_SHARD ({given['num_shard']}) must be a multiple of TEXTGEN_NUM_NODES ({given['num_nodes']})"
    ranks = _ranks(given)
    if not 0 < ranks[0] <= ranks[-1] < given["num_shard"]:
        return f"ranks {ranks[0]} to {ranks[-1]} are not among 1 to {given['num_shard'] - 1}; rank 0 is the server"
    return None


def _ranks(given: dict[str, Any]) -> range:
    if given["rank"] is not None:
        return range(given["rank"], given["rank"] + 1)
    per_node = given["num_shard"] // given["num_nodes"]
    return range(given["node_rank"] * per_node, (given["node_rank"] + 1) * per_node)


def _serve_once(given: dict[str, Any], ranks: range, stop: threading.Event) -> str | None:
    """Run the ranks until one ends or `stop`; says which ended, and how."""
    try:
        address = socket.gethostbyname(given["address"] or _address_towards(given["master_addr"]))
        store_address = socket.gethostbyname(given["master_addr"])
    except OSError as error:
        return f"{given['master_addr']} cannot be found ({error.strerror or error})"
    processes = [
        RankProcess(
            Invitation(
                rank=rank,
                local_rank=given["local_rank"] if given["local_rank"] is not None else local_rank,
                store_address=store_address,
                store_port=given["master_port"],
                own_address=address,
                secret=given["group_secret"],
                model_id=given["model_id"],
                num_threads=given["num_threads"],
                log_level=given["log_level"],
            ),
            rank,
        )
        for local_rank, rank in enumerate(ranks)
    ]
    try:
        while not stop.wait(_LOOK_S):
            for process in processes:
                ended = process.how_it_ended()
                if ended is not None:
                    return f"rank {process.rank} {ended}"
    finally:
        for process in processes:
            process.end(0)
    return None


def _address_towards(host: str) -> str:
    """The address of this host on the way to another; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        address: str = probe.getsockname()[0]
        return address


def _flags() -> list[click.Parameter]:
    def option(name: str, env: str, help: str, **more: Any) -> click.Option:
        return click.Option([f"--{name}"], envvar=env, help=f"{help}  [{env}]", **more)

    port = click.IntRange(1, 65535)
    number = click.IntRange(min=0)
    positive = click.IntRange(min=1)
    return [
        option("master-addr", "MASTER_ADDR", "Address of the server's host."),
        option("master-port", "MASTER_PORT", "Port the ranks meet at.", type=port, default=29500),
        option("num-shard", "NUM_SHARD", "Ranks in all; torchrun's WORLD_SIZE counts, too.", type=positive,
               default=os.environ.get("WORLD_SIZE")),
        option("num-nodes", "TEXTGEN_NUM_NODES", "Hosts in all.", type=positive, default=1),
        option("node-rank", "NODE_RANK", "Which host this is; the server's is 0.", type=positive),
        option("rank", "RANK", "Be this single rank, as torchrun starts one process for each.", type=number),
        option("local-rank", "LOCAL_RANK", "With --rank: which GPU of this host.", type=number),
        option("group-secret", "TEXTGEN_GROUP_SECRET", "The group's secret."),
        option("address", "TEXTGEN_NODE_ADDRESS", "Address of this host that the others reach; else found."),
        option("model-id", "MODEL_ID", "The checkpoint's folder here, if it differs from the server's."),
        option("num-threads", "TEXTGEN_NUM_THREADS", "CPU threads of each rank.", type=positive),
        option("log-level", "LOG_LEVEL", "What is logged.", default="info"),
    ]  # fmt: skip


def command() -> click.Command:
    """The command line, with defaults of this environment."""
    return click.Command("worker", params=_flags(), callback=main, help=__doc__)


if __name__ == "__main__":
    command()()
