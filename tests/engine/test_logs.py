"""logs.py: facts behind the message in text, fields of the line in JSON; nothing breaks a line."""

from __future__ import annotations

import json
import subprocess
import sys

from textgen_engine import logs

PROGRAM = """
import logging, sys
sys.path.insert(0, {path!r})
from textgen_engine.logs import configure_logging
configure_logging("info", as_json={as_json}, source="textgen")
facts = {{"request_id": "a b\\nc", "output_tokens": 3}}
logging.getLogger("textgen.requests").info("request", extra={{"facts": facts}})
logging.getLogger("x").debug("not shown")
"""


def lines(*, as_json: bool) -> list[str]:
    path = logs.__file__.rpartition("/textgen_engine/")[0]
    program = PROGRAM.format(path=path, as_json=as_json)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return done.stderr.splitlines()


def test_text() -> None:
    assert lines(as_json=False) == ['textgen: INFO request request_id="a b\\nc" output_tokens=3']


def test_json() -> None:
    (line,) = lines(as_json=True)
    said = json.loads(line)
    assert said.pop("time")
    assert said == {
        "level": "INFO",
        "logger": "textgen.requests",
        "message": "request",
        "source": "textgen",
        "request_id": "a b\nc",
        "output_tokens": 3,
    }
