"""`msquant doctor`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console, options
from msquant.errors import EngineError

if TYPE_CHECKING:
    from msquant.deploy.ascend_checks import Check

_MARKS = {
    "ok": "[green]ok[/green]",
    "note": "[dim]note[/dim]",
    "warning": "[bold yellow]warning[/bold yellow]",
    "error": "[bold red]error[/bold red]",
}


def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Check instead that this model folder can be served here by vLLM-MindSpore."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="With FOLDER: serve it by this recipe's section, not by its own.")
    ] = None,
    node: Annotated[int, typer.Option(min=0, help="With FOLDER: which of several nodes this is.")] = 0,
    head_address: Annotated[
        str | None, typer.Option(help="With FOLDER: IP address of the first of several nodes.")
    ] = None,
    network_interface: Annotated[
        str | None, typer.Option(help="With FOLDER: interface that the nodes reach each other by.")
    ] = None,
    host: Annotated[str, typer.Option(help="With FOLDER: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="With FOLDER: port to listen on.")] = 8000,
    ray_address: options.RayAddress = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check this machine: Python, packages, memory, disk, NPUs and CANN, engines, hubs.

    With FOLDER it checks what vLLM-MindSpore's guides ask for before that is served: the folder, NPUs and
    their memory, variables, ports, and for several nodes the network and that they are the same.

    With --ray-address it checks that all nodes of a cluster are alike: packages, arithmetic, memory.

    Every line that is not ok says what to do. Exits with 1 if something that is needed does not work; a
    missing NPU is only a note without FOLDER, and an unreachable hub a warning.

    Example: msquant doctor

    Example: msquant doctor --ray-address 10.0.0.1:6379
    """
    if folder is not None and ray_address is not None:
        raise EngineError(
            "a folder and a cluster are two different checks",
            where="--ray-address",
            remedy=f"run msquant doctor {folder} for itself",
        )
    with console.Working("looking around"):
        if ray_address is not None:
            from msquant.flows.worker_pool import diagnose_cluster

            checks = diagnose_cluster(ray_address)
        elif folder is None:
            from msquant.flows.diagnosis import diagnose

            checks = diagnose()
        else:
            from msquant.deploy.preflight import preflight
            from msquant.flows.serving_checks import serving_settings

            site = {"head_address": head_address, "network_interface": network_interface}
            settings = serving_settings(folder, recipe, site)
            checks = preflight(folder, settings, node=node, address=host, port=port)
    report(checks, as_json)


def report(checks: "list[Check]", as_json: bool) -> None:
    """Print checks, and exit with 1 if one of them is an error."""
    from msquant.deploy.ascend_checks import failed

    errors = failed(checks)
    if as_json:
        document: dict[str, Any] = {"ok": not errors, "checks": [check.document() for check in checks]}
        console.print_json(document)
    else:
        _render(checks)
    if errors:
        raise typer.Exit(1)


def _render(checks: "list[Check]") -> None:
    width = max(len(check.subject) for check in checks)
    for i, check in enumerate(checks):
        if i == 0 or check.section != checks[i - 1].section:
            console.stdout.print(f"[bold]{console.foreign(check.section)}[/bold]")
        mark = _MARKS[check.status]
        pad = " " * (len("warning") - len(check.status))
        subject, detail = console.foreign(check.subject.ljust(width)), console.foreign(check.detail)
        console.stdout.print(f"  {mark}{pad}  {subject}  {detail}")
        if check.remedy:
            console.stdout.print(f"           {' ' * width}  [dim]try:[/dim] {console.foreign(check.remedy)}")
