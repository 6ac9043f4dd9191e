"""The `textgen` command as a process: output, exit codes, one line per failure; chat obeys its commands and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from textgen_client.watermark import is_green

from .fake_triton import Call, FakeTriton, echo, flag_of, parameters_of, response, strings_of


class Command:
    """The command, aimed at one server."""

    def __init__(self, url: str, environment: dict[str, str]) -> None:
        self._environment = {**environment, "TEXTGEN_URL": url}

    def __call__(self, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        """Run it to its end; exit code, standard output and standard error."""
        process = self.start(*arguments)
        out, err = process.communicate(stdin, timeout=30)
        return process.returncode, out.decode(), err.decode()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "textgen_client", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
        )


@pytest.fixture
def textgen(triton: FakeTriton, environment: dict[str, str]) -> Command:
    return Command(triton.url, environment)


def test_generate(triton: FakeTriton, textgen: Command) -> None:
    assert textgen("generate", "a é 🦙") == (0, "a é 🦙\n", "")
    assert flag_of(triton.calls[-1].request, "stream") is True
    assert textgen("generate", "--no-stream", "-", stdin="Straße".encode()) == (0, "Straße\n", "")
    code, out, _ = textgen(
        "generate", "hi", "--json", "--top-k", "5", "--stop", "A", "--stop", "B", "-p", "details=true",
        "-p", "adapter_id=x", "-p", 'grammar={"type": "regex"}',
    )  # fmt: skip
    assert (code, json.loads(out)["choices"][0]["text"]) == (0, "hi")
    assert parameters_of(triton.calls[-1].request) == {
        "top_k": 5,
        "stop": ["A", "B"],
        "details": True,
        "adapter_id": "x",
        "grammar": {"type": "regex"},
    }
    code, out, _ = textgen("generate", "a b", "--json", "--stream")
    assert [json.loads(line)["choices"][0]["text"] for line in out.splitlines()] == ["a ", "b"]


@pytest.mark.parametrize(
    "arguments", [("generate", "hi"), ("generate", "hi", "--no-stream"), ("models",), ("cancel", "x")]
)
def test_a_failure_is_one_line(environment: dict[str, str], free_port: int, arguments: tuple[str, ...]) -> None:
    code, _, err = Command(f"127.0.0.1:{free_port}", environment)(*arguments)
    assert code == 1
    assert err.count("\n") == 1
    assert err.startswith("textgen: Server unavailable: 127.0.0.1:")


def test_usage_errors(textgen: Command) -> None:
    for arguments in (("generate",), ("generate", "hi", "-p", "x"), ("generate", "hi", "-p", "timeout=1")):
        code, _, err = textgen(*arguments)
        assert code == 2
        assert "Traceback" not in err
    assert textgen("generate", "-", stdin=b"\xff")[0] == 1


def test_models_health_cancel(triton: FakeTriton, textgen: Command) -> None:
    code, out, _ = textgen("models")
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, ["textgen", "broken"])
    assert textgen("health")[0] == 0
    code, out, _ = textgen("health", "--json", "--model", "other")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert textgen("cancel", "some-id")[0] == 0
    assert triton.calls[-1].request.id == "some-id"


def test_several_choices_are_all_shown(triton: FakeTriton, textgen: Command) -> None:
    triton.script = lambda request, call: iter([response(text_output=["a", "b"], final=True)])
    assert textgen("generate", "hi", "-p", "n=2") == (0, "[0] a\n[1] b\n", "")
    assert flag_of(triton.calls[-1].request, "stream") is False


def test_ctrl_c_leaves_with_130(triton: FakeTriton, textgen: Command) -> None:
    triton.script = _slow
    process = textgen.start("generate", "slow")
    assert process.stdout is not None
    assert process.stdout.read(5) == b"word "
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, b"Traceback" in err) == (130, False)
    assert triton.calls[-1].left.wait(5)


def test_chat_keeps_history(triton: FakeTriton, textgen: Command) -> None:
    triton.script = _says_ok
    code, out, err = textgen("chat", "--system", "Be brief.", stdin=b"a\nb\n/reset\nc\n/exit\n")
    assert (code, err) == (0, "")
    assert out.count("ok") == 3
    system = {"role": "system", "content": "Be brief."}
    asked = [json.loads((strings_of(call.request, "messages") or [""])[0]) for call in triton.calls]
    assert [[message["content"] for message in messages] for messages in asked] == [
        ["Be brief.", "a"],
        ["Be brief.", "a", "ok", "b"],
        ["Be brief.", "c"],
    ]
    assert asked[0][0] == system


def test_chat_survives_errors_and_ctrl_c(triton: FakeTriton, textgen: Command) -> None:
    triton.script = _slow
    process = textgen.start("chat")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"slow\n")
    process.stdin.flush()
    assert process.stdout.read(len(b"> word ")) == b"> word "
    process.send_signal(signal.SIGINT)
    assert triton.calls[-1].left.wait(5)
    assert process.stdout.readline() == b"\n"
    assert process.stdout.readline() == b"(cancelled)\n"
    _, err = process.communicate(b"fail\nhi\n", timeout=20)
    assert process.returncode == 0
    assert err == b"Model is overloaded: 1\n"
    last = json.loads((strings_of(triton.calls[-1].request, "messages") or [""])[0])
    assert [message["content"] for message in last] == ["slow", "word ", "hi"]  # the failed turn is forgotten


def _says_ok(request: Any, call: Call) -> Iterator[Any]:
    yield response(text_output="ok", final=True)


def _slow(request: Any, call: Call) -> Iterator[Any]:
    """Endless for a prompt that ends in "slow", refused for "fail", an echo else."""
    messages = strings_of(request, "messages")
    text = json.loads(messages[0])[-1]["content"] if messages else (strings_of(request, "text_input") or [""])[0]
    if text == "fail":
        yield response(error="Model is overloaded: 1", final=True)
    elif text == "slow":
        yield response(text_output="word ")
        call.left.wait(30)
    else:
        yield from echo(request, call)


def _verdict(**fields: Any) -> Any:
    """A script that answers every grammar check alike."""
    whole = {"supported": True, "backend": "llguidance", "warnings": [], "error": None}
    verdict = {**whole, "accepted": None, "accepted_prefix": 0, "reason": None, **fields}

    def script(request: Any, call: Call) -> Iterator[Any]:
        yield response(final=True, text_output=json.dumps(verdict))

    return script


def test_validate(triton: FakeTriton, textgen: Command, tmp_path: Path) -> None:
    triton.script = _verdict(accepted=True, accepted_prefix=2, warnings=["format ignored"])
    assert textgen("validate", "--regex", "a+", "--text", "aa") == (0, "accepted\n", "warning: format ignored\n")
    request = triton.calls[-1].request
    assert (request.model_name, strings_of(request, "text_input")) == ("textgen", None)
    assert parameters_of(request) == {"grammar": {"type": "regex", "value": "a+"}, "grammar_check": {"text": "aa"}}
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "integer"}')
    triton.script = _verdict(accepted=False, reason="'x' at character 0 is not allowed there")
    said = textgen("validate", "--schema", str(schema), "--file", "-", "--backend", "lmfe", stdin=b"x\n")
    assert said == (1, "not accepted: 'x' at character 0 is not allowed there\n", "")
    assert parameters_of(triton.calls[-1].request) == {
        "grammar": {"type": "json", "value": '{"type": "integer"}'},
        "grammar_check": {"text": "x\n"},
        "grammar_backend": "lmfe",
    }
    triton.script = _verdict()
    assert textgen("validate", "--grammar", '{"type": "lark", "value": "x"}') == (0, "supported by llguidance\n", "")
    assert parameters_of(triton.calls[-1].request)["grammar_check"] is True
    assert textgen("validate", "--regex", "a", "--text", "")[0] == 1, "an empty text is a text"
    triton.script = _verdict(supported=False, error="regex: bad")
    assert textgen("validate", "--regex", "(", "--text", "a") == (2, "", "not supported: regex: bad\n")
    code, out, _ = textgen("validate", "--regex", "(", "--json")
    assert (code, json.loads(out)["error"]) == (2, "regex: bad")


def test_adapters(triton: FakeTriton, textgen: Command) -> None:
    adapter = {
        "name": "support", "rank": 16, "num_layers": 60, "num_bytes": 3 << 20, "at_start": False, "live_requests": 2,
        "unloading": False,
    }  # fmt: skip

    triton.adapters = [adapter]
    line = "support              rank 16, 60 layers, 3.0 MiB  2 live\n"
    for command, sent in (
        (("list",), {"action": "list"}),
        (("load", "support", "team/support"), {"action": "load", "name": "support", "path": "team/support"}),
        (("load", "support"), {"action": "load", "name": "support"}),
        (("unload", "support"), {"action": "unload", "name": "support"}),
    ):
        assert textgen("adapters", *command) == (0, line, "")
        request = triton.adapter_commands[-1]
        assert (request.model_name, strings_of(request, "text_input")) == ("textgen", None)
        assert parameters_of(request) == {"adapter_command": sent}
    assert json.loads(textgen("adapters", "list", "--json")[1]) == [adapter]
    assert textgen("adapters", "load")[0] == 2


def test_detect_watermark(textgen: Command) -> None:
    ids, token_id = [7], 0
    while len(ids) < 60:
        token_id += 1
        if is_green(ids[-1], token_id):
            ids.append(token_id)
    code, out, err = textgen("detect-watermark", "--ids", json.dumps(ids))
    assert (code, out.splitlines()[1], err) == (0, "watermark found", "")
    assert out.startswith("z = 7.68, p = ")
    code, out, _ = textgen("detect-watermark", "-", "--json", stdin=b"abab")  # the fake's tokens are characters
    found = json.loads(out)
    assert (code, found["num_pairs"], found["detected"]) == (0, 2, False)
    assert textgen("detect-watermark", "no watermark here")[1].splitlines()[1] == "no watermark found"


def test_usage_errors_of_checks(textgen: Command) -> None:
    for arguments in (
        ("validate",),
        ("validate", "--regex", "a", "--grammar", "{}"),
        ("validate", "--grammar", "{"),
        ("validate", "--schema", "/nonesuch"),
        ("validate", "--regex", "a", "--text", "a", "--file", "-"),
        ("detect-watermark",),
        ("detect-watermark", "text", "--ids", "[1]"),
        ("detect-watermark", "--ids", "5"),
        ("detect-watermark", "--ids", "[-5]"),
        ("detect-watermark", "--ids", "[5]", "--gamma", "1"),
    ):
        code, _, err = textgen(*arguments)
        assert code == 2, arguments
        assert "Traceback" not in err
