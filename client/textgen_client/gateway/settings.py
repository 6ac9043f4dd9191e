"""Everything about the gateway that can be set, checked once."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

VERSION = metadata.version("triton-textgen-client")


class GatewaySettings(BaseModel):
    """One gateway. Limits of the engine stand here only to be reported by /info; the engine enforces its own.

    api_keys: any of them opens the guarded routes; none: everything is open. triton_url: `host:port` of gRPC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    triton_url: str = "localhost:8001"
    triton_metrics_url: str = "http://localhost:8002/metrics"
    triton_model: str = "textgen"
    model_id: str = "textgen"
    served_model_name: str | None = None
    lora_adapters: tuple[str, ...] = ()

    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    payload_limit: int = Field(default=2_000_000, ge=1)
    cors_allow_origin: tuple[str, ...] = ("*",)
    max_client_batch_size: int = Field(default=4, ge=1)
    access_log: bool = True

    compute_type: str = "cpu"
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    validation_workers: int = 2

    @property
    def model_name(self) -> str:
        """The name under which OpenAI's routes list the model."""
        if self.served_model_name:
            return self.served_model_name
        return Path(self.model_id).name if self.model_id.startswith(("/", ".")) else self.model_id

    @property
    def model_aliases(self) -> frozenset[str]:
        """Names in `model` that mean the served model; "tgi" is what TGI's documentation writes there."""
        return frozenset({self.model_name, self.model_id, self.triton_model, "tgi"})


def read_api_keys(value: str | None, file: Path | None) -> tuple[str, ...]:
    """The keys of a comma-separated `value` and of a file with one key a line (# begins a comment line)."""
    keys = (value or "").split(",")
    if file is not None:
        keys += [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    return tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
