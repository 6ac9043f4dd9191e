"""Triton's model control over HTTP: load, reload, unload, list. Needs a server in explicit mode and, where its
administrative calls are restricted, their key."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# The header that carries the key of Triton's restricted calls; over gRPC it is `triton-grpc-protocol-admin-key`.
KEY_HEADER = "admin-key"


class ControlError(Exception):
    """The server refused, or could not be reached; the text is the server's, or says why not."""


@dataclass(frozen=True)
class ModelVersion:
    """One version as the server's index shows it. state: READY, LOADING, UNLOADING, UNAVAILABLE or empty."""

    name: str
    version: str
    state: str


class ModelControl:
    """A server's model control. Every method raises ControlError."""

    def __init__(self, host: str, http_port: int, key: str | None = None) -> None:
        self._host, self._port = host, http_port
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if key is not None:
            self._headers[KEY_HEADER] = key

    def index(self) -> list[ModelVersion]:
        """Every version of every model that the server knows of."""
        entries = self._json("POST", "/v2/repository/index", {}, timeout_s=10)
        return [ModelVersion(e["name"], e.get("version", ""), e.get("state", "")) for e in entries]

    def is_ready(self, model: str, version: str) -> bool:
        """Whether Triton calls this version ready."""
        with self._answer("GET", f"/v2/models/{model}/versions/{version}/ready", None, 10) as response:
            return response.status == 200

    def load(self, model: str, timeout_s: float) -> None:
        """Load what is new in the model's folder beside what runs; returns when it serves. Nothing new: does nothing.
        When it cannot be loaded, what runs goes on."""
        self._json("POST", f"/v2/repository/models/{model}/load", {}, timeout_s)

    def reload(self, model: str, timeout_s: float) -> None:
        """Load the same files again, with new processes, beside what runs."""
        config = self._json("GET", f"/v2/models/{model}/config", None, timeout_s=10)
        # Without a change Triton keeps the instances it has. Parameters in upper case mean nothing to our models.
        config.setdefault("parameters", {})["RELOAD"] = {"string_value": str(time.monotonic_ns())}
        body = {"parameters": {"config": json.dumps(config)}}
        self._json("POST", f"/v2/repository/models/{model}/load", body, timeout_s)

    def unload(self, model: str) -> None:
        """Take no more requests for the model; what runs ends undisturbed."""
        self._json("POST", f"/v2/repository/models/{model}/unload", {}, timeout_s=60)

    def generate_one_token(self, model: str, version: str, timeout_s: float) -> None:
        """Prove that a version answers."""
        body = {"text_input": "Hello", "max_new_tokens": 1}
        path = f"/v2/models/{model}/versions/{version}/generate"
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._json("POST", path, body, timeout_s)
            except ControlError:
                # Triton may answer a load a moment before the version takes requests.
                if time.monotonic() > deadline or self.is_ready(model, version):
                    raise
                time.sleep(0.1)
                continue
            if "error" in answer:
                raise ControlError(answer["error"])
            return

    def _json(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        with self._answer(method, path, body, timeout_s) as response:
            text = response.read()
            status = response.status
        try:
            content = json.loads(text or b"{}")
        except ValueError:
            raise ControlError(f"HTTP status {status}: {text[:200].decode(errors='replace')}") from None
        if status != 200:
            error = content.get("error") if isinstance(content, dict) else None
            raise ControlError(error or f"HTTP status {status}")
        return content

    @contextmanager
    def _answer(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, path, payload, self._headers)
            yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ControlError(f"{self._host}:{self._port}: {error or type(error).__name__}") from error
        finally:
            connection.close()
