"""Takes the place of textgen_engine/engine.py in the repository that transport.py serves: tokens without a model.

Every step gives each live request one token, at once or at most every TRANSPORT_STEP_MS milliseconds. What is then left
to measure is the way of a token from the engine's process to the client.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from textgen_engine.config import EngineConfig
from textgen_engine.messages import EngineInfo, StepReport
from textgen_engine.metrics import EngineGauges, StepMetrics
from textgen_engine.request import FinishReason, GenerationRequest, Timings, TokenOutput

_DEFAULT_NEW_TOKENS = 64


class Engine:
    """The interface of the real one, as process.py uses it."""

    def __init__(self, config: EngineConfig, emit: Callable[[StepReport], None], ranks: object = None) -> None:
        self.info = EngineInfo(
            vocab_size=49152,
            max_input_tokens=8191,
            max_total_tokens=8192,
            num_blocks=1 << 20,
            block_size=config.cache.block_size,
            eos_token_ids=frozenset({2}),
        )
        self._emit = emit
        self._step_s = float(os.environ.get("TRANSPORT_STEP_MS", "0")) / 1000
        self._changed = threading.Condition()
        self._live: dict[str, GenerationRequest] = {}
        self._num_tokens: dict[str, int] = {}
        self._stopping = False

    def submit(self, request: GenerationRequest) -> None:
        """A new stream."""
        with self._changed:
            self._live[request.request_id] = request
            self._num_tokens[request.request_id] = 0
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """A stream whose client has gone."""
        with self._changed:
            self._live.pop(request_id, None)

    def stop(self) -> None:
        """Let `run` return."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def run(self) -> None:
        """Give tokens until `stop`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._live or self._stopping)
                if self._stopping:
                    return
                live = list(self._live.values())
            begin_s = time.monotonic()
            self._emit(self._step(live))
            rest_s = self._step_s - (time.monotonic() - begin_s)
            if rest_s > 0:
                time.sleep(rest_s)

    def _step(self, live: list[GenerationRequest]) -> StepReport:
        now_s = time.monotonic()
        outputs = []
        started = []
        for request in live:
            self._num_tokens[request.request_id] += 1
            count = self._num_tokens[request.request_id]
            if count == 1:
                started.append(request.request_id)
            output = TokenOutput(
                request.request_id, text=" token", token_ids=[7], num_prompt_tokens=len(request.prompt_token_ids)
            )
            if count >= (request.stopping.max_new_tokens or _DEFAULT_NEW_TOKENS):
                output.finish_reason, output.is_last = FinishReason.LENGTH, True
                output.timings = Timings(request.arrival_s, request.arrival_s, request.arrival_s, now_s, now_s)
                self.cancel(request.request_id)
            outputs.append(output)
        metrics = StepMetrics(
            num_generated_tokens=len(live), batch_size=len(live), gauges=EngineGauges(num_running=len(live))
        )
        return StepReport(started=started, outputs=outputs, metrics=metrics, time_s=now_s)
