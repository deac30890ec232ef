"""Progress over decoder layers, apart from the console: commands load it when they need it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from msquant.cli import console
from msquant.cli.console import plain_line
from msquant.progress import Progress as FlowProgress


class _TimeLeft(TimeRemainingColumn):
    """What the flow said it will still take; where it says nothing, what is left of the bar."""

    def render(self, task: Task) -> Text:
        until = task.fields["until"]
        return (
            super().render(task)
            if until is None
            else Text(console.as_duration(max(0, until - time.monotonic())))
        )


class LayerProgress:
    """Progress over decoder layers on stderr: a bar with ETA on a terminal, a line a layer elsewhere.

    Args:
        unit: what is counted, where that is something else.
        most_lines: where there is no bar, so many lines at most; None writes one for each.
    """

    def __init__(self, unit: str = "decoder layer", most_lines: int | None = None) -> None:
        self._unit, self._most_lines = unit, most_lines
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            _TimeLeft(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console.stderr,
            transient=True,
            disable=not console.stderr.is_terminal,
        )
        self._task: TaskID | None = None
        self._count = self._done = 0
        self._started = time.monotonic()
        self._until: float | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to another display meanwhile."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()

    def flow(self, note: Callable[[dict[str, Any]], str]) -> FlowProgress:
        """Callbacks of a flow over decoder layers that show here; `note` makes a line of a record."""
        return FlowProgress(
            stage=self.stage,
            layers=self.start,
            layer=lambda record: self.advance(record["index"], note(record)),
            step=self.step,
            left=self.left,
        )

    def stage(self, text: str) -> None:
        """Say what begins now."""
        console.print_note(text)

    def start(self, count: int, done: int = 0) -> None:
        """Begin with `count` layers in all, of which `done` are there already."""
        self._count, self._done = count, done
        self._started = time.monotonic()
        if done:
            self.stage(f"continuing after {self._unit} {done}/{count}")
        self._task = self._progress.add_task(
            f"{self._unit}s", total=count, completed=done, note="", until=None
        )

    def left(self, seconds: float) -> None:
        """The flow says that so many are left, of this bar and of all that comes after it."""
        self._until = time.monotonic() + seconds
        if self._task is not None:
            self._progress.update(self._task, until=self._until)

    def step(self, text: str) -> None:
        """Say what goes on within a layer, where there is a bar to say it in."""
        if self._task is not None:
            self._progress.update(self._task, note=text)

    def advance(self, index: int, note: str) -> None:
        """Layer `index` is done; `note` says what came out."""
        if self._task is not None:
            self._progress.update(self._task, advance=1, note=note)
        every = -(-self._count // self._most_lines) if self._most_lines else 1
        if not console.stderr.is_terminal and ((index + 1) % every == 0 or index + 1 == self._count):
            each = (time.monotonic() - self._started) / (index + 1 - self._done)
            left = each * (self._count - index - 1)
            if self._until is not None:
                left = max(0, self._until - time.monotonic())
            parts = (f"{self._unit} {index + 1}/{self._count}", note, f"ETA {left:.0f} s")
            console.stderr.print(plain_line("  ".join(part for part in parts if part)), markup=False)
