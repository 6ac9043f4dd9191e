"""Bodies that are no JSON, or JSON of the wrong kind, at every route: one answer below 500 each, and the gateway lives.

What the OpenAPI document allows is tried out in test_openapi.py.
"""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROUTES = ["/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions", "/tokenize"]
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["inputs", "parameters", "messages", "prompt", "stream", "n", "stop", "role", "content", "model"]
            )
            | st.text(max_size=6),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
_bodies = (
    st.binary(max_size=60)
    | _json.map(lambda value: json.dumps(value).encode())
    | _json.map(lambda value: json.dumps(value).encode()[:-1])
)


@pytest.mark.parametrize("route", ROUTES)
def test_any_body(http: httpx.Client, pytestconfig: pytest.Config, route: str) -> None:
    @settings(
        max_examples=1000 if pytestconfig.getoption("--faults") else 20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(body=_bodies)
    def run(body: bytes) -> None:
        answer = http.post(route, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, (body, answer.text)
        assert answer.content or answer.status_code == 204, body

    run()
