"""Our OpenAPI document against our answers: whatever fits the document is answered as the document says, never by 500.

Random requests for a few seconds, most of them refused; lengths are bounded so that none generates for long.
"""

from __future__ import annotations

from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from .running_gateway import Gateway

_CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
_NUM_EXAMPLES = 12


def test_answers_are_as_the_document_says(gateway: Gateway) -> None:
    document: dict[str, Any] = httpx.get(gateway.url + "/api-doc/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=gateway.url)
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        seen.add(operation.label)

        @settings(
            max_examples=_NUM_EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            _bound(case.body)
            answer = case.call(timeout=20)
            case.validate_response(answer, checks=_CHECKS)

        ask()
    assert {"POST /generate", "POST /v1/chat/completions", "GET /info"} <= seen


def _bound(body: Any) -> None:
    """Make a request that is accepted end soon."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("parameters"), dict):
        body["parameters"].setdefault("max_new_tokens", 2)
    elif "inputs" in body:
        body["parameters"] = {"max_new_tokens": 2}
    if "messages" in body or "prompt" in body:
        body.setdefault("max_tokens", 2)
    for instance in body.get("instances", []) if isinstance(body.get("instances"), list) else []:
        _bound(instance)
