"""The one place that writes to the terminal: results to stdout, progress and errors to stderr.

All text passes a filter on its way there: whoever wrote it, it can only be read. Names of tensors, files and
architectures, manifests, recipes, and what a model says are written by others. A terminal would obey the
control sequences in them: move the cursor, clear what stands there, set its title. Characters that turn the
direction of writing let one text look like another.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.filesize import decimal
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from msquant.errors import MsquantError, RecipeError

if TYPE_CHECKING:
    from msquant.inference.serving_need import ServingNeed

# Control characters but tab and line break, direction marks, other line breaks, halves of characters.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_OBEYED_IN_A_LINE = re.compile(f"{_OBEYED.pattern}|[\t\n]")


def plain(text: str) -> str:
    """A text in which what a terminal would obey is written as Python writes it: `\\x1b`, `\\u202e`."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def plain_line(text: str) -> str:
    """As `plain`, and in one line, so that no part of it passes for a line of its own."""
    return _OBEYED_IN_A_LINE.sub(lambda found: ascii(found[0])[1:-1], text)


def plain_json(document: str) -> str:
    """A JSON document that says the same without what a terminal would obey."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", document)


class PlainConsole(Console):
    """A console that lets no control character through but its own."""

    def __init__(self, **options: Any) -> None:
        # Without `emoji`, `:x:` within a name would become a picture.
        super().__init__(soft_wrap=True, highlight=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does it, filtered: what is printed, tables, bars and lines of state all come by here."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text), style, control)


stdout = PlainConsole()
stderr = PlainConsole(stderr=True)


class LogLines(logging.Handler):
    """Writes every record of a log as one plain line with its time to stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; see `logging.Handler.emit`."""
        stderr.print(plain_line(self.format(record)), markup=False)


def print_json(value: Any) -> None:
    """Write one JSON document to stdout, undecorated, for scripts."""
    sys.stdout.write(plain_json(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")
    sys.stdout.flush()


def print_json_line(value: Any) -> None:
    """Write one JSON document to stdout in a single line, for scripts that read while the command goes on."""
    sys.stdout.write(plain_json(json.dumps(value, ensure_ascii=False)) + "\n")
    sys.stdout.flush()


def print_line(text: str) -> None:
    """Write one plain line to stdout; nothing in it is taken for markup, or for the end of the line."""
    _print_prose(stdout, Text(plain_line(text)))


def print_next(command: str) -> None:
    """Write the command to go on with to stdout, in one line whatever the terminal's width, to copy it."""
    stdout.print(plain_line(f"Next: {command}"), markup=False)


def print_document(text: str) -> None:
    """Write a text of several lines to stdout, such as a recipe."""
    stdout.print(text, markup=False)


def print_text(text: str) -> None:
    """Write a piece of a model's text to stdout at once, without a line end of its own.

    A terminal gets it filtered, because a model may have learned to move its cursor; a file, as it is.
    """
    sys.stdout.write(plain(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_note(text: str) -> None:
    """Write a remark to stderr, in one line."""
    _print_prose(stderr, Text(plain_line(text), "dim"))


def _print_prose(on: Console, text: str | Text) -> None:
    """Write a sentence: broken between words on a terminal, in one line elsewhere, to search in."""
    on.print(text, soft_wrap=not on.is_terminal)


def print_speed(tokens: int, seconds: float) -> None:
    """Write to stderr how fast tokens came."""
    print_note(f"{tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s")


def is_conversation() -> bool:
    """Whether somebody sits at a terminal, to type and to read."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask(prompt: str) -> str | None:
    """Let somebody type a line; None at the end of input. Ctrl-C drops what was typed."""
    import readline  # noqa: F401  # gives `input` its editing and its history

    while True:
        try:
            return input(prompt)
        except EOFError:
            print_text("\n")
            return None
        except KeyboardInterrupt:
            print_text("\n")


def confirm(question: str) -> bool:
    """Ask on stderr for a yes or a no, which is what anything but a yes counts as."""
    stderr.print(Text(f"{plain_line(question)} [y/N] "), end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def print_table(
    title: str,
    columns: list[str],
    rows: list[list[Any]],
    *,
    caption: str | None = None,
    spare: Sequence[str] = (),
    unbroken: Sequence[str] = (),
) -> None:
    """Write a table to stdout; numbers are right-aligned.

    Args:
        title: above it.
        columns: their headings.
        rows: the cells.
        caption: below it.
        spare: headings of columns that are left out, the first one first, before others are cut.
        unbroken: headings of columns whose cells stay on one line: what is in them is copied.
    """
    from rich.cells import cell_len
    from rich.table import Table

    for heading in spare:
        widths = [max(cell_len(str(line[i])) for line in [columns, *rows]) for i in range(len(columns))]
        # A column has a space on both sides and a border.
        if sum(widths) + 3 * len(widths) + 1 <= stdout.width or heading not in columns:
            continue
        place = columns.index(heading)
        columns, *rows = [[*line[:place], *line[place + 1 :]] for line in [columns, *rows]]
    table = Table(show_header=any(columns))
    for i, column in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) for row in rows)
        justify: Literal["right", "left"] = "right" if rows and numeric else "left"
        # What fits nowhere goes on in the next line: a name or a number that is cut is of no use.
        table.add_column(
            Text(plain_line(column)), justify=justify, overflow="fold", no_wrap=column in unbroken
        )
    for row in rows:
        table.add_row(*(Text(plain_line(str(cell))) for cell in row))
    _print_prose(stdout, Text(plain_line(title), "table.title"))
    stdout.print(table)
    if caption is not None:
        _print_prose(stdout, Text(plain_line(caption), "table.caption"))


def print_error(error: MsquantError, *, as_json: bool = False) -> None:
    """Write an error with its place and remedy: to stderr for people, to stdout as JSON for scripts."""
    notes = getattr(error, "__notes__", [])
    if as_json:
        details = {"what": error.what, "where": error.where, "remedy": error.remedy, "notes": notes}
        print_json({"error": details})
        return
    place = f"{foreign(error.where)}: " if error.where else ""
    _print_prose(stderr, f"[bold red]error:[/bold red] {place}{escape(_indented(error.what))}")
    if error.remedy:
        _print_prose(stderr, f"  [bold]try:[/bold] {escape(_indented(error.remedy))}")
    _print_notes(notes)


def print_traceback(error: BaseException) -> None:
    """Write to stderr where an error came from."""
    stderr.print("".join(traceback.format_exception(error)), markup=False)


def print_interrupted(error: KeyboardInterrupt) -> None:
    """Write that Ctrl-C ended the command, and what its notes say about that."""
    stderr.print("interrupted")
    _print_notes(getattr(error, "__notes__", []))


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        _print_prose(stderr, f"  [bold]note:[/bold] {escape(_indented(note))}")


def print_warning(text: str, *, severe: bool = False) -> None:
    """Write a warning to stderr, all of it in red if it is severe."""
    if severe:
        _print_prose(stderr, f"[bold red]warning:[/bold red] [red]{escape(_indented(text))}[/red]")
    else:
        _print_prose(stderr, f"[bold yellow]warning:[/bold yellow] {escape(_indented(text))}")


def foreign(text: str) -> str:
    """A text for within rich's markup: in one line, and nothing in it is markup."""
    return escape(plain_line(text))


def _indented(text: str) -> str:
    # No part of a text begins a line, where it could pass for one of ours.
    return plain(text).replace("\n", "\n    ")


class Working:
    """A line on stderr that says what goes on, on a terminal alone."""

    def __init__(self, text: str) -> None:
        from rich.status import Status

        self._status = Status(Text(text), console=stderr)

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def update(self, text: str) -> None:
        """Say something else."""
        self._status.update(Text(text))

    def stop(self) -> None:
        """Take the line away before its time."""
        self._status.stop()


def parse_bytes(text: str, option: str) -> int:
    """A number of bytes as people write it, `4GB` or `512MiB`. Raises RecipeError if it is none."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        count = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise RecipeError(
            f"{text!r} is not a size", where=option, remedy="write it as 4GB or 512MiB"
        ) from error
    if count <= 0:
        raise RecipeError(f"{text!r} is not a positive size", where=option, remedy="write it as 4GB")
    return count


def as_bytes(count: int) -> str:
    """A number of bytes for people, in decimal units: `269.1 MB`."""
    return decimal(count, precision=1)


def as_serving(need: "ServingNeed | None") -> str:
    """On how many NPUs a folder can be served, for people."""
    if need is None:
        return "more NPUs than its heads can be shared out on"
    weights, cache = as_bytes(need.weight_bytes), as_bytes(need.cache_bytes)
    npus = "1 NPU" if need.npus == 1 else f"{need.npus} NPUs"
    token = f"{need.token_bytes / 1000:,.1f} kB a token"
    if need.token_bytes != need.float_token_bytes:
        token += f" instead of {need.float_token_bytes / 1000:,.1f}"
    return (
        f"{npus} of {need.npu_bytes >> 30} GiB by size: {weights} of weights on each, {cache} for a cache of "
        f"{need.cache_tokens:,} tokens, {token}"
    )


def as_duration(seconds: float) -> str:
    """A time for people: `95 s`, `12 min`, `5 h 12 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
