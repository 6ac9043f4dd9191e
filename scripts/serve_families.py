"""Serve random models of a few hundred megabytes, in the shape of Mixtral, Falcon and StarCoder, through tritonserver.

Each is asked four unlike questions at once over HTTP; the texts must be those of transformers' own greedy generate.
Ends with status 1 when one is not. --write puts the results into docs/models.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "model_repository/textgen/1")]

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from textgen_coverage.page import PAGE, render  # noqa: E402
from textgen_coverage.shapes import SHAPES, record, save_shape  # noqa: E402

SERVED = ("Mixtral", "Falcon", "StarCoder")
PROMPTS = (
    "The capital of France is",
    "def add(a, b):",
    "Once upon a time there was a little girl who lived with her grandmother in the middle of a deep, dark wood. " * 4,
    "1, 2, 3,",
)
NUM_TOKENS = 16
READY_WITHIN_S = 240.0


@click.command(help=__doc__)
@click.argument("families", nargs=-1)
@click.option("--tokenizer", type=click.Path(path_type=Path), default=ROOT / ".cache/models/smollm2-135m-instruct")
@click.option("--write", is_flag=True)
def main(families: tuple[str, ...], tokenizer: Path, write: bool) -> None:
    """Serve FAMILIES, or the three."""
    unknown = set(families) - SHAPES.keys()
    if unknown:
        raise click.ClickException(f"no such family: {', '.join(sorted(unknown))}; known: {', '.join(SHAPES)}")
    transformers.utils.logging.disable_progress_bar()
    all_right = True
    for family in families or SERVED:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            megabytes = save_shape(folder, family, AutoTokenizer.from_pretrained(tokenizer))
            expected = [_generate(folder, prompt) for prompt in PROMPTS]
            ready_s, texts = _serve(folder, Path(scratch))
        same = sum(text == right for text, right in zip(texts, expected, strict=True))
        all_right = all_right and same == len(PROMPTS)
        click.echo(f"{family}: {megabytes:.0f} MB, ready after {ready_s:.0f} s, {same} of {len(PROMPTS)} texts equal")
        if write:
            found = {"megabytes": round(megabytes), "texts": len(PROMPTS), "equal": same, "tokens": NUM_TOKENS}
            record("served", {family: found})
            PAGE.write_text(render(), encoding="utf-8")
    if not all_right:
        raise click.ClickException("a text differs from transformers'")


def _generate(folder: Path, prompt: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0
        )
    text: str = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def _serve(folder: Path, scratch: Path) -> tuple[float, list[str]]:
    """Start a server, ask all questions at once, end it: seconds until it was ready, and the texts."""
    ready_file = scratch / "ready.json"
    command = [sys.executable, str(ROOT / "scripts/serve.py"), "--host", "127.0.0.1", "--no-demo", "--no-gateway"]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--ready-file", str(ready_file)]
    environment = {**os.environ, "MODEL_ID": str(folder), "MAX_BATCH_TOTAL_TOKENS": "2048"}
    started = time.monotonic()
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=scratch)
    try:
        while not ready_file.exists():
            if launcher.poll() is not None or time.monotonic() - started > READY_WITHIN_S:
                raise click.ClickException("the server did not get ready")
            time.sleep(0.2)
        ready_s, port = time.monotonic() - started, json.loads(ready_file.read_text())["http_port"]
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return ready_s, list(pool.map(lambda prompt: _ask(port, prompt), PROMPTS))
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(60)


def _ask(port: int, prompt: str) -> str:
    body: dict[str, Any] = {"text_input": prompt, "max_new_tokens": NUM_TOKENS}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v2/models/textgen/generate", json.dumps(body).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        text: str = json.load(response)["text_output"]
    return text


if __name__ == "__main__":
    main()
