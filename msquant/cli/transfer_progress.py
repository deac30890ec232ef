"""A download or an upload as a person sees it: bytes, files, speed and the time left, on stderr."""

import time
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from msquant.cli import console

if TYPE_CHECKING:
    from msquant.hub.transfer_events import TransferState

_LINE_SECONDS = 10.0


class TransferProgress:
    """A bar on a terminal; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console.stderr,
            transient=True,
            disable=not console.stderr.is_terminal,
        )
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Say what begins, or what a person should know."""
        console.print_note(text)

    def update(self, state: "TransferState") -> None:
        """Show where it is."""
        if self._task is None:
            self._task = self._progress.add_task("", total=None, text="")
        self._progress.update(
            self._task,
            description=state.verb,
            total=max(1, state.total_bytes),
            completed=state.done_bytes,
            text=describe(state),
        )
        if not console.stderr.is_terminal and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            console.stderr.print(f"{state.verb} {describe(state)}", markup=False)


def describe(state: "TransferState") -> str:
    """One line: `12.3 GB of 688.6 GB, 4 of 163 files, 115.2 MB/s, 1 h 38 min left`."""
    parts = [
        f"{console.as_bytes(state.done_bytes)} of {console.as_bytes(state.total_bytes)}",
        f"{state.done_files} of {state.total_files} files",
    ]
    if state.bytes_per_second is not None:
        parts.append(f"{console.as_bytes(int(state.bytes_per_second))}/s")
    if state.seconds_left is not None:
        parts.append(f"{console.as_duration(state.seconds_left)} left")
    return ", ".join(parts)
