"""One log line per request: its id, what went in and came out, how long each stage took, how it ended.

Never a prompt and never a text, unless TEXTGEN_LOG_PROMPTS asks for both. Knows `LiveRequest`, nothing of Triton.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from textgen_engine.errors import EngineError

if TYPE_CHECKING:
    from triton_responder import LiveRequest

# A name of its own, so that these lines can be kept or dropped by themselves.
logger = logging.getLogger("textgen.requests")


def note_answered(live: LiveRequest) -> None:
    """Log a request that was answered in full."""
    if not logger.isEnabledFor(logging.INFO):
        return
    facts: dict[str, Any] = {
        "request_id": live.client_id or live.key,
        "input_tokens": live.num_input_tokens,
        "output_tokens": sum(live.num_tokens.values()),
        "finish_reason": ",".join(live.reasons[choice] for choice in sorted(live.reasons)),
        "stream": live.options.stream,
        "validation_s": round(live.validation_s, 6),
    }
    if live.adapter_id is not None:
        facts["adapter"] = live.adapter_id
    times = live.timings
    if times is not None and times.scheduled_s is not None and times.finished_s is not None:
        facts["queue_s"] = round(times.scheduled_s - times.arrival_s - live.validation_s, 6)
        if times.first_token_s is not None:
            facts["first_token_s"] = round(times.first_token_s - times.arrival_s, 6)
        facts["inference_s"] = round(times.finished_s - times.scheduled_s, 6)
        facts["total_s"] = round(times.finished_s - times.arrival_s, 6)
    facts.update(_asked_for(live))
    logger.info("request", extra={"facts": facts})


def note_failed(live: LiveRequest, error: EngineError) -> None:
    """Log a request that ended with an error: `generation` errors as errors, the others as the clients' doing."""
    level = logging.ERROR if error.public_type == "generation" else logging.INFO
    if not logger.isEnabledFor(level):
        return
    facts: dict[str, Any] = {
        "request_id": live.client_id or live.key,
        "error_type": error.public_type,
        "output_tokens": sum(live.num_tokens.values()),
        "total_s": round(time.monotonic() - live.arrival_s, 6),
    }
    if live.adapter_id is not None:
        facts["adapter"] = live.adapter_id
    facts.update(_asked_for(live))
    logger.log(level, "request failed", extra={"facts": facts})


def _asked_for(live: LiveRequest) -> dict[str, Any]:
    """The trace that tells more of the request, where there is one; prompt and texts, where the log may hold them."""
    facts: dict[str, Any] = {}
    if live.trace is not None:
        facts["trace_id"] = live.trace.trace_id
    if live.logged_prompt is not None:
        facts["prompt"] = live.logged_prompt
    if live.logged_texts:
        facts["text"] = [live.logged_texts[choice] for choice in sorted(live.logged_texts)]
    return facts
