"""Every bad input is answered, with its own error: what was wrong, the value given, the limit. Nobody else notices."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import pytest

from .wire import Tensor, strings

if TYPE_CHECKING:
    from ..running_server import RunningServer
    from .conftest import Connect
    from .wire import Wire

VALIDATION = "Input validation error: "
HELLO = {"text_input": "Hello"}
USER = {"role": "user", "content": "Hi"}


def _given(**sampling: Any) -> dict[str, Any]:
    return {**HELLO, "sampling_parameters": sampling}


def _int32(*values: int) -> Tensor:
    return Tensor("INT32", [len(values)], struct.pack(f"<{len(values)}i", *values))


# What is sent -> how the error begins, and what else it says.
BAD_REQUESTS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    # The prompt.
    "no prompt": ({}, VALIDATION + "exactly one of text_input, messages and input_ids", ("none",)),
    "two prompts": ({**HELLO, "input_ids": [1]}, VALIDATION + "exactly one", ("text_input and input_ids",)),
    "three prompts": ({**HELLO, "input_ids": [1], "messages": [USER]}, VALIDATION + "exactly one", ()),
    "empty text": ({"text_input": ""}, VALIDATION, ("text_input", "empty")),
    "empty ids": ({"input_ids": []}, VALIDATION, ("input_ids",)),
    "empty messages": ({"messages": []}, VALIDATION + "`messages`", ()),
    "too long text": ({"text_input": "word " * 1000}, VALIDATION, ("1001", "960")),
    "hopelessly long text": ({"text_input": "word " * 100_000}, VALIDATION, ("500000", "960")),
    "too many ids": ({"input_ids": [5] * 961}, VALIDATION, ("961", "960")),
    "too many new tokens": (
        _given(max_new_tokens=1024),
        VALIDATION,
        ("1024", "MAX_TOTAL_TOKENS", "the prompt has 1 tokens"),
    ),
    "broken UTF-8": ({"text_input": strings(b"caf\xe9")}, VALIDATION + "`text_input`", ("UTF-8", "byte 3")),
    "broken UTF-8 in messages": ({"messages": strings(b'[{"role": "\xff"}]')}, VALIDATION + "`messages`", ("UTF-8",)),
    "id above the vocabulary": ({"input_ids": [1, 2, 49152]}, VALIDATION, ("49152", "position 2", "49151")),
    "id below zero": ({"input_ids": [1, -1]}, VALIDATION, ("-1", "position 1")),
    "messages that are no JSON": ({"messages": strings("[{")}, VALIDATION + "`messages`", ()),
    "messages that are no list": ({"messages": strings("3")}, VALIDATION + "`messages`", ("3",)),
    "message without a role": ({"messages": [{"content": "x"}]}, VALIDATION + "`messages[0].role`", ()),
    "message without content": ({"messages": [{"role": "user"}]}, VALIDATION + "`messages[0]`", ()),
    "content that is a number": ({"messages": [{"role": "user", "content": 3}]}, VALIDATION, ("messages[0].content",)),
    "half a surrogate pair": ({"messages": strings('[{"role": "user", "content": "\\ud83c"}]')}, VALIDATION, ()),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, VALIDATION, ("image",)),
    # sampling_parameters as a whole.
    "broken JSON": ({**HELLO, "sampling_parameters": strings('{"top_k": ')}, VALIDATION + "`sampling_parameters`", ()),
    "JSON list": ({**HELLO, "sampling_parameters": strings("[]")}, VALIDATION + "`sampling_parameters`", ("[]",)),
    "JSON of depth 100,000": ({**HELLO, "sampling_parameters": strings("[" * 100_000)}, VALIDATION, ("JSON",)),
    "depth in a value": (
        {**HELLO, "sampling_parameters": strings('{"grammar": ' + '{"a":' * 50_000 + "1" + "}" * 50_001)},
        VALIDATION,
        (),
    ),
    "5,000 digits": ({**HELLO, "sampling_parameters": strings('{"seed": ' + "9" * 5000 + "}")}, VALIDATION, ()),
    "NaN": ({**HELLO, "sampling_parameters": strings('{"temperature": NaN}')}, VALIDATION, ("temperature",)),
    "broken UTF-8 in parameters": ({**HELLO, "sampling_parameters": strings(b'{"\xff": 1}')}, VALIDATION, ("UTF-8",)),
    # Single parameters.
    "unknown": (_given(max_new_token=5), VALIDATION + "unknown parameter `max_new_token`", ("max_new_tokens",)),
    "unknown scalar": ({**HELLO, "parameters": {"tempature": 1}}, VALIDATION + "unknown parameter `tempature`", ()),
    "number in a string": (_given(max_new_tokens="5"), VALIDATION + "`max_new_tokens`", ("'5'",)),
    "boolean for a number": (_given(temperature=True), VALIDATION + "`temperature`", ("True",)),
    "number for a boolean": (_given(do_sample=1), VALIDATION + "`do_sample`", ()),
    "float for an integer": (_given(top_k=1.5), VALIDATION + "`top_k`", ("1.5",)),
    "below the range": (_given(temperature=0), VALIDATION + "`temperature`", ("above 0", "given: 0")),
    "above the range": (_given(top_p=1.5), VALIDATION + "`top_p`", ("at most 1", "given: 1.5")),
    "negative seed": (_given(seed=-1), VALIDATION + "`seed`", ("-1",)),
    "no new tokens": (_given(max_new_tokens=0), VALIDATION + "`max_new_tokens`", ("given: 0",)),
    "too many choices": (_given(n=3, do_sample=True), VALIDATION + "`n`", ("2 (max_best_of)", "given: 3")),
    "too many stops": (_given(stop=["a", "b", "c", "d", "e"]), VALIDATION + "`stop`", ("4", "given: 5")),
    "empty stop": ({**HELLO, "stop": [""]}, VALIDATION + "`stop`", ()),
    "broken UTF-8 in stop": ({**HELLO, "stop": strings(b"\xc3")}, VALIDATION + "`stop`", ("UTF-8",)),
    "bias outside the vocabulary": (_given(logit_bias={"49152": 1}), VALIDATION + "`logit_bias`", ("49152",)),
    "two values": ({**_given(top_k=5), "parameters": {"top_k": 6}}, VALIDATION + "`top_k` is given twice", ("5", "6")),
    "two names": (_given(max_tokens=5, max_new_tokens=6), VALIDATION + "`max_tokens` and `max_new_tokens`", ()),
    "details of the prompt on a stream": (
        {**_given(decoder_input_details=True), "stream": True},
        VALIDATION + "`decoder_input_details`",
        ("stream",),
    ),
    "adapter": (_given(adapter_id="x"), VALIDATION + "`adapter_id`", ("'x'", "none is loaded")),
    "adapter loaded by a request": (
        {"sampling_parameters": {"adapter_command": {"action": "load", "name": "x"}}},
        VALIDATION,
        ("TEXTGEN_ADAPTER_FOLDER",),
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(wire: Wire, name: str) -> None:
    request, beginning, also = BAD_REQUESTS[name]
    error = wire.error_of(**request)
    assert error.startswith(beginning)
    for part in also:
        assert part in error
    assert "Traceback" not in error
    assert "\n" not in error


@pytest.mark.parametrize("name", ["no prompt", "broken UTF-8", "unknown", "id above the vocabulary", "too many ids"])
def test_bad_request_through_the_ensemble(wire: Wire, name: str) -> None:
    error = wire.error_of(model="ensemble", **BAD_REQUESTS[name][0])
    assert error.startswith("in ensemble 'ensemble', " + VALIDATION)
    assert "Traceback" not in error


def test_messages_the_template_cannot_render(wire: Wire) -> None:
    error = wire.error_of(messages=[{"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}])
    assert error.startswith("Template error: ")


def test_roles_the_template_refuses(narrow_server: RunningServer, connect: Connect) -> None:
    wire = connect(narrow_server)
    refused = {"messages": [{"role": "wizard", "content": "Abracadabra"}]}
    assert wire.error_of(**refused) == "Template error: only user and assistant may speak, not wizard"
    in_ensemble = wire.error_of(model="ensemble", **refused)
    assert in_ensemble == "in ensemble 'ensemble', Template error: only user and assistant may speak, not wizard"
    accepted = wire.ask(messages=[USER], sampling_parameters={"max_new_tokens": 1})
    assert accepted.errors == []


def test_what_triton_itself_refuses(wire: Wire) -> None:
    for request in (
        {"input_ids": Tensor("FP32", [1], struct.pack("<f", 1.0))},
        {"input_ids": Tensor("INT32", [1, 1], struct.pack("<i", 1))},
        {"text_input": Tensor("INT32", [1], struct.pack("<i", 1))},
        {**HELLO, "colour": True},
        {**HELLO, "stream": Tensor("BOOL", [2], b"\1\1")},
        {"text_input": strings("a", "b")},
        {"text_input": strings()},
        {**HELLO, "model": "no_such_model"},
    ):
        outcome = wire.ask(**request)
        assert outcome.errors or outcome.broken, request
        assert all(not response.tensors for response in outcome.responses)


@pytest.mark.parametrize(
    "text", ["NUL \0 inside", "\0", "\ufeff", "a\u202eb", "\U0010ffff"], ids=["nul", "only nul", "bom", "rtl", "last"]
)
def test_odd_but_valid_text_is_a_prompt_like_any_other(wire: Wire, text: str) -> None:
    sampling = {"max_new_tokens": 2, "return_full_text": True}
    outcome = wire.ask(text_input=text, sampling_parameters=sampling)
    assert outcome.errors == []
    assert outcome.text.startswith(text)
    status, answer = wire.post({"text_input": text, "max_new_tokens": 2, "return_full_text": True})
    assert (status, answer["text_output"]) == (200, outcome.text)


# ---- HTTP -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, VALIDATION + "exactly one of"),
        ({**HELLO, "tempature": 1}, VALIDATION + "unknown parameter `tempature`"),
        ({**HELLO, "max_new_tokens": "5"}, VALIDATION + "`max_new_tokens`"),
        ({**HELLO, "top_p": 1.5}, VALIDATION + "`top_p`"),
        ({"messages": '[{"content": "x"}]'}, VALIDATION + "`messages[0].role`"),
        ({"input_ids": [1, 49152]}, VALIDATION),
    ],
)
def test_bad_request_over_http(wire: Wire, body: dict[str, Any], says: str, route: str) -> None:
    if route == "generate":
        status, answer = wire.post(body)
        errors = [answer["error"]]
    else:
        events = wire.open_events({**body, "stream": True})
        status, errors = events.status, [event["error"] for event in events]
    assert status == 400
    assert len(errors) == 1
    assert errors[0].startswith(says)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"[]",
        b'{"text_input": "\xff"}',
        b'{"text_input": "x", "stop": [1]}',
        b'{"input_ids": [1.5]}',
        b'{"text_input": ["a", "b"]}',
        b'{"text_input": {"a": 1}}',
        b'{"text_input": "x", "logit_bias": {"1": 2}}',
        b"[" * 2000,
    ],
)
def test_bodies_that_make_no_request(wire: Wire, body: bytes) -> None:
    status, answer = wire.post(body)
    assert status >= 400
    assert answer["error"]


# ---- neighbours ----------------------------------------------------------------------------------------------------


def test_neighbours_do_not_notice_errors(wire: Wire, server: RunningServer) -> None:
    request = {"text_input": "The planets of the solar system are", "stream": True}
    request["sampling_parameters"] = {"max_new_tokens": 24, "temperature": 0.8, "seed": 3}
    alone = wire.ask(**request)
    assert alone.errors == []
    stop = threading.Event()
    errors: list[str] = []

    def disturb() -> None:
        bad = [request for name, (request, _, _) in BAD_REQUESTS.items() if "depth" not in name and "long" not in name]
        while not stop.is_set():
            for request in bad:
                errors.extend(wire.ask(**request).errors)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    neighbours = [waiting.result() for waiting in [wire.ask_soon(**request) for _ in range(4)]]
    stop.set()
    disturber.join()
    assert [neighbour.text for neighbour in neighbours] == [alone.text] * 4
    assert all(neighbour.errors == [] for neighbour in neighbours)
    assert len(errors) >= len(BAD_REQUESTS) // 2
