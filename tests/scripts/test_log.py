"""textgen_serve/log.py: which line of a server's log explains a failure."""

from __future__ import annotations

from pathlib import Path

from textgen_serve.log import LogFollower, LogLine, parse_line

ERROR = "E1121 12:00:00.123456 345 model_lifecycle.cc:654] "


def _reason(tmp_path: Path, *lines: str) -> str | None:
    log = LogFollower(tmp_path / "log")
    log.path.write_text("".join(f"{line}\n" for line in lines))
    log.read()
    return log.reason


def test_our_fatal_line_explains_best(tmp_path: Path) -> None:
    reason = _reason(
        tmp_path,
        ERROR + "\"failed to load 'textgen' version 1: Internal: a traceback\"",
        "textgen: fatal: MODEL_ID is not set",
        "error: creating server: Internal - failed to load all models",
    )
    assert reason == "MODEL_ID is not set"


def test_a_model_explains_better_than_the_server(tmp_path: Path) -> None:
    reason = _reason(
        tmp_path,
        ERROR + '"CudaDriverHelper has not been initialized."',
        "error: creating server: Internal - failed to load all models",
        ERROR + "\"failed to load 'textgen' version 1: Invalid argument: unknown field\"",
    )
    assert reason == "Invalid argument: unknown field"


def test_errors_that_explain_nothing(tmp_path: Path) -> None:
    assert _reason(tmp_path, ERROR + '"CudaDriverHelper has not been initialized."') is None


def test_stage_names_what_still_loads(tmp_path: Path) -> None:
    triton = "I1121 12:00:00.123456 345 model_lifecycle.cc:472] "
    log = LogFollower(tmp_path / "log")
    stages = []
    for line in (
        triton + '"loading: tokenizer:1"',
        triton + '"loading: textgen:1"',
        triton + "\"successfully loaded 'tokenizer'\"",
        "textgen engine: INFO 2912 KV blocks",
        triton + "\"successfully loaded 'textgen'\"",
    ):
        with log.path.open("a") as file:
            file.write(line + "\n")
        log.read()
        stages.append(log.stage)
    assert stages == [
        "loading tokenizer",
        "loading tokenizer, textgen",
        "loading textgen",
        "loading textgen: 2912 KV blocks",
        "",
    ]


def test_severity_of_lines() -> None:
    assert parse_line(ERROR + '"text"') == LogLine("E", "text")
    assert parse_line("textgen: WARNING text") == LogLine("W", "text", ours=True)
    assert parse_line("textgen: fatal: text") == LogLine("F", "text", ours=True)
    assert parse_line(ERROR + '"textgen: fatal: text"') == LogLine("F", "text", ours=True)
    assert parse_line("anything else") == LogLine("", "anything else")


def test_a_line_that_is_still_being_written_waits(tmp_path: Path) -> None:
    log = LogFollower(tmp_path / "log")
    assert log.read() == []
    with log.path.open("a") as file:
        file.write("textgen: hal")
        file.flush()
        assert log.read() == []
        file.write("f\n")
    assert [line.text for line in log.read()] == ["half"]
