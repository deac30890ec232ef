"""`msquant doctor`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console

if TYPE_CHECKING:
    from msquant.inference.check import Check

_MARKS = {
    "ok": "[green]ok[/green]",
    "note": "[dim]note[/dim]",
    "warning": "[bold yellow]warning[/bold yellow]",
    "error": "[bold red]error[/bold red]",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check this machine: Python, packages, memory, disk, NPUs and CANN, engines, hubs.

    Every line that is not ok says what to do. Exits with 1 if something that is needed does not work; a
    missing NPU is only a note, and an unreachable hub a warning.

    Example: msquant doctor
    """
    from msquant.diagnosis import diagnose

    with console.stderr.status("looking around"):
        checks = diagnose()
    report(checks, as_json)


def report(checks: "list[Check]", as_json: bool) -> None:
    """Print checks, and exit with 1 if one of them is an error."""
    from msquant.inference.check import failed

    errors = failed(checks)
    if as_json:
        document: dict[str, Any] = {"ok": not errors, "checks": [check.document() for check in checks]}
        console.print_json(document)
    else:
        _render(checks)
    if errors:
        raise typer.Exit(1)


def _render(checks: "list[Check]") -> None:
    from rich.markup import escape

    width = max(len(check.subject) for check in checks)
    for i, check in enumerate(checks):
        if i == 0 or check.section != checks[i - 1].section:
            console.stdout.print(f"[bold]{escape(check.section)}[/bold]")
        mark = _MARKS[check.status]
        pad = " " * (len("warning") - len(check.status))
        console.stdout.print(f"  {mark}{pad}  {escape(check.subject.ljust(width))}  {escape(check.detail)}")
        if check.remedy:
            console.stdout.print(f"           {' ' * width}  [dim]try:[/dim] {escape(check.remedy)}")
