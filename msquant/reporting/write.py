"""The flow of `msquant report`: a folder in, one page that fetches and runs nothing, or Markdown, out."""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich.filesize import decimal

from msquant import __version__
from msquant.checkpoint.writer import write_text
from msquant.errors import OutputError, choices
from msquant.reporting import comparison
from msquant.reporting.charts import Charts, charts, comparison_charts
from msquant.reporting.collect import collect
from msquant.reporting.comparison import RunComparison, compare_runs
from msquant.reporting.data import Report

if TYPE_CHECKING:
    from jinja2 import Environment

_RANKED = 20
"""Rows of the ranking in a document; the JSON has all."""
_MARKS = {"good": "✓", "check": "!", "bad": "✕"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def html_page(report: Report) -> str:
    """One self-contained page; everything that came from the folder is escaped."""
    drawn = charts(report)
    return _environment(autoescape=True).get_template("report.html.j2").render(_content(report, drawn))


def markdown_page(report: Report) -> str:
    """The same numbers in tables."""
    environment = _environment(autoescape=False)
    return environment.get_template("report.md.j2").render(_content(report, None))


def comparison_page(found: RunComparison, format: "ReportFormat") -> str:
    """Runs side by side, as one page or in tables; everything that came from the folders is escaped."""
    content = {
        "found": found,
        "rows": list(zip(found.labels, found.runs, strict=True)),
        "texts": comparison.texts(found),
        "layers": comparison.layers(found),
        "version": __version__,
    }
    if format == "html":
        drawn = comparison_charts(found.labels, found.runs)
        return _environment(autoescape=True).get_template("comparison.html.j2").render(content, charts=drawn)
    return _environment(autoescape=False).get_template("comparison.md.j2").render(content)


def _environment(*, autoescape: bool) -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("msquant.reporting", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "size": lambda count: decimal(count, precision=1),
        "percent": lambda part: "" if part is None else f"{part:.1%}",
        "fine_percent": lambda part: f"{part:.2%}",
        "small": lambda value: "" if value is None else f"{value:.2e}",
        "digits": lambda value: "" if value is None else f"{value:.4g}",
        "cell": _cell,
        "indented": _indented,
        "schemes": comparison.schemes,
        "worst": comparison.worst,
        "decibels": lambda value: f"{value:.1f} dB",
        "plain": lambda value: "" if value is None else f"{value:g}",
        "shape": lambda shape: " x ".join(map(str, shape)) or "scalar",
    }
    return environment


def _content(report: Report, drawn: Charts | None) -> dict[str, Any]:
    return {
        "report": report,
        "charts": drawn,
        "version": __version__,
        "mark": _MARKS[report.verdict.level],
        "linears": _linears(report),
        "noise": {layer.index: layer for layer in report.evaluation.layers} if report.evaluation else {},
        "ranked": report.ranking.rows[:_RANKED] if report.ranking else (),
        "sampled": sum(found.read for found in report.histograms),
        "weights": sum(found.weights for found in report.histograms),
        "ranged": any(group.before for layer in report.layers for group in layer.groups),
        "spread": [(row, *row.spread) for row in report.experts if row.tokens],
    }


def _linears(report: Report) -> list[str]:
    """Names of the linears that a clip ratio is recorded for."""
    return list(dict.fromkeys(name for layer in report.layers for name in layer.mean_clip_ratio))


def _cell(value: Any) -> str:
    """A text in a Markdown table, where nothing of it is taken for Markdown or HTML."""
    return _MARKDOWN.sub(r"\\\1", html.escape(str(value), quote=False)).replace("\n", " ")


def _indented(text: str) -> str:
    """A code block that no fence within it can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


ReportFormat = Literal["html", "markdown"]
FORMATS: tuple[ReportFormat, ...] = get_args(ReportFormat)
SUFFIXES: dict[ReportFormat, str] = {"html": ".html", "markdown": ".md"}


def report_format(name: str) -> ReportFormat:
    """The format of that name. Raises OutputError if there is none."""
    for known in FORMATS:
        if name == known:
            return known
    raise OutputError(f"there is no format {name!r}", where="--format", remedy=choices(name, FORMATS))


def default_output(folder: Path, format: ReportFormat = "html", what: str = "report") -> Path:
    """Beside the folder, not in it: every file of a checkpoint belongs to its contract."""
    resolved = folder.resolve()
    return resolved.with_name(f"{resolved.name}-{what}{SUFFIXES[format]}")


def write_report(
    folder: Path,
    output: Path | None = None,
    *,
    format: ReportFormat = "html",
    overwrite: bool = False,
    sensitivity: Path | None = None,
    frontier: Path | None = None,
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
        frontier: likewise.
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
    report = collect(
        folder, sensitivity=sensitivity, frontier=frontier, check=check, stage=stage, progress=progress
    )
    stage("drawing charts" if format == "html" else "writing tables")
    write_text(target, html_page(report) if format == "html" else markdown_page(report))
    return target, report


def write_comparison(
    folders: Sequence[Path],
    output: Path | None = None,
    *,
    format: ReportFormat = "html",
    overwrite: bool = False,
    check: bool = True,
    stage: Callable[[str], None] = lambda text: None,
) -> tuple[Path, RunComparison]:
    """Write several runs side by side into one file that needs nothing else.

    Args:
        folders: as for `compare_runs`.
        output: the file; None is `FIRST-comparison.html` beside the first folder.
        format: as for `write_report`.
        overwrite: likewise.
        check: as for `compare_runs`.
        stage: likewise.

    Returns:
        The file, and what it says.

    Raises:
        RecipeError: as `compare_runs`.
        CheckpointError: likewise.
        OutputError: the file exists, or cannot be written.
    """
    target = output
    if target is None and folders:
        target = default_output(folders[0], format, "comparison")
    if target is not None:
        _check_target(target, overwrite=overwrite)
    found = compare_runs(folders, check=check, stage=stage)
    assert target is not None
    write_text(target, comparison_page(found, format))
    return target, found


def _check_target(target: Path, *, overwrite: bool) -> None:
    if target.is_dir():
        raise OutputError("is a folder", where=target, remedy="give a file name")
    if target.exists() and not overwrite:
        raise OutputError("exists already", where=target, remedy="give another --output, or --overwrite")
    if not target.parent.is_dir():
        raise OutputError(
            "cannot be written: there is no such folder", where=target, remedy="make the folder first"
        )
