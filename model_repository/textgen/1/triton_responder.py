"""Outputs of the engine to responses of Triton: who is live, what is gathered, who sends, who polls for cancellation.

Owns the live requests of the stub and two threads:

- the sender gathers tokens per request and sends. A request's first token goes out at once. While few streams run,
  every step's token does; with more, tokens wait for a few others or for a few milliseconds, whichever is first, so
  that the cost of sending never sets the token rate.
- the poller asks Triton, in turn, whether clients have gone.

Every request gets exactly one final flag: `_finish` is the only place that ends one, and ends it once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import triton_responses

from textgen_engine.config import TransportConfig
from textgen_engine.errors import EngineError, EngineFailure
from textgen_engine.messages import StepReport
from textgen_engine.request import Timings, TokenOutput

if TYPE_CHECKING:
    from triton_tracing import RequestTrace

logger = logging.getLogger(__name__)

# Asking Triton whether one request was cancelled costs about 35 microseconds. A request can only end between two steps,
# so it is asked for at most once a step, and the poller rests so much longer than it works that it takes no more than
# this share of a core, but never longer than this, nor while no step ends (a long one, a queue that waits).
_POLL_INTERVAL_S = 0.01
_LONGEST_POLL_INTERVAL_S = 0.1
_POLL_SHARE = 0.03


@dataclass(eq=False)
class LiveRequest:
    """One admitted request in the stub, from its arrival to its final flag.

    key: unique in the server's life, the engine's name for it. client_id: the id the client gave, maybe empty. trace:
    the tracer's, None where the request is not traced or its trace has ended. logged_prompt, logged_texts: for the log,
    where it may hold them (TEXTGEN_LOG_PROMPTS), else None.
    """

    key: str
    client_id: str
    sender: Any
    arrival_s: float
    options: triton_responses.ResponseOptions = field(default_factory=triton_responses.ResponseOptions)
    prompt_prefix: str = ""
    adapter_id: str | None = None
    validation_s: float = 0.0
    submitted: bool = False
    cancelled: bool = False
    trace: RequestTrace | None = None
    logged_prompt: str | None = None
    logged_texts: dict[int, str] | None = None
    # Held to ask the sender about cancellation and to send the final flag: Triton frees what is asked once that flag
    # is sent, and a question that comes later ends the whole server with SIGSEGV.
    sender_lock: threading.Lock = field(default_factory=threading.Lock)
    # Owned by the sender from here on.
    gathered: dict[int, TokenOutput] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    num_gathered_tokens: int = 0
    num_responses: int = 0
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    timings: Timings | None = None
    last_sent_s: float = 0.0
    error: EngineError | None = None
    is_complete: bool = False


class Responder:
    """Thread safe. `on_cancelled` is called, with the request, from the poller's thread when a client is gone."""

    def __init__(self, config: TransportConfig, on_cancelled: Callable[[LiveRequest], None]) -> None:
        self._config = config
        self._on_cancelled = on_cancelled
        self._changed = threading.Condition()
        self._live: dict[str, LiveRequest] = {}
        self._news: set[LiveRequest] = set()  # requests with something to send
        self._has_reported = False
        self._stopping = False
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_loop, name="sender", daemon=True),
            threading.Thread(target=self._poll_loop, name="cancellation-poller", daemon=True),
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def wait_until_idle(self, timeout_s: float) -> None:
        """Return when every live request has its final flag, or after timeout_s."""
        with self._changed:
            self._changed.wait_for(lambda: not self._live, timeout_s)

    def stop(self) -> None:
        """Send what is due, then end the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._stopped.set()
        for thread in self._threads:
            thread.join(5.0)

    @property
    def num_live(self) -> int:
        return len(self._live)

    def add(self, live: LiveRequest) -> None:
        """A new request; from now on it gets exactly one final flag."""
        with self._changed:
            self._live[live.key] = live
            self._changed.notify_all()

    def note_submitted(self, live: LiveRequest) -> None:
        """The engine has the request: from now on the engine ends it, and its stream is kept alive."""
        with self._changed:
            live.submitted = True
            self._changed.notify_all()

    def by_client_id(self, client_id: str) -> list[LiveRequest]:
        """Requests with this id of the client's that are not yet answered in full (the answer may still be unsent)."""
        with self._changed:
            return [live for live in self._live.values() if live.client_id == client_id and not live.is_complete]

    def fail(self, live: LiveRequest, error: EngineError) -> bool:
        """Answer a request with an error; False, and nothing done, when it is already answered in full."""
        with self._changed:
            if live.key not in self._live or live.is_complete:
                return False
            live.error = error
            live.is_complete = True
            self._news.add(live)
            self._changed.notify_all()
            return True

    def reply(self, live: LiveRequest, response: Any) -> None:
        """Answer a request that never went to the engine with one response."""
        self._finish(live, response)

    def deliver(self, report: StepReport) -> list[LiveRequest]:
        """Take in one step's outputs; returns the requests that are now answered in full, or by an error."""
        completed = []
        with self._changed:
            self._has_reported = True
            for output in report.outputs:
                live = self._live.get(output.request_id)
                if live is None or live.is_complete:
                    continue
                if output.error is not None:
                    live.error = output.error
                    live.timings = output.timings or live.timings
                elif output.choice in live.gathered:
                    live.gathered[output.choice].merge(output)
                else:
                    live.gathered[output.choice] = output
                if live.logged_texts is not None:
                    live.logged_texts[output.choice] = live.logged_texts.get(output.choice, "") + output.text
                live.num_tokens[output.choice] = live.num_tokens.get(output.choice, 0) + len(output.token_ids)
                live.num_gathered_tokens += len(output.token_ids)
                if output.finish_reason is not None:
                    live.reasons[output.choice] = output.finish_reason.value
                    live.timings = output.timings
                    live.num_input_tokens = output.num_prompt_tokens
                    live.num_cached_tokens = output.num_cached_tokens
                live.is_complete = output.is_last
                if live.is_complete:
                    completed.append(live)
                if live.options.stream or live.is_complete:
                    self._news.add(live)
            self._changed.notify_all()
        return completed

    # ---- the sender's thread -----------------------------------------------------------------------------------

    def _send_loop(self) -> None:
        while True:
            with self._changed:
                due, wait_s = self._due_requests(time.monotonic())
                while not due:
                    if self._stopping:
                        return
                    self._changed.wait(wait_s)
                    due, wait_s = self._due_requests(time.monotonic())
                parcels = [(live, *self._take(live)) for live in due]
            for live, outputs, is_complete in parcels:
                self._respond(live, outputs, is_complete)

    def _due_requests(self, now_s: float) -> tuple[list[LiveRequest], float | None]:
        """Requests to be sent now, and the seconds until the next one is due (None: nothing waits)."""
        config = self._config
        gathers = len(self._live) > config.gather_streams
        due: list[LiveRequest] = []
        wait_s: float | None = None
        for live in self._news:
            if (
                not gathers
                or live.is_complete
                or live.num_responses == 0
                or live.num_gathered_tokens >= config.gather_tokens
                or now_s - live.last_sent_s >= config.gather_s
            ):
                due.append(live)
            else:
                left_s = config.gather_s - (now_s - live.last_sent_s)
                wait_s = left_s if wait_s is None else min(wait_s, left_s)
        if config.keep_alive_s > 0:
            for live in self._live.values():
                if live.options.stream and live.submitted and live not in self._news:
                    left_s = config.keep_alive_s - (now_s - max(live.last_sent_s, live.arrival_s))
                    if left_s <= 0:
                        due.append(live)
                    else:
                        wait_s = left_s if wait_s is None else min(wait_s, left_s)
        return due, wait_s

    def _take(self, live: LiveRequest) -> tuple[dict[int, TokenOutput], bool]:
        outputs, live.gathered = live.gathered, {}
        live.num_gathered_tokens = 0
        live.last_sent_s = time.monotonic()
        self._news.discard(live)
        return outputs, live.is_complete

    def _respond(self, live: LiveRequest, outputs: dict[int, TokenOutput], is_complete: bool) -> None:
        try:
            if live.error is not None:
                self._finish(live, triton_responses.error_response(live.error))
                return
            if not outputs and not is_complete:
                triton_responses.send(live.sender, triton_responses.keep_alive_response(), final=False)
                return
            response = self._build(live, outputs)
            live.num_responses += 1
            if is_complete:
                self._finish(live, response)
            else:
                triton_responses.send(live.sender, response, final=False)
        except Exception:  # one request's response must not end the thread that serves all
            logger.exception("a response could not be built or sent")
            self._finish(live, triton_responses.error_response(EngineFailure("a response could not be sent")))

    def _build(self, live: LiveRequest, outputs: dict[int, TokenOutput]) -> Any:
        news = [
            triton_responses.ChoiceNews(outputs.get(choice), live.num_tokens.get(choice, 0), live.reasons.get(choice))
            for choice in range(live.options.num_choices)
        ]
        return triton_responses.output_response(
            live.options,
            news,
            prompt_prefix=live.prompt_prefix if live.num_responses == 0 else "",
            others=[outputs[choice] for choice in sorted(outputs) if choice >= live.options.num_choices],
            validation_s=live.validation_s,
        )

    def _finish(self, live: LiveRequest, response: Any) -> None:
        """Send the last response with the final flag, once, and forget the request."""
        with self._changed:
            if self._live.pop(live.key, None) is None:
                return
            self._news.discard(live)
            self._changed.notify_all()
        with live.sender_lock:
            try:
                triton_responses.send(live.sender, response, final=True)
            except Exception:  # a request without its final flag would hang its client for ever
                logger.exception("the last response could not be sent; sending the final flag alone")
                triton_responses.send_final_flag(live.sender)

    # ---- the poller's thread -----------------------------------------------------------------------------------

    def _poll_loop(self) -> None:
        rest_s = _POLL_INTERVAL_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._live)
            if self._stopped.wait(rest_s):
                return
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._has_reported, _LONGEST_POLL_INTERVAL_S - rest_s)
                self._has_reported = False
                live_requests = [live for live in self._live.values() if not live.cancelled and not live.is_complete]
            begun_s = time.monotonic()
            for live in live_requests:
                try:
                    if self._is_client_gone(live):
                        live.cancelled = True
                        self._on_cancelled(live)
                except Exception:  # without this thread no cancellation would ever be seen again
                    logger.exception("a request could not be asked for, or could not be cancelled")
            rest_s = (time.monotonic() - begun_s) * (1 / _POLL_SHARE - 1)
            rest_s = min(max(rest_s, _POLL_INTERVAL_S), _LONGEST_POLL_INTERVAL_S)

    def _is_client_gone(self, live: LiveRequest) -> bool:
        with live.sender_lock:
            # `_finish` takes a request out of `_live` before it takes the lock.
            return live.key in self._live and bool(live.sender.is_cancelled())
