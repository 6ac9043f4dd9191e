"""Everything about the gateway that can be set, checked once."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

VERSION = metadata.version("triton-textgen-client")


class GatewaySettings(BaseModel):
    """One gateway.

    api_keys: any of them opens the guarded routes; none: everything is open. triton_url: `host:port` of gRPC. model_id:
    what /info reports in place of the model's own word. compute_type: None derives it from the model's device.
    vertex_*: the paths at which Vertex AI asks and predicts, beside the usual ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    triton_url: str = "localhost:8001"
    triton_metrics_url: str = "http://localhost:8002/metrics"
    triton_model: str = "textgen"
    model_id: str | None = None
    served_model_name: str | None = None

    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    payload_limit: int = Field(default=2_000_000, ge=1)
    cors_allow_origin: tuple[str, ...] = ("*",)
    max_client_batch_size: int = Field(default=4, ge=1)
    access_log: bool = True

    compute_type: str | None = None
    validation_workers: int = 2
    vertex_health_route: str | None = None
    vertex_predict_route: str | None = None

    @field_validator("vertex_health_route", "vertex_predict_route")
    @classmethod
    def _is_path(cls, path: str | None) -> str | None:
        if path is not None and not path.startswith("/"):
            raise ValueError(f"a route begins with a slash; given: {path!r}")
        return path


def read_api_keys(value: str | None, file: Path | None) -> tuple[str, ...]:
    """The keys of a comma-separated `value` and of a file with one key a line (# begins a comment line)."""
    keys = (value or "").split(",")
    if file is not None:
        keys += [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
