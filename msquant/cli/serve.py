"""`msquant serve`."""

import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msquant.cli import console, options
from msquant.errors import EngineError

if TYPE_CHECKING:
    from msquant.flows.engines import EngineKind, EngineOptions
    from msquant.inference.launch import Launch
    from msquant.server.http_server import ServerOptions


def serve(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Model folder. Without it: the one that `msquant run` takes.",
            autocompletion=options.complete_folders,
        ),
    ] = None,
    engine: options.EngineName = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key that clients must send.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name that clients call the server by; repeat it for more."),
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="So many at once; the next one gets 429.")] = 64,
    max_body: Annotated[str, typer.Option(help="Largest body of a request; a larger one gets 413.")] = "4MB",
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of one prompt; without it, what the model takes.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of one answer; without it, what the model takes.")
    ] = None,
    device: options.EngineDevice = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of activations, for the engine vllm: auto, float32, bfloat16 or float16.")
    ] = "auto",
    recipe: Annotated[
        str | None, typer.Option(help="vllm-mindspore: take the serving section of this recipe.")
    ] = None,
    head_address: Annotated[
        str | None, typer.Option(help="vllm-mindspore: IP address of the first of several nodes.")
    ] = None,
    network_interface: Annotated[
        str | None, typer.Option(help="vllm-mindspore: interface that several nodes reach each other by.")
    ] = None,
    node: Annotated[int, typer.Option(min=0, help="vllm-mindspore: which of the nodes this is.")] = 0,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the sha256 of all shards with msquant.json; without either: up to 1 GB of them.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be executed.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line, with url and pid, when clients can connect.")
    ] = False,
    access_log: Annotated[
        bool,
        typer.Option(
            "--access-log/--no-access-log",
            help="A line on stderr for each request: method, path, status, tokens, seconds.",
        ),
    ] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show MindSpore's own warnings.")] = False,
) -> None:
    """Serve a model folder by OpenAI's HTTP interface, until Ctrl-C or SIGTERM.

    The options --max-..., --allow-host, --access-log and --device are for the embedded engine; other engines
    bring servers of their own.

    Example: msquant serve --port 8000 --max-requests 16
    """
    from msquant.flows.engines import KEY_VARIABLE, EngineOptions, Node, check_options, find_engine
    from msquant.flows.folder_checks import require_intact
    from msquant.flows.generation import find_model
    from msquant.models.device import silence_libraries
    from msquant.server.http_server import ServerOptions
    from msquant.server.steps import RequestLimits

    if not verbose:
        silence_libraries()
    kind = find_engine(engine)
    chosen = EngineOptions(device, dtype, recipe, Node(node, head_address, network_interface))
    check_options(kind, chosen)
    folder = find_model(model)
    place = _Place(folder, kind.name, host, port, as_json)
    if not dry_run:
        require_intact(folder, verify)
    key = _api_key(api_key_env)
    body = console.parse_bytes(max_body, "--max-body")
    limits = RequestLimits(max_prompt_tokens, max_tokens)
    kind.require_served(folder, chosen)
    every = kind.serve_commands(folder, chosen, host, port)
    if every and dry_run:
        _print_commands(every, as_json, f'export {KEY_VARIABLE}="${api_key_env}"' if key else None)
    elif every:
        _other_server(place, kind, chosen, every, key)
    elif not kind.in_process:
        raise EngineError(f"{kind.name} has no server", where="--engine", remedy="use --engine embedded")
    elif dry_run:
        _print_commands([], as_json, "# the embedded engine serves in this process; nothing is started")
    else:
        settings = ServerOptions(max_requests, body, limits, api_key=key)
        _embedded(place, device, settings, allow_host or [], access_log)


@dataclass(frozen=True)
class _Place:
    """What is served where."""

    folder: Path
    engine: str
    host: str
    port: int
    as_json: bool

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def warn_of_strangers(self, key: str | None) -> None:
        from msquant.server.address import LOOPBACK

        if self.host not in LOOPBACK:
            who = "everybody who reaches it" if key is None else "everybody who has the key"
            console.print_warning(f"listening on {self.host}: {who} can use the model, over plain HTTP")

    def say_ready(self, port: int, pid: int, page: bool = False) -> None:
        from msquant.server.address import base_url, reachable

        url = base_url(self.host, port)
        if self.as_json:
            document = {"url": url, "pid": pid, "model": self.name, "engine": self.engine}
            console.print_json_line(document)
        else:
            console.print_line(f"{self.name} ({self.engine}) is served at {url}/v1; Ctrl-C ends it")
            if page:
                console.print_line(f"try it in a browser: {base_url(reachable(self.host), port)}/")


def _embedded(
    place: _Place, device: str, settings: "ServerOptions", allowed: list[str], access_log: bool
) -> None:
    from msquant.flows.engines import load_embedded
    from msquant.server.address import accepted_hosts, bind
    from msquant.server.http_server import serve_engine
    from msquant.server.observed import ACCESS_LOG

    listener = bind(place.host, place.port)
    settings = replace(settings, hosts=accepted_hosts(place.host, listener.getsockname()[0], allowed))
    place.warn_of_strangers(settings.api_key)
    with console.Working("loading the model"):
        engine = load_embedded(place.folder, device)
    port = listener.getsockname()[1]
    if access_log:
        log = logging.getLogger(ACCESS_LOG)
        log.setLevel(logging.INFO)
        log.addHandler(console.LogLines())
    serve_engine(
        engine, place.name, listener, settings, lambda: place.say_ready(port, os.getpid(), page=True)
    )


def _other_server(
    place: _Place, kind: "EngineKind", chosen: "EngineOptions", every: "list[Launch]", key: str | None
) -> None:
    from msquant.flows.engines import KEY_VARIABLE
    from msquant.server.address import base_url, bind, reachable
    from msquant.server.supervise import supervise

    node = chosen.node
    if place.port == 0:
        raise EngineError(
            f"the server of {place.engine} needs a port", where="--port", remedy="use --port 8000"
        )
    kind.require_machine(place.folder, chosen, place.host, place.port)
    if node.index == 0:
        bind(place.host, place.port).close()
        place.warn_of_strangers(key)
    supervise(
        every[-1],
        None if node.index else f"{base_url(reachable(place.host), place.port)}/health",
        lambda pid: place.say_ready(place.port, pid),
        {KEY_VARIABLE: key} if key else {},
        sys.stderr.fileno(),
    )


def _print_commands(every: "list[Launch]", as_json: bool, first_line: str | None) -> None:
    if as_json:
        console.print_json([launch.document() for launch in every])
        return
    if first_line:
        console.print_line(first_line)
    for launch in every:
        console.print_document(launch.shell())


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii():
        raise EngineError(
            f"the environment variable {variable} is not set, or empty, or not ASCII",
            where="--api-key-env",
            remedy=f"set it first: export {variable}=$(openssl rand -hex 24)",
        )
    return key
