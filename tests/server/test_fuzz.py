"""Random requests: whatever is sent, there is one answer in time, and the server lives.

`--faults` sends many more.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from textgen_client import Client, TextgenError

from .wire import Outcome, Tensor, strings, wait_until_idle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..running_server import RunningServer
    from .wire import Wire

ANSWER_WITHIN_S = 60.0
# What Triton itself says of a request that is none.
REFUSALS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INTERNAL}

_names = st.sampled_from(
    [
        "text_input",
        "messages",
        "input_ids",
        "prompt_text",
        "stream",
        "sampling_parameters",
        "stop",
        "cancel",
        "nonsense",
    ]
)
_texts = st.text(max_size=60)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_KNOWN = (
    "temperature top_k top_p seed stop n best_of grammar response_format tools details logit_bias bad_words truncate "
    "timeout priority top_n_tokens min_new_tokens watermark"
)
_parameter_names = st.sampled_from(_KNOWN.split()) | st.text(max_size=8)
_sampling = st.dictionaries(_parameter_names, _json, max_size=4).map(lambda given: given | {"max_new_tokens": 2})
_well_formed = {
    "text_input": _texts.map(strings),
    "messages": _json.map(lambda value: strings(json.dumps(value))),
    "input_ids": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20).map(
        lambda ids: Tensor("INT32", [len(ids)], struct.pack(f"<{len(ids)}i", *ids))
    ),
    "sampling_parameters": _sampling.map(lambda value: strings(json.dumps(value)))
    | st.binary(max_size=40).map(strings),
    "stop": st.lists(st.binary(max_size=8), max_size=6).map(lambda items: strings(*items)),
}
_raw = st.builds(
    Tensor,
    st.sampled_from(["BYTES", "INT32", "INT64", "FP32", "BOOL", "UINT8", "NONSENSE", ""]),
    st.lists(st.integers(-2, 4) | st.sampled_from([2**31, 2**62]), max_size=3),
    st.binary(max_size=64),
)
_tensors = st.dictionaries(_names, st.just(None), max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({name: _well_formed.get(name, _raw) | _raw for name in names})
)
_parameters = st.dictionaries(
    _parameter_names.filter(lambda name: name and not name.startswith("triton_")),
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | _texts,
    max_size=2,
)


@pytest.fixture(scope="module")
def examples(pytestconfig: pytest.Config) -> int:
    return 3000 if pytestconfig.getoption("--faults") else 60


@pytest.fixture(autouse=True)
def _same_processes_after(server: RunningServer) -> Iterator[None]:
    before = server.pids
    yield
    wait_until_idle(server)
    kept = {role: pids for role, pids in server.pids.items() if role in ("tritonserver", "engine", "textgen")}
    assert kept == {role: before[role] for role in kept}, "a process has died"
    assert server.metric("tgi_engine_restarts") == 0


def _check(outcome: Outcome, request: Any) -> None:
    """One end, and a text that says why where it is an error."""
    assert outcome.broken is None or outcome.broken in REFUSALS, (outcome, request)
    finals = [response.final for response in outcome.responses]
    assert finals.count(True) <= 1 and True not in finals[:-1], (outcome, request)
    assert len(outcome.errors) <= 1, (outcome, request)
    assert outcome.responses or outcome.broken is not None, (outcome, request)
    for error in outcome.errors:
        assert error.strip() and "Traceback" not in error, (outcome, request)


def _fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def test_tensors_and_parameters(wire: Wire, examples: int) -> None:
    @_fuzz(examples)
    @given(tensors=_tensors, parameters=_parameters, model=st.sampled_from(["textgen", "textgen", "ensemble"]))
    def run(tensors: dict[str, Tensor], parameters: dict[str, Any], model: str) -> None:
        request = {"model": model, "parameters": {"max_new_tokens": 2} | parameters, **tensors}
        _check(wire.ask(within_s=ANSWER_WITHIN_S, **request), request)

    run()


def test_huge_and_hollow_tensors(wire: Wire) -> None:
    for tensor in (
        strings("a" * 20_000_000),
        strings(*["a"] * 100_000),
        strings(b"\xff" * 5_000_000),
        Tensor("BYTES", [1], b"\xff\xff\xff\xff"),
        Tensor("BYTES", [2**40], b"\x00"),
        Tensor("BYTES", [1], b""),
    ):
        for name in ("text_input", "sampling_parameters", "stop"):
            request = {"text_input": strings("a"), name: tensor, "parameters": {"max_new_tokens": 2}}
            _check(wire.ask(within_s=ANSWER_WITHIN_S, **request), name)
    ids = Tensor("INT32", [1_000_000], bytes(4_000_000))
    outcome = wire.ask(within_s=ANSWER_WITHIN_S, input_ids=ids)
    assert outcome.errors


def test_sampling_parameters(wire: Wire, examples: int) -> None:
    @_fuzz(examples)
    @given(sampling=_sampling, stream=st.booleans())
    def run(sampling: dict[str, Any], stream: bool) -> None:
        request = {"text_input": "a", "stream": stream, "sampling_parameters": strings(json.dumps(sampling))}
        _check(wire.ask(within_s=ANSWER_WITHIN_S, **request), request)

    run()


_regexes = st.text(alphabet="ab01.*+?|()[]{}^$\\-,dwsb", max_size=24)
_schemas = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null", "nonsense", 7]),
        "properties": st.dictionaries(_texts, _json, max_size=3),
        "required": _json,
        "items": _json,
        "enum": _json,
        "const": _json,
        "pattern": _regexes,
        "minLength": _json,
        "maxItems": _json,
        "anyOf": st.lists(_json, max_size=3),
        "$ref": st.sampled_from(["#", "#/$defs/a", "http://example.com/x", ""]),
    },
)
_grammars = st.one_of(
    st.fixed_dictionaries({"type": st.just("regex"), "value": _regexes}),
    st.fixed_dictionaries({"type": st.just("json"), "value": _schemas | _json}),
    st.fixed_dictionaries({"type": st.just("json"), "value": _texts}),
    st.fixed_dictionaries({"type": _texts, "value": _json}),
    _json,
)


def test_grammars(server: RunningServer, examples: int) -> None:
    with Client(server.grpc_url, timeout=ANSWER_WITHIN_S) as client:

        @_fuzz(examples)
        @given(grammar=_grammars, text=st.none() | _texts)
        def run(grammar: Any, text: str | None) -> None:
            refusal = ""
            try:
                found = client.check_grammar(grammar, text)
            except TextgenError as error:
                refusal = str(error)
            if refusal:
                assert refusal.startswith("Input validation error: "), (grammar, refusal)
            else:
                assert found.supported or found.error, grammar

        run()
