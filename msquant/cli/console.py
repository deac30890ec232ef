"""The one place that writes to the terminal: results to stdout, progress and errors to stderr."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from msquant.errors import MsquantError

stdout = Console(soft_wrap=True, highlight=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Write one JSON document to stdout, undecorated, for scripts."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_line(text: str) -> None:
    """Write one plain line to stdout; nothing in it is taken for markup."""
    stdout.print(text, markup=False)


def print_table(title: str, columns: list[str], rows: list[list[Any]], *, caption: str | None = None) -> None:
    """Write a table to stdout; numbers are right-aligned."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if rows and numeric else "left")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    stdout.print(table)


def print_warning(text: str) -> None:
    """Write a warning to stderr."""
    stderr.print(f"[yellow]warning:[/yellow] {escape(text)}")


def print_error(error: MsquantError, *, as_json: bool = False) -> None:
    """Write an error with its place and remedy: to stderr for people, to stdout as JSON for scripts."""
    if as_json:
        print_json({"error": {"what": error.what, "where": error.where, "remedy": error.remedy}})
        return
    place = f"{escape(error.where)}: " if error.where else ""
    stderr.print(f"[bold red]error:[/bold red] {place}{escape(error.what)}")
    if error.remedy:
        stderr.print(f"  [bold]try:[/bold] {escape(error.remedy)}")


def progress_bar(*, visible: bool = True) -> Progress:
    """A progress bar on stderr with count, elapsed time and ETA; it draws nothing where there is no terminal."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=stderr,
        disable=not visible,
    )
