"""The clock of an engine's process jumps while eight requests run: deadlines, scheduling and supervision do not care.

Only the engine and its client are tested so. Under libfaketime Triton 2.51 itself calls a stub unhealthy after a jump,
since libfaketime does not carry over every timed wait; a whole server's clock jumps in
tests/server/test_faults_clock.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import libfaketime
import pytest

from textgen_engine.errors import DeadlineExceeded
from textgen_engine.process import EngineClient

from .test_process import PROMPT, Mailbox
from .tiny import make_config, make_request, save_checkpoint

LIBRARY = Path(libfaketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
YEAR_S = 365 * 86400


@pytest.mark.faults
@pytest.mark.skipif(not LIBRARY.is_file(), reason="libfaketime has no library for this system")
def test_jumps_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    offset = tmp_path / "offset"

    def jump(seconds: int) -> None:
        (tmp_path / "staging").write_text(f"{seconds:+d}\n")
        os.replace(tmp_path / "staging", offset)

    jump(0)
    faked = {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    for name, value in faked.items():
        monkeypatch.setenv(name, value)
    mailbox = Mailbox()
    client = EngineClient(
        make_config(model, num_blocks=9 * 256, max_sequences=16, hang_timeout_s=20), mailbox.on_report
    )
    client.start()
    try:
        pid = client.pid
        running = [f"running {index}" for index in range(8)]
        for name in running:
            deadline_s = time.monotonic() + 600
            client.submit(make_request(name, PROMPT, 1500, ignore_eos_token=True, deadline_s=deadline_s))
        mailbox.wait(lambda: all(name in mailbox.answers for name in running))
        for index, seconds in enumerate((YEAR_S, -YEAR_S, 0)):
            jump(seconds)
            shown = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], capture_output=True)
            assert abs(float(shown.stdout) - time.time() - seconds) < 60, "the clock did not jump"
            client.submit(make_request(f"in time {index}", PROMPT, 8, deadline_s=time.monotonic() + 60))
            client.submit(make_request(f"late {index}", PROMPT, 3000, deadline_s=time.monotonic() + 0.2))
            assert mailbox.answer(f"in time {index}").error is None
            begun_s = time.monotonic()
            assert isinstance(mailbox.answer(f"late {index}").error, DeadlineExceeded)
            assert time.monotonic() - begun_s < 30
        assert all(mailbox.answer(name).error is None for name in running)
        assert client.num_restarts == 0 and client.pid == pid
    finally:
        client.stop()
