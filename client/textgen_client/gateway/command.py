"""The command `textgen-gateway`: options to settings, and uvicorn around the application."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvicorn

from textgen_client.gateway import workers as supervision
from textgen_client.gateway.app import SETTINGS_VARIABLE, make_app
from textgen_client.gateway.settings import GatewaySettings, read_api_keys


def serve(
    host: Annotated[str, typer.Option(envvar="HOST", help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(envvar=["AIP_HTTP_PORT", "PORT"], min=1, max=65535, help="Port to listen on.")
    ] = 8080,
    triton_url: Annotated[str, typer.Option(help="host:port of Triton's gRPC port.")] = "localhost:8001",
    triton_metrics_url: Annotated[
        str, typer.Option(help="Where /metrics comes from.")
    ] = "http://localhost:8002/metrics",
    triton_model: Annotated[str, typer.Option(help="Triton's name of the model.")] = "textgen",
    model_id: Annotated[
        str | None, typer.Option(envvar="MODEL_ID", help="What /info reports; else the model says it.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(envvar="SERVED_MODEL_NAME", help="What /v1/models lists; from the model id else.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="API_KEY", help="Keys that open the guarded routes, separated by commas.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(envvar="API_KEY_FILE", exists=True, dir_okay=False, help="Further keys, one a line.")
    ] = None,
    payload_limit: Annotated[
        int, typer.Option(envvar="PAYLOAD_LIMIT", min=1, help="Largest body, in bytes.")
    ] = 2_000_000,
    cors_allow_origin: Annotated[
        str, typer.Option(envvar="CORS_ALLOW_ORIGIN", help="Origins of browsers, separated by commas.")
    ] = "*",
    max_client_batch_size: Annotated[
        int, typer.Option(envvar="MAX_CLIENT_BATCH_SIZE", min=1, help="Most prompts of one /v1/completions.")
    ] = 4,
    validation_workers: Annotated[int, typer.Option(envvar="VALIDATION_WORKERS", help="What /info reports.")] = 2,
    compute_type: Annotated[
        str | None, typer.Option(envvar="COMPUTE_TYPE", help="The header x-compute-type; else from the model's device.")
    ] = None,
    vertex_health_route: Annotated[
        str | None, typer.Option(envvar="AIP_HEALTH_ROUTE", help="Where Vertex AI asks for health, beside /health.")
    ] = None,
    vertex_predict_route: Annotated[
        str | None, typer.Option(envvar="AIP_PREDICT_ROUTE", help="Where Vertex AI predicts, beside /vertex.")
    ] = None,
    workers: Annotated[int, typer.Option(envvar="GATEWAY_WORKERS", min=1, help="Processes that serve.")] = 1,
    graceful_termination_timeout: Annotated[
        int,
        typer.Option(envvar="GRACEFUL_TERMINATION_TIMEOUT", min=0, help="Seconds for running requests at the end."),
    ] = 90,
    tls_certificate: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="PEM; serves HTTPS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="PEM of its key.")] = None,
    access_log: Annotated[bool, typer.Option(help="A JSON line per request on standard output.")] = True,
) -> None:
    """Serve Text Generation Inference's and OpenAI's HTTP routes in front of a Triton server."""
    settings = GatewaySettings(
        triton_url=triton_url,
        triton_metrics_url=triton_metrics_url,
        triton_model=triton_model,
        model_id=model_id,
        served_model_name=served_model_name,
        api_keys=read_api_keys(api_key, api_key_file),
        payload_limit=payload_limit,
        cors_allow_origin=tuple(origin.strip() for origin in cors_allow_origin.split(",")),
        max_client_batch_size=max_client_batch_size,
        validation_workers=validation_workers,
        compute_type=compute_type,
        vertex_health_route=vertex_health_route,
        vertex_predict_route=vertex_predict_route,
        access_log=access_log,
    )
    options = {
        "host": host,
        "port": port,
        "access_log": False,  # ours says more, as JSON
        "log_config": _LOG,
        "timeout_graceful_shutdown": graceful_termination_timeout,
        "ssl_certfile": tls_certificate,
        "ssl_keyfile": tls_key,
        "server_header": False,
        "timeout_worker_healthcheck": supervision.SILENCE_S,
    }
    # uvicorn drains on SIGTERM and SIGINT, then sends itself the signal again; ending well is all that is left to do.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    if workers == 1:
        uvicorn.run(make_app(settings), **options)  # type: ignore[arg-type]
    else:
        os.environ[SETTINGS_VARIABLE] = settings.model_dump_json()
        worker = "textgen_client.gateway.app:make_worker_app"
        supervision.run(uvicorn.Config(worker, factory=True, workers=workers, **options))  # type: ignore[arg-type]


_LOG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(message)s"}, "named": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {
        "out": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stdout"},
        "error": {"class": "logging.StreamHandler", "formatter": "named", "stream": "ext://sys.stderr"},
    },
    "loggers": {
        "textgen_client.gateway.access": {"handlers": ["out"], "level": "INFO", "propagate": False},
        "uvicorn": {"handlers": ["error"], "level": "WARNING", "propagate": False},
    },
}


def main() -> None:
    """The command."""
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    logging.captureWarnings(True)
    sys.exit(app())


if __name__ == "__main__":
    main()
