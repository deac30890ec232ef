"""The flow of `msquant report`: a folder in, one document out."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from msquant.checkpoint.writer import write_text
from msquant.errors import OutputError
from msquant.reporting.collect import collect
from msquant.reporting.data import Report

ReportFormat = Literal["html", "markdown"]
FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)
SUFFIXES: dict[ReportFormat, str] = {"html": ".html", "markdown": ".md"}


def report_format(name: str) -> ReportFormat:
    """The format of that name. Raises OutputError if there is none."""
    for known in FORMATS:
        if name == known:
            return known
    raise OutputError(
        f"there is no format {name!r}", where="--format", remedy=f"use one of: {', '.join(FORMATS)}"
    )


def default_output(folder: Path, format: ReportFormat = "html") -> Path:
    """Beside the folder, not in it: every file of a checkpoint belongs to its contract."""
    resolved = folder.resolve()
    return resolved.with_name(f"{resolved.name}-report{SUFFIXES[format]}")


def write_report(
    folder: Path,
    output: Path | None = None,
    *,
    format: ReportFormat = "html",
    overwrite: bool = False,
    sensitivity: Path | None = None,
    check: bool = True,
    stage: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, Report]:
    """Write what there is to know of a checkpoint into one file that needs nothing else.

    Equal folders give equal bytes.

    Args:
        folder: as for `collect`.
        output: the file; None is `default_output`.
        format: `html`, or `markdown` with the same numbers in tables.
        overwrite: replace the file if it exists.
        sensitivity: as for `collect`.
        check: likewise.
        stage: likewise.
        progress: likewise.

    Returns:
        The file, and what it says.

    Raises:
        CheckpointError: as `collect`.
        OutputError: the file exists, or cannot be written.
    """
    target = default_output(folder, format) if output is None else output
    _check_target(target, overwrite=overwrite)
    report = collect(folder, sensitivity=sensitivity, check=check, stage=stage, progress=progress)
    stage("drawing charts" if format == "html" else "writing tables")
    from msquant.reporting.render import html_page, markdown_page

    write_text(target, html_page(report) if format == "html" else markdown_page(report))
    return target, report


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.is_dir():
        raise OutputError("is a folder", where=target, remedy="give a file name")
    if target.exists() and not overwrite:
        raise OutputError("exists already", where=target, remedy="give another --output, or --overwrite")
    if not target.parent.is_dir():
        raise OutputError(
            "cannot be written: there is no such folder", where=target, remedy="make the folder first"
        )
