"""Traces, from a client's header to a collector: whose child a request is, what its spans say, when there are none."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
import urllib.request
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from ..engine.tiny import save_checkpoint
from ..otlp_receiver import Receiver, Span, otlp_receiver
from ..running_server import SERVER_ENVIRONMENT, RunningServer
from .wire import wait_until

if TYPE_CHECKING:
    from .conftest import Connect

PARENT = "00f067aa0ba902b7"
PHASES = ["validate", "queue", "prefill", "decode"]
SECRET = "Zanzibar"


def new_trace() -> tuple[str, str]:
    """A fresh trace id, and the traceparent of a caller that samples it."""
    trace_id = uuid.uuid4().hex
    return trace_id, f"00-{trace_id}-{PARENT}-01"


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[Receiver, str, str]]:
    with otlp_receiver() as found:
        yield found


@pytest.fixture(scope="module")
def traced(receiver: tuple[Receiver, str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that traces everything, over gRPC, with a gateway."""
    options = {
        "MODEL_ID": str(save_checkpoint(tmp_path_factory.mktemp("traced_model"), max_position_embeddings=1024)),
        "OTLP_ENDPOINT": receiver[1],
        "OTLP_SERVICE_NAME": "tales",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "JSON_OUTPUT": "true",
        "TEXTGEN_LOG_PROMPTS": "true",
    }
    running = RunningServer(tmp_path_factory.mktemp("traced"), SERVER_ENVIRONMENT | options, ("--gateway-port", "0"))
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


def root_of(receiver: Receiver, trace_id: str) -> tuple[Span, list[Span]]:
    """The request's own span and those below it, in order. All of them come in one batch or the root comes last."""
    root = receiver.wait_for_root(lambda span: span.trace_id == trace_id)
    children = [span for span in receiver.of_trace(trace_id) if span.parent_id == root.span_id]
    return root, children


def check_times(root: Span, children: list[Span]) -> None:
    """Each phase begins where the one before it ended, and all lie within the request."""
    assert root.start == children[0].start
    for earlier, later in itertools.pairwise(children):
        assert earlier.start <= earlier.end == later.start
    assert children[-1].end <= root.end
    assert abs(root.end / 1e9 - time.time()) < 600  # the time of day, not that of some other clock


def test_a_request_through_http_is_part_of_its_clients_trace(
    traced: RunningServer, receiver: tuple[Receiver, str, str]
) -> None:
    trace_id, parent = new_trace()
    parameters = {"max_new_tokens": 4, "temperature": 0.5, "top_k": 10, "seed": 7, "do_sample": True}
    request = urllib.request.Request(
        f"{traced.gateway_url}/generate",
        json.dumps({"inputs": f"Tell me of {SECRET}", "parameters": parameters}).encode(),
        {"Content-Type": "application/json", "traceparent": parent, "tracestate": "vendor=1", "x-request-id": "tale-1"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text = json.load(response)["generated_text"]
    root, children = root_of(receiver[0], trace_id)
    assert (root.parent_id, root.state, root.service) == (PARENT, "vendor=1", "tales")
    assert root.name == "text_completion textgen"
    assert [span.name for span in children] == PHASES
    check_times(root, children)
    told = root.attributes
    assert told["gen_ai.operation.name"] == "text_completion"
    assert told["gen_ai.provider.name"] == "triton-textgen"
    assert (told["gen_ai.request.model"], told["textgen.model.version"]) == ("textgen", "1")
    assert told["gen_ai.response.model"].endswith("traced_model0")
    assert told["gen_ai.response.id"] == "tale-1"
    assert told["gen_ai.request.max_tokens"] == 4
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.top_k"], told["gen_ai.request.seed"]) == (
        0.5,
        10,
        7,
    )
    assert told["gen_ai.request.stream"] is False
    assert told["gen_ai.usage.input_tokens"] > 0
    assert 1 <= told["gen_ai.usage.output_tokens"] <= 4
    assert told["gen_ai.usage.cache_read.input_tokens"] == 0
    assert told["gen_ai.response.finish_reasons"][0] in ("length", "eos_token")
    assert 0 < told["gen_ai.response.time_to_first_chunk"] <= (root.end - root.start) / 1e9
    assert root.status_code == 0
    assert all(not span.events for span in [root, *children])

    # The log's line of the request leads to the trace; it holds prompt and text, for this server may log them.
    def logged() -> list[dict[str, Any]]:
        lines = traced.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and '"request_id": "tale-1"' in line]

    wait_until(lambda: any("output_tokens" in line for line in logged()), "logged")
    (line,) = [line for line in logged() if "output_tokens" in line]
    assert (line["trace_id"], line["prompt"], line["text"]) == (trace_id, f"Tell me of {SECRET}", [text])


def test_a_parameter_serves_as_well(
    traced: RunningServer, receiver: tuple[Receiver, str, str], connect: Connect
) -> None:
    wire = connect(traced)
    for ask in ({"parameters": "request"}, {"parameters": "json"}, {"model": "ensemble"}):
        trace_id, parent = new_trace()
        request: dict[str, Any] = {"text_input": "Hi", "sampling_parameters": {"max_new_tokens": 1}}
        if ask.get("parameters") == "json":
            request["sampling_parameters"]["traceparent"] = parent
        else:
            request["parameters"] = {"traceparent": parent}
        assert wire.ask(model=ask.get("model", "textgen"), **request).errors == []
        root, children = root_of(receiver[0], trace_id)
        assert root.parent_id == PARENT
        assert [span.name for span in children] == PHASES


def test_a_context_that_makes_no_sense_is_none(
    traced: RunningServer, receiver: tuple[Receiver, str, str], connect: Connect
) -> None:
    outcome = connect(traced).ask(
        text_input="Hi",
        request_id="nonsense",
        parameters={"traceparent": "00-nonsense"},
        sampling_parameters={"max_new_tokens": 1, "tracestate": ["no", "text"]},
    )
    assert outcome.errors == []
    root = receiver[0].wait_for_root(lambda span: span.attributes["gen_ai.response.id"] == "nonsense")
    assert root.parent_id == ""


def test_grammar_and_an_event_for_every_token(
    traced: RunningServer, receiver: tuple[Receiver, str, str], connect: Connect
) -> None:
    trace_id, parent = new_trace()
    sampling = {
        "max_new_tokens": 6,
        "trace_tokens": True,
        "grammar": {"type": "json", "value": {"type": "array", "items": {"type": "integer"}}},
    }
    outcome = connect(traced).ask(
        text_input="Numbers:", parameters={"traceparent": parent}, sampling_parameters=sampling, stream=True
    )
    assert outcome.errors == []
    root, children = root_of(receiver[0], trace_id)
    assert [span.name for span in children] == ["validate", "grammar", "queue", "prefill", "decode"]
    check_times(root, children)
    assert root.attributes["gen_ai.output.type"] == "json"
    assert root.attributes["gen_ai.request.stream"] is True
    decode = children[-1]
    assert sum(told["textgen.tokens"] for _, _, told in decode.events) == root.attributes["gen_ai.usage.output_tokens"]
    times = [time_ns for time_ns, name, _ in decode.events if name == "token"]
    assert times == sorted(times) and decode.start <= times[0] and times[-1] <= decode.end


def test_a_refused_request_says_so_and_nothing_of_its_text(
    traced: RunningServer, receiver: tuple[Receiver, str, str], connect: Connect
) -> None:
    trace_id, parent = new_trace()
    text = connect(traced).error_of(
        text_input=SECRET, parameters={"traceparent": parent}, sampling_parameters={"temperature": SECRET}
    )
    assert SECRET in text
    root, children = root_of(receiver[0], trace_id)
    assert [span.name for span in children] == ["validate"]
    for span in (root, children[0]):
        assert (span.status_code, span.status_text) == (2, "validation")
        assert span.attributes["error.type"] == "validation"
    check_times(root, children)
    assert not any(SECRET.encode() in batch for batch in receiver[0].raw)


def test_a_cancelled_request_is_closed(
    traced: RunningServer, receiver: tuple[Receiver, str, str], connect: Connect
) -> None:
    trace_id, parent = new_trace()
    endless = {"max_new_tokens": 900, "ignore_eos_token": True}
    call = connect(traced).open(
        text_input="Tale", parameters={"traceparent": parent}, sampling_parameters=endless, stream=True
    )
    next(call)
    call.cancel()
    root, children = root_of(receiver[0], trace_id)
    assert root.attributes["error.type"] == "cancelled"
    assert root.status_code == 2
    assert [span.name for span in children] == PHASES
    assert [span.status_code for span in children] == [0, 0, 0, 2]
    check_times(root, children)
    assert root.attributes["gen_ai.usage.output_tokens"] >= 1


def test_who_does_not_sample_gets_no_trace(
    traced: RunningServer, receiver: tuple[Receiver, str, str], connect: Connect
) -> None:
    wire = connect(traced)
    unwanted = uuid.uuid4().hex
    sampling = {"max_new_tokens": 1}
    context = {"traceparent": f"00-{unwanted}-{PARENT}-00"}
    assert wire.ask(text_input="Hi", parameters=context, sampling_parameters=sampling).errors == []
    wanted, parent = new_trace()
    assert wire.ask(text_input="Hi", parameters={"traceparent": parent}, sampling_parameters=sampling).errors == []
    root_of(receiver[0], wanted)  # it came after the unwanted one would have
    assert receiver[0].of_trace(unwanted) == []


def test_a_request_that_dies_with_the_engine_is_closed(
    traced: RunningServer, receiver: tuple[Receiver, str, str], connect: Connect
) -> None:
    trace_id, parent = new_trace()
    endless = {"max_new_tokens": 1000, "ignore_eos_token": True}
    call = connect(traced).open(
        text_input="Tale", parameters={"traceparent": parent}, sampling_parameters=endless, stream=True
    )
    next(call)
    os.kill(traced.pid("engine"), signal.SIGKILL)
    root, children = root_of(receiver[0], trace_id)
    assert (root.status_code, root.status_text) == (2, "the engine was killed")
    assert [span.name for span in children] == PHASES
    assert children[-1].status_code == 2
    check_times(root, children)
    wait_until(lambda: traced.metric("tgi_engine_ready") == 1, "the engine is back")
