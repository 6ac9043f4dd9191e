"""The engines that take turns. Each is started, given runs, and stopped; what is not installed says so.

Where a rival has an HTTP server, that server is measured; a library is driven in a process of its own, by its own
interpreter, without HTTP (a small advantage for it).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from textgen_client import AsyncClient
from textgen_compare.figures import Record
from textgen_compare.prompts import Prompt

_SCRIPTS = Path(__file__).resolve().parents[1]
_START_LIMIT_S = 400.0


class EngineError(Exception):
    """An engine did not start or did not answer; one line."""


@dataclass(frozen=True)
class Setting:
    """Where things are. rivals: the folder of `make rivals`, one folder a rival. log: what the engines print."""

    model: Path
    rivals: Path
    log: Path
    threads: int

    def python_of(self, rival: str) -> Path:
        return self.rivals / rival / "bin" / "python"


class Engine(ABC):
    """One engine. precision: of its weights, `float32`, `bfloat16` or `int8`; only equal ones are fair rivals."""

    name: str
    precision: str = "float32"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.process: subprocess.Popen[Any] | None = None

    @abstractmethod
    def missing(self) -> str | None:
        """Why the engine cannot run here, or None."""

    @abstractmethod
    def start(self) -> str:
        """Be ready to answer; the engine's version. Raises EngineError."""

    @abstractmethod
    def run(self, prompts: Sequence[Prompt], concurrency: int, new_tokens: int) -> list[Record]:
        """`concurrency` requests kept in flight until all are done: greedy, exactly new_tokens each."""

    def roots(self) -> list[int]:
        """The processes whose trees are the engine's."""
        return [self.process.pid] if self.process else []

    def stop(self) -> None:
        """End the engine and wait for it."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _launch(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
        with self.setting.log.open("ab") as log:
            options = {"stdout": log, "stderr": log, "start_new_session": True, **options}
            self.process = subprocess.Popen(list(command), env=environment, **options)
        return self.process

    def _wait_until(self, is_ready: Callable[[], bool]) -> None:
        assert self.process is not None
        end = time.monotonic() + _START_LIMIT_S
        while not is_ready():
            if self.process.poll() is not None:
                raise EngineError(
                    f"{self.name} ended with {self.process.returncode}; its output is in {self.setting.log}"
                )
            if time.monotonic() > end:
                raise EngineError(f"{self.name} was not ready after {_START_LIMIT_S:.0f} s")
            time.sleep(0.02)


class TextgenEngine(Engine):
    """Our whole server: tritonserver with its models, asked over gRPC streams. `options` are what makes it another
    precision."""

    name = "triton-textgen"

    def __init__(self, setting: Setting, *, precision: str = "float32", options: dict[str, str] | None = None) -> None:
        super().__init__(setting)
        self.precision = precision
        self._options = options or {}
        self._url = ""
        if precision != "float32":
            self.name = f"triton-textgen {precision}"

    def missing(self) -> str | None:
        if self.precision == "bfloat16" and _own_choice() != self.precision:
            return "the processor does not multiply bfloat16"
        return None

    def start(self) -> str:
        ready = Path(tempfile.mkdtemp(prefix="textgen-compare-")) / "ready.json"
        command = [sys.executable, str(_SCRIPTS / "serve.py"), "--no-demo", "--host", "127.0.0.1", "--no-gateway"]
        command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0", f"--ready-file={ready}"]
        # The others do not keep prompts either: all rounds send the same ones.
        settings = {"MODEL_ID": str(self.setting.model), "PREFIX_CACHING": "false", **self._options}
        self._launch(command, env=settings)
        self._wait_until(ready.exists)
        ports = json.loads(ready.read_text())
        self._url = f"127.0.0.1:{ports['grpc_port']}"
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['http_port']}/v2", timeout=10) as response:
            version = json.load(response)["version"]
        return f"triton-textgen on tritonserver {version}"

    def run(self, prompts: Sequence[Prompt], concurrency: int, new_tokens: int) -> list[Record]:
        async def run() -> list[Record]:
            async with AsyncClient(self._url) as client:

                async def ask(prompt: Prompt, record: Record) -> None:
                    stream = client.stream(
                        input_ids=prompt.ids,
                        max_new_tokens=new_tokens,
                        ignore_eos_token=True,
                        return_num_output_tokens=True,
                        details=concurrency == 1,  # for the ids, which are compared
                    )
                    async with stream:
                        async for chunk in stream:
                            now = time.perf_counter()
                            record.times += [now] * (chunk.num_output_tokens or 0)
                            if chunk.details:
                                record.token_ids += [token["id"] for token in chunk.details["tokens"]]

                return await _closed_loop(prompts, concurrency, ask)

        return asyncio.run(run())


class _CompletionServer(Engine):
    """A rival with an HTTP server that streams events."""

    path = "/v1/completions"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._url = ""

    @abstractmethod
    def command(self, port: int) -> list[str]: ...

    @abstractmethod
    def body(self, prompt: Prompt, new_tokens: int) -> dict[str, Any]: ...

    @abstractmethod
    def token_ids(self, event: dict[str, Any]) -> list[int]: ...

    @abstractmethod
    def version(self) -> str: ...

    def environment(self) -> dict[str, str]:
        return {}

    def start(self) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._launch(self.command(port), env=self.environment())

        def is_ready() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self._url}/health", timeout=2).status_code == 200
            return False

        self._wait_until(is_ready)
        return self.version()

    def run(self, prompts: Sequence[Prompt], concurrency: int, new_tokens: int) -> list[Record]:
        async def run() -> list[Record]:
            # A connection for each request: llama.cpp's server closes one after a stream without saying so.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(base_url=self._url, timeout=600, limits=limits) as client:

                async def ask(prompt: Prompt, record: Record) -> None:
                    async with client.stream("POST", self.path, json=self.body(prompt, new_tokens)) as response:
                        if response.status_code != 200:
                            raise EngineError(f"{self.name}: {(await response.aread()).decode()[:200]}")
                        async for line in response.aiter_lines():
                            if line.startswith("data:") and line[5:].strip() != "[DONE]":
                                ids = self.token_ids(json.loads(line[5:]))
                                record.token_ids += ids
                                record.times += [time.perf_counter()] * len(ids)

                return await _closed_loop(prompts, concurrency, ask)

        return asyncio.run(run())


class VllmEngine(_CompletionServer):
    """vLLM's OpenAI server, CPU build."""

    name = "vLLM"

    def missing(self) -> str | None:
        return _unless_there(self.setting.rivals / "vllm" / "bin" / "vllm")

    def command(self, port: int) -> list[str]:
        return [
            *(str(self.setting.rivals / "vllm" / "bin" / "vllm"), "serve", str(self.setting.model)),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--served-model-name", "m"),
            *("--max-model-len", "2048", "--max-num-seqs", "64", "--no-enable-prefix-caching"),
        ]

    def environment(self) -> dict[str, str]:
        return {
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.setting.threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }

    def body(self, prompt: Prompt, new_tokens: int) -> dict[str, Any]:
        return {
            "model": "m",
            "prompt": prompt.ids,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    def token_ids(self, event: dict[str, Any]) -> list[int]:
        return [token for choice in event.get("choices", []) for token in choice.get("token_ids") or []]

    def version(self) -> str:
        return "vLLM " + _version_in(self.setting.python_of("vllm"), "vllm_cpu")


class LlamaCppEngine(_CompletionServer):
    """llama.cpp's llama-server on a float32 GGUF."""

    name = "llama.cpp"
    path = "/completion"

    def missing(self) -> str | None:
        return _unless_there(self._server) or _unless_there(self._weights)

    @property
    def _server(self) -> Path:
        return self.setting.rivals / "llama.cpp" / "bin" / "llama-server"

    @property
    def _weights(self) -> Path:
        return self.setting.rivals / "llama.cpp" / "model-f32.gguf"

    def command(self, port: int) -> list[str]:
        threads = str(self.setting.threads)
        return [
            *(str(self._server), "-m", str(self._weights), "--host", "127.0.0.1", "--port", str(port)),
            *("-t", threads, "-tb", threads, "-np", "32", "-c", str(32 * 1280), "-cb", "--no-webui"),
            *("--cache-ram", "0", "-b", "2048", "-ub", "512"),
        ]

    def body(self, prompt: Prompt, new_tokens: int) -> dict[str, Any]:
        return {
            "prompt": prompt.ids,
            "n_predict": new_tokens,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "return_tokens": True,
        }

    def token_ids(self, event: dict[str, Any]) -> list[int]:
        return [] if event.get("stop") else list(event.get("tokens") or [])

    def version(self) -> str:
        shown = subprocess.run([str(self._server), "--version"], capture_output=True, text=True)
        return "llama.cpp " + " ".join((shown.stdout + shown.stderr).split()[:3])


class _Library(Engine):
    """A rival driven by benchmark/rivals/<script> in its own interpreter, one JSON object a line each way."""

    script: str
    rival: str

    def arguments(self) -> list[str]:
        """Further arguments of the script: what to load, and how."""
        return [str(self.setting.model)]

    def missing(self) -> str | None:
        python = self.setting.python_of(self.rival)
        return _unless_there(python) or _unless_there(Path(self.arguments()[0]))

    def start(self) -> str:
        command = [str(self.setting.python_of(self.rival)), str(_SCRIPTS / "benchmark" / "rivals" / self.script)]
        command += ["--threads", str(self.setting.threads), *self.arguments()]
        self._launch(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return str(self._answer()["version"])

    def run(self, prompts: Sequence[Prompt], concurrency: int, new_tokens: int) -> list[Record]:
        assert self.process is not None
        asked = {"prompts": [prompt.ids for prompt in prompts], "concurrency": concurrency, "new_tokens": new_tokens}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return [Record(**record) for record in self._answer()["records"]]

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(f"{self.name} ended; its output is in {self.setting.log}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class TransformersEngine(_Library):
    """transformers' continuous batching."""

    name, script, rival = "transformers", "transformers_batching.py", "transformers"

    def missing(self) -> str | None:
        return None  # it is what our engine stands on, in this very interpreter

    def start(self) -> str:
        link = self.setting.python_of("transformers")
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            # Not the target of the link that a virtual environment's interpreter is: that one lacks the packages.
            link.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            link.chmod(0o755)
        return super().start()


class OpenVinoEngine(_Library):
    """OpenVINO GenAI's continuous batching, on a model exported by `make rivals`."""

    name, script, rival = "OpenVINO GenAI", "openvino_genai_batching.py", "openvino"

    def arguments(self) -> list[str]:
        return [str(self.setting.rivals / "openvino" / "model-fp32"), "--precision", "f32"]


class OpenVinoOwnChoiceEngine(OpenVinoEngine):
    """The same left to its own choice of arithmetic: bfloat16 where the processor has it, and a KV cache of 8 bits."""

    name = "OpenVINO GenAI, own precision"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.precision = _own_choice()

    def arguments(self) -> list[str]:
        return [str(self.setting.rivals / "openvino" / "model-fp32")]


class OpenVinoInt8Engine(OpenVinoEngine):
    """The same with int8 weights, and activations quantized in groups as they come."""

    name, precision = "OpenVINO GenAI int8", "int8"

    def arguments(self) -> list[str]:
        folder = self.setting.rivals / "openvino" / "model-int8"
        return [str(folder), "--batch-tokens", "512", "--dynamic-quantization-group-size", "64"]


class CTranslate2Engine(_Library):
    """CTranslate2, which batches statically: only its runs of one stream are the same work."""

    name, script, rival = "CTranslate2", "ctranslate2_static.py", "ctranslate2"

    def arguments(self) -> list[str]:
        return [str(self.setting.rivals / "ctranslate2" / "model-float32")]


def _own_choice() -> str:
    """What engines choose that take bfloat16 where the processor multiplies it."""
    with contextlib.suppress(OSError):
        if {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()):
            return "bfloat16"
    return "float32"


def all_engines(setting: Setting) -> list[Engine]:
    """Ours first, then every rival that there is an adapter for."""
    return [
        TextgenEngine(setting),
        OpenVinoEngine(setting),
        TextgenEngine(setting, precision="bfloat16", options={"DTYPE": "bfloat16"}),
        OpenVinoOwnChoiceEngine(setting),
        VllmEngine(setting),
        LlamaCppEngine(setting),
        TransformersEngine(setting),
        CTranslate2Engine(setting),
        TextgenEngine(setting, precision="int8", options={"QUANTIZE": "int8", "DTYPE": _own_choice()}),
        OpenVinoInt8Engine(setting),
    ]


async def _closed_loop(
    prompts: Sequence[Prompt], concurrency: int, ask: Callable[[Prompt, Record], Coroutine[Any, Any, None]]
) -> list[Record]:
    """Keep `concurrency` requests in flight until every prompt is done."""
    records = [Record(len(prompt.ids), 0.0) for prompt in prompts]
    waiting = list(zip(prompts, records, strict=True))[::-1]

    async def work() -> None:
        while waiting:
            prompt, record = waiting.pop()
            record.submitted = time.perf_counter()
            await ask(prompt, record)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return records


def _unless_there(path: Path) -> str | None:
    return None if path.exists() else f"not installed ({path.name} is not in {path.parent}; see `make rivals`)"


def _version_in(python: Path, distribution: str) -> str:
    code = f"import importlib.metadata as m; print(m.version('{distribution}'))"
    shown = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return shown.stdout.strip() or "of unknown version"
