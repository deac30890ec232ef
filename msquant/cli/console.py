"""The one place that writes to the terminal: results to stdout, progress and errors to stderr."""

import json
import sys
import time
from typing import Any, Self

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
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


def print_error(error: MsquantError, *, as_json: bool = False) -> None:
    """Write an error with its place and remedy: to stderr for people, to stdout as JSON for scripts."""
    if as_json:
        print_json({"error": {"what": error.what, "where": error.where, "remedy": error.remedy}})
        return
    place = f"{escape(error.where)}: " if error.where else ""
    stderr.print(f"[bold red]error:[/bold red] {place}{escape(error.what)}")
    if error.remedy:
        stderr.print(f"  [bold]try:[/bold] {escape(error.remedy)}")


def as_bytes(count: int) -> str:
    """A number of bytes for people, in decimal units: `269.1 MB`."""
    return decimal(count, precision=1)


class LayerProgress:
    """Progress over decoder layers on stderr: a bar with ETA on a terminal, a line a layer elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=stderr,
            transient=True,
            disable=not stderr.is_terminal,
        )
        self._task: TaskID | None = None
        self._count = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Say what begins now."""
        stderr.print(text, markup=False, style="dim")

    def start(self, count: int) -> None:
        """Begin with `count` layers ahead."""
        self._count = count
        self._started = time.monotonic()
        self._task = self._progress.add_task("decoder layers", total=count, note="")

    def advance(self, index: int, note: str) -> None:
        """Layer `index` is done; `note` says what came out."""
        if self._task is not None:
            self._progress.update(self._task, advance=1, note=note)
        if not stderr.is_terminal:
            left = (time.monotonic() - self._started) / (index + 1) * (self._count - index - 1)
            stderr.print(f"decoder layer {index + 1}/{self._count}  {note}  ETA {left:.0f} s", markup=False)
