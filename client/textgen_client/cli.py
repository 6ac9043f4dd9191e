"""The `textgen` command: generate, chat, validate, adapters, detect-watermark, models, health, cancel.

Owns options, output and exit codes: 0 fine, 1 the request or the server failed (one line on stderr), 2 wrong usage,
130 interrupted; `validate` uses 1 for a text that is not accepted too, and 2 for a grammar that is not supported. What
it does goes through `Client`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from textgen_client.channel import DEFAULT_MODEL, DEFAULT_URL, Tls
from textgen_client.chat import Chat
from textgen_client.client import Client
from textgen_client.errors import TextgenError, ValidationError
from textgen_client.health import Health, is_progressing
from textgen_client.results import Adapter, Answer, Chunk
from textgen_client.watermark import DEFAULT_GAMMA, detect_watermark

app = typer.Typer(
    help="Talk to a triton-textgen server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

adapters = typer.Typer(help="List, load or unload the server's LoRA adapters.", no_args_is_help=True)
app.add_typer(adapters, name="adapters")

_SERVER = "Server"
_SAMPLING = "Generation"

Url = Annotated[
    str, typer.Option(envvar="TEXTGEN_URL", help="host:port of Triton's gRPC port.", rich_help_panel=_SERVER)
]
Model = Annotated[str, typer.Option(envvar="TEXTGEN_MODEL", help="`textgen` or `ensemble`.", rich_help_panel=_SERVER)]
UseTls = Annotated[bool, typer.Option("--tls", help="Encrypt the connection.", rich_help_panel=_SERVER)]
TlsCa = Annotated[
    str | None, typer.Option(help="PEM file of the authority to trust; implies --tls.", rich_help_panel=_SERVER)
]
Headers = Annotated[
    list[str] | None, typer.Option("--header", help="name=value, sent as gRPC metadata.", rich_help_panel=_SERVER)
]
MaxNewTokens = Annotated[int | None, typer.Option(help="At most this many tokens.", rich_help_panel=_SAMPLING)]
Temperature = Annotated[float | None, typer.Option(help="Above 0; turns sampling on.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING)]
TopK = Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING)]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None, typer.Option(help="End before this text; may be repeated.", rich_help_panel=_SAMPLING)
]
Timeout = Annotated[float | None, typer.Option(help="Seconds.", rich_help_panel=_SAMPLING)]
Parameters = Annotated[
    list[str] | None,
    typer.Option("-p", "--parameter", help="name=value, any other; the value is JSON.", rich_help_panel=_SAMPLING),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON; when streaming, one object a line.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from standard input.")],
    url: Url = DEFAULT_URL,
    model: Model = DEFAULT_MODEL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    timeout: Timeout = None,
    parameter: Parameters = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Print as it is made (default, except with --json).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    text = _standard_input() if prompt == "-" else prompt
    asked = _parameters(max_new_tokens, temperature, top_p, top_k, seed, stop, parameter)
    with _client(url, model, tls, tls_ca, header) as client:
        if stream is None:  # several texts at once cannot be shown as they grow
            stream = not as_json and asked.get("n", 1) == 1
        if stream:
            with client.stream(text, timeout=timeout, **asked) as chunks:
                if as_json:
                    _print_json_lines(chunks)
                else:
                    _print_as_it_comes(chunks)
        else:
            answer = client.generate(text, timeout=timeout, **asked)
            if as_json:
                _print_json(answer)
            elif len(answer.choices) == 1:
                _print(answer.text + "\n")
            else:
                _print("".join(f"[{choice.index}] {choice.text}\n" for choice in answer.choices))


@app.command()
def chat(
    url: Url = DEFAULT_URL,
    model: Model = DEFAULT_MODEL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
    system: Annotated[str | None, typer.Option(help="System message the conversation begins with.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    timeout: Timeout = None,
    parameter: Parameters = None,
) -> None:
    """Converse. Ctrl-C ends an answer, /reset forgets, Ctrl-D or /exit leaves."""
    asked = _parameters(max_new_tokens, temperature, top_p, top_k, seed, stop, parameter)
    with _client(url, model, tls, tls_ca, header) as client:
        Chat(client, system=system, timeout_s=timeout, parameters=asked).run()


@app.command()
def validate(
    url: Url = DEFAULT_URL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
    schema: Annotated[str | None, typer.Option(help="File with a JSON Schema; `-` reads standard input.")] = None,
    regex: Annotated[str | None, typer.Option(help="A regular expression, for the whole text.")] = None,
    grammar: Annotated[str | None, typer.Option(help="The parameter `grammar` as JSON: {type, value}.")] = None,
    text: Annotated[str | None, typer.Option(help="Text to check against it.")] = None,
    file: Annotated[str | None, typer.Option(help="File with that text; `-` reads standard input.")] = None,
    backend: Annotated[str | None, typer.Option(help="llguidance, xgrammar or lmfe.")] = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Does the server support a grammar, and could it generate a text under it? Exit code 0 yes, 1 no (the text),
    2 no (the grammar)."""
    if sum(form is not None for form in (schema, regex, grammar)) != 1:
        raise typer.BadParameter("give exactly one of --schema, --regex and --grammar")
    if text is not None and file is not None:
        raise typer.BadParameter("give at most one of --text and --file")
    if schema is not None:
        asked: Any = {"type": "json", "value": _read(schema, "--schema")}
    elif regex is not None:
        asked = {"type": "regex", "value": regex}
    else:
        asked = _from_json(grammar or "", "--grammar")
    sample = text if file is None else _read(file, "--file")
    with _client(url, DEFAULT_MODEL, tls, tls_ca, header) as client:
        found = client.check_grammar(asked, sample, timeout=timeout, grammar_backend=backend)
    if as_json:
        _print(json.dumps(dataclasses.asdict(found), ensure_ascii=False) + "\n")
    elif not found.supported:
        typer.echo(f"not supported: {found.error}", err=True)
    else:
        for warning in found.warnings:
            typer.echo(f"warning: {warning}", err=True)
        if sample is None:
            _print(f"supported by {found.backend}\n")
        elif found.accepted:
            _print("accepted\n")
        else:
            _print(f"{'not decided' if found.accepted is None else 'not accepted'}: {found.reason}\n")
    if not found.supported:
        raise typer.Exit(2)
    raise typer.Exit(0 if sample is None or found.accepted else 1)


@app.command("detect-watermark")
def watermark(
    text: Annotated[str | None, typer.Argument(help="The text; `-` reads it from standard input.")] = None,
    url: Url = DEFAULT_URL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
    ids: Annotated[str | None, typer.Option(help="Its token ids instead, a JSON list; no server is asked.")] = None,
    gamma: Annotated[float, typer.Option(help="The server's WATERMARK_GAMMA.")] = DEFAULT_GAMMA,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Was a text generated with `watermark=true`? The longer it is, the surer the answer."""
    if (text is None) == (ids is None):
        raise typer.BadParameter("give either a text or --ids")
    if text is None:
        token_ids = _from_json(ids or "", "--ids")
        if not isinstance(token_ids, list):
            raise typer.BadParameter("expected a JSON list of token ids", param_hint="--ids")
    else:
        with _client(url, DEFAULT_MODEL, tls, tls_ca, header) as client:
            token_ids = client.tokenize(_standard_input() if text == "-" else text, timeout=timeout)
    try:
        found = detect_watermark(token_ids, gamma=gamma)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        shown = {"detected": found.detected, "z_score": found.z_score, "p_value": found.p_value}
        _print(json.dumps({**shown, **dataclasses.asdict(found)}) + "\n")
        return
    expected = found.gamma * found.num_pairs
    _print(f"z = {found.z_score:.2f}, p = {found.p_value:.2g}: ")
    _print(f"{found.num_green} of {found.num_pairs} tokens are green, {expected:.1f} by chance\n")
    _print("watermark found\n" if found.detected else "no watermark found\n")


@adapters.command("list")
def list_adapters(
    url: Url = DEFAULT_URL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters."""
    with _client(url, DEFAULT_MODEL, tls, tls_ca, header) as client:
        _print_adapters(client.adapters(timeout=timeout), as_json)


@adapters.command("load")
def load_adapter(
    name: Annotated[str, typer.Argument(help="What requests will call it by, as `adapter_id`.")],
    path: Annotated[
        str | None, typer.Argument(help="Folder, below the one the server allows; the name if left out.")
    ] = None,
    url: Url = DEFAULT_URL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Load an adapter, then list them."""
    with _client(url, DEFAULT_MODEL, tls, tls_ca, header) as client:
        _print_adapters(client.load_adapter(name, path, timeout=timeout), as_json)


@adapters.command("unload")
def unload_adapter(
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    url: Url = DEFAULT_URL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Take an adapter away, then list the others. Requests that run with it still end well."""
    with _client(url, DEFAULT_MODEL, tls, tls_ca, header) as client:
        _print_adapters(client.unload_adapter(name, timeout=timeout), as_json)


@app.command()
def models(
    url: Url = DEFAULT_URL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
    timeout: Timeout = 5.0,
    as_json: AsJson = False,
) -> None:
    """List the server's models and their state."""
    with _client(url, DEFAULT_MODEL, tls, tls_ca, header) as client:
        found = client.models(timeout=timeout or 5.0)
    if as_json:
        _print(json.dumps([dataclasses.asdict(model) for model in found], ensure_ascii=False) + "\n")
        return
    for model in found:
        _print(" ".join(filter(None, (f"{model.name:<20}", f"{model.version:<4}", model.state, model.reason))) + "\n")


@app.command()
def health(
    url: Url = DEFAULT_URL,
    model: Model = DEFAULT_MODEL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
    timeout: Timeout = 5.0,
    metrics_url: Annotated[
        str | None,
        typer.Option(help="Metrics of the server: while they show that it generates, no token is asked for."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask for one real token; exit code 0 if it came, else 1."""
    if metrics_url is not None and is_progressing(metrics_url):
        found = Health(True, True, True, inference=True, is_progressing=True)
    else:
        with _client(url, model, tls, tls_ca, header) as client:
            found = client.health(timeout=timeout or 5.0)
    if as_json:
        _print(json.dumps({"ok": found.ok, **dataclasses.asdict(found)}, ensure_ascii=False) + "\n")
    elif found.is_progressing:
        _print("healthy: it generates\n")
    elif found.ok:
        _print(f"healthy: one token in {found.latency_s:.3f} s\n")
    else:
        typer.echo(f"unhealthy: {found.problem}", err=True)
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def cancel(
    request_id: Annotated[str, typer.Argument(help="The id the request was sent with.")],
    url: Url = DEFAULT_URL,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    header: Headers = None,
) -> None:
    """End a live request."""
    with _client(url, DEFAULT_MODEL, tls, tls_ca, header) as client:
        client.cancel(request_id)
    _print(f"cancelled {request_id}\n")


def main() -> NoReturn:
    """Entry point of the `textgen` script: runs the command, turns every failure into one line and an exit code.

    The process ends without Python's own finalization, which stops gRPC's threads wherever they are, one that holds a
    lock included, and then may wait for that lock for ever.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a character shows a question mark
        sys.stdout.reconfigure(errors="replace")
    exit_code = _run()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # whoever read the output has left
        exit_code = exit_code or 1
    os._exit(exit_code)


def _run() -> int:
    try:
        app()
    except TextgenError as error:
        where = f" (request {error.request_id})" if error.request_id else ""
        typer.echo(f"textgen: {error}{where}", err=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:  # how the CLI library returns
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _client(url: str, model: str, tls: bool, tls_ca: str | None, headers: list[str] | None) -> Client:
    return Client(
        url,
        model=model,
        tls=Tls(root_certificates=tls_ca) if tls or tls_ca else None,
        headers=dict(_name_and_value(header, "--header") for header in headers or ()),
    )


def _parameters(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: list[str] | None,
    others: list[str] | None,
) -> dict[str, Any]:
    """The request's parameters; an option given as `-p` as well is taken from there. `-p` values are JSON, or text."""
    parameters: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or None,
    }
    for other in others or ():
        name, value = _name_and_value(other, "-p")
        if name in ("timeout", "prompt", "messages", "input_ids", "model", "request_id", "headers"):
            raise typer.BadParameter(f"`{name}` is no generation parameter", param_hint="-p")
        try:
            parameters[name] = json.loads(value)
        except json.JSONDecodeError:
            parameters[name] = value
    return parameters


def _name_and_value(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise typer.BadParameter(f"expected name=value; given: {text}", param_hint=option)
    return name, value


def _from_json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"no JSON: {error}", param_hint=option) from None


def _read(path: str, option: str) -> str:
    if path == "-":
        return _standard_input()
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot be read: {error}", param_hint=option) from None


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValidationError(f"standard input is not UTF-8: {error}") from None


def _print_adapters(found: list[Adapter], as_json: bool) -> None:
    if as_json:
        _print(json.dumps([dataclasses.asdict(adapter) for adapter in found], ensure_ascii=False) + "\n")
        return
    for adapter in found:
        state = f"unloading, {adapter.live_requests} live" if adapter.unloading else f"{adapter.live_requests} live"
        size = f"rank {adapter.rank}, {adapter.num_layers} layers, {adapter.num_bytes / 2**20:.1f} MiB"
        _print(f"{adapter.name:<20} {size}  {state}\n")


def _print_json_lines(chunks: Iterable[Chunk]) -> None:
    for chunk in chunks:
        _print_json(chunk)


def _print_as_it_comes(chunks: Iterable[Chunk]) -> None:
    """The text, and the end of its line, which a failure or Ctrl-C in mid-text must not swallow."""
    begun = False
    try:
        for chunk in chunks:
            begun = True
            _print(chunk.text)
    finally:
        if begun:
            _print("\n")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_json(answer: Answer) -> None:
    _print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n")
