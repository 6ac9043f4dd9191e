"""How a connection to the server is made: address, TLS, keepalive, headers. Shared by both clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from textgen_client.errors import ValidationError

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL = "textgen"

# The server ends an overdue request itself and says so; the client's own deadline only guards against silence.
DEADLINE_GRACE_S = 2.0

# After the final response (a call cancelled then stays behind in Triton 2.51) the server ends the stream by itself. One
# that does not within this time is cancelled after all: it must not hold its client.
END_OF_STREAM_S = 2.0


@dataclass(frozen=True, slots=True)
class Tls:
    """Files (PEM) for an encrypted connection. Without `root_certificates`, gRPC's own roots are trusted."""

    root_certificates: str | Path | None = None
    private_key: str | Path | None = None
    certificate_chain: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ValidationError for a file that cannot be read."""

        def content(path: str | Path | None) -> bytes | None:
            return None if path is None else Path(path).read_bytes()

        try:
            return grpc.ssl_channel_credentials(
                content(self.root_certificates), content(self.private_key), content(self.certificate_chain)
            )
        except OSError as error:
            raise ValidationError(f"TLS file cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """HTTP/2 pings on an otherwise silent connection, in seconds; they notice a peer that vanished.

    Triton closes connections that ping more often than its `--grpc-http2-min-recv-ping-interval-without-data`
    (300 s by default) while no request runs.
    """

    interval_s: float = 60.0
    timeout_s: float = 20.0
    without_requests: bool = False

    def options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.keepalive_time_ms", int(self.interval_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", int(self.without_requests)),
            ("grpc.http2.max_pings_without_data", 0),
        ]


@dataclass(frozen=True, slots=True)
class Connection:
    """Everything that leads to a server. url: `host:port` of Triton's gRPC port. headers: sent with every call.

    channel_options: further gRPC channel arguments; they win over ours.
    """

    url: str = DEFAULT_URL
    tls: Tls | None = None
    keepalive: KeepAlive | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    channel_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.url.startswith(("http://", "https://")):
            raise ValidationError(f"`url` must be host:port of Triton's gRPC port (8001 by default); given: {self.url}")

    def open(self, grpc_module: Any) -> Any:
        """A new channel, made by `grpc` or `grpc.aio`. It connects with its first call."""
        options: dict[str, Any] = {
            "grpc.max_send_message_length": -1,
            "grpc.max_receive_message_length": -1,
            # Calls fail at once while gRPC waits to reconnect, by default for up to two minutes.
            "grpc.initial_reconnect_backoff_ms": 200,
            "grpc.max_reconnect_backoff_ms": 2000,
            **dict(self.keepalive.options() if self.keepalive else ()),
            **self.channel_options,
        }
        if self.tls is None:
            return grpc_module.insecure_channel(self.url, options=list(options.items()))
        return grpc_module.secure_channel(self.url, self.tls.credentials(), options=list(options.items()))

    def metadata(self, headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
        """The headers of one call: those of the connection and, winning over them, the call's own."""
        return tuple((name.lower(), value) for name, value in {**self.headers, **(headers or {})}.items())


def deadline(timeout_s: float | None) -> float | None:
    """The client's own deadline for a request with this `timeout`, in seconds."""
    return None if timeout_s is None else timeout_s + DEADLINE_GRACE_S
