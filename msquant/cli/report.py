"""`msquant report`: one document on a checkpoint."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msquant.cli import console, options

if TYPE_CHECKING:
    from rich.progress import TaskID

    from msquant.reporting.write import ReportFormat

_LINE_SECONDS = 10.0


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="A checkpoint folder, quantized or not; or several that msquant made, to compare them.",
            show_default=False,
            autocompletion=options.complete_folders,
        ),
    ],
    format: Annotated[str, typer.Option(help="html, or markdown with the same numbers in tables.")] = "html",
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write.  [default: FOLDER-report.html beside the folder; of several "
            "FOLDER-comparison.html beside the first]"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="What msquant analyze --json printed, to rank the matrices within layers."),
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(help="What msquant analyze --frontier --json printed, to show what other schemes lose."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            " /--no-check",
            help="Do not read every weight to check the format's contract.",
            show_default=False,
        ),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON; write a file only with --output.")
    ] = False,
) -> None:
    """Write one self-contained page on a checkpoint: what it is, how good it is, and how to serve it.

    Of several folders it compares the runs that made them. The page fetches nothing and runs no script: it
    can be mailed, printed and put on any server.

    Example: msquant report smollm2-135m-osl

    Example: msquant analyze smollm2-135m --json > ranking.json && msquant report smollm2-135m-osl
    --sensitivity ranking.json

    Example: msquant analyze smollm2-135m --frontier --for vllm --json > frontier.json && msquant report
    smollm2-135m-small --frontier frontier.json

    Example: msquant report smollm2-135m-osl smollm2-135m-rtn
    """
    from msquant.reporting.collect import collect
    from msquant.reporting.data import as_plain
    from msquant.reporting.write import report_format, write_report

    kind = report_format(format)
    if folders[1:]:
        given = {"--sensitivity": sensitivity, "--frontier": frontier}
        options.refuse(given, "is for the report on one folder", "name one folder")
        _compare(folders, output, kind, overwrite, check, as_json)
        return
    (folder,) = folders
    with _Reading() as display:
        if as_json and output is None:
            target = None
            found = collect(
                folder,
                sensitivity=sensitivity,
                frontier=frontier,
                check=check,
                stage=display.stage,
                progress=display.update,
            )
        else:
            target, found = write_report(
                folder,
                output,
                format=kind,
                overwrite=overwrite,
                sensitivity=sensitivity,
                frontier=frontier,
                check=check,
                stage=display.stage,
                progress=display.update,
            )
    if as_json:
        console.print_json(as_plain(found))
        return
    console.print_line(f"{found.verdict.level}: {found.verdict.reason}")
    for remark in found.verdict.remarks:
        console.print_line(f"Note: {remark}")
    console.print_line(f"Wrote {shlex.quote(str(target))}.")


def _compare(
    folders: list[Path],
    output: Path | None,
    kind: "ReportFormat",
    overwrite: bool,
    check: bool,
    as_json: bool,
) -> None:
    from msquant.reporting.comparison import compare_runs
    from msquant.reporting.data import as_plain
    from msquant.reporting.write import write_comparison

    if as_json and output is None:
        console.print_json(as_plain(compare_runs(folders, check=check, stage=console.print_note)))
        return
    target, found = write_comparison(
        folders, output, format=kind, overwrite=overwrite, check=check, stage=console.print_note
    )
    if as_json:
        console.print_json(as_plain(found))
        return
    for label, run in zip(found.labels, found.runs, strict=True):
        console.print_line(f"{label}, {run.verdict.level}: {run.verdict.reason}")
    for remark in found.remarks:
        console.print_line(f"Note: {remark}")
    console.print_line(f"Wrote {shlex.quote(str(target))}.")


class _Reading:
    """Progress over bytes of weights: a bar with ETA on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("[bold]weights"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console.stderr,
            transient=True,
            disable=not console.stderr.is_terminal,
        )
        self._task: TaskID | None = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> "_Reading":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Say what begins now."""
        console.print_note(text)

    def update(self, done: int, total: int) -> None:
        """So many bytes of so many are read."""
        now = time.monotonic()
        if self._task is None:
            self._task = self._progress.add_task("", total=total)
            self._started = now
        self._progress.update(self._task, completed=done)
        if not console.stderr.is_terminal and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            left = (now - self._started) / max(1, done) * (total - done)
            console.stderr.print(
                f"{console.as_bytes(done)} of {console.as_bytes(total)}  ETA {console.as_duration(left)}",
                markup=False,
            )
