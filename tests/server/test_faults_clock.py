"""The clock of the day jumps under eight live streams, for every process of a real server: nobody notices."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .faults import (
    LASTING,
    OPTIONS,
    FaultRecord,
    ask_briefly,
    assert_one_final_flag_each,
    endings_of,
    live_streams,
)

if TYPE_CHECKING:
    from ..running_server import StartServer
    from .conftest import Connect

COMPILER = shutil.which("cc")
YEAR_S = 365 * 86400


@pytest.mark.faults
@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
def test_jumps_of_the_clock(
    start_server: StartServer, connect: Connect, lasting_model: Path, tmp_path: Path, fault_record: FaultRecord
) -> None:
    library = tmp_path / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run([str(COMPILER), "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    jumped = tmp_path / "jumped"
    jumped.write_bytes(struct.pack("q", 0))
    clock = {"LD_PRELOAD": str(library), "JUMPING_CLOCK": str(jumped)}
    server = start_server(**OPTIONS, **clock, MODEL_ID=str(lasting_model))
    wire = connect(server)
    before = server.pids
    streams = live_streams(wire, max_new_tokens=8000)
    with jumped.open("r+b") as file, mmap.mmap(file.fileno(), 8) as page:
        for seconds in (YEAR_S, -YEAR_S, 3600, 0):
            page[:] = struct.pack("q", seconds)
            seen = subprocess.run(["date", "+%s"], env=clock, capture_output=True, text=True, check=True).stdout
            assert abs(float(seen) - time.time() - seconds) < 60, "the clock did not jump"
            # In time: neither at once, nor a year later. A text asks the tokenizer, another process of Triton's.
            assert ask_briefly(wire).errors == []
            assert wire.ask(text_input="Hi", sampling_parameters={"max_new_tokens": 1, "timeout": 60}).errors == []
            begun_s = time.monotonic()
            late = wire.ask(input_ids=[5, 6, 7], sampling_parameters=LASTING | {"max_new_tokens": 20_000, "timeout": 1})
            assert 0.9 < time.monotonic() - begun_s < 30
            assert late.errors and "timeout" in late.errors[0].lower()
            assert server.metric("tgi_engine_ready") == 1
            while time.monotonic() < begun_s + 3:  # by then the launcher and Triton have looked after those below them
                assert ask_briefly(wire).errors == []
    outcomes = streams.outcomes(120)
    assert endings_of(outcomes) == {"complete"}
    assert_one_final_flag_each(outcomes)
    assert ask_briefly(wire).errors == []
    assert server.pids == before, "somebody was taken for dead"
    assert server.metric("tgi_engine_restarts") == 0
    fault_record.note(
        "time jump",
        clients_see="nothing, a year ahead, a year back, an hour ahead; deadlines hold",
        told_after_s=None,
        recovered_after_s=None,
    )
