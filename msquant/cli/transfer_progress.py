"""A download or an upload as a person sees it: bytes, files, speed and the time left, on stderr."""

import time
from typing import TYPE_CHECKING, Self

from msquant.cli import console
from msquant.cli.two_lines import State, TwoLines

if TYPE_CHECKING:
    from msquant.hub.transfer_events import TransferState

_LINE_SECONDS = 10.0


class TransferProgress:
    """Two lines on a terminal; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self._lines = TwoLines(self._state)
        self._transfer: TransferState | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.stop()

    def stage(self, text: str) -> None:
        """Say what begins, or what a person should know."""
        console.print_note(text)

    def update(self, state: "TransferState") -> None:
        """Show where it is."""
        self._transfer = state
        if not console.stderr.is_terminal and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            console.stderr.print(f"{state.verb} {describe(state)}", markup=False)

    def _state(self) -> State | None:
        if self._transfer is None:
            return None
        size, files, *rest = _parts(self._transfer)
        share = self._transfer.done_bytes / max(1, self._transfer.total_bytes)
        return State(self._transfer.verb, share, ", ".join([size, *rest[1:]]), ", ".join([files, *rest[:1]]))


def describe(state: "TransferState") -> str:
    """One line: `12.3 GB of 688.6 GB, 4 of 163 files, 115.2 MB/s, 1 h 38 min left`."""
    return ", ".join(_parts(state))


def _parts(state: "TransferState") -> list[str]:
    """Bytes and files that are done, and where it can be told, speed and the time left."""
    parts = [
        f"{console.as_bytes(state.done_bytes)} of {console.as_bytes(state.total_bytes)}",
        f"{state.done_files} of {state.total_files} files",
    ]
    if state.bytes_per_second is not None:
        parts.append(f"{console.as_bytes(int(state.bytes_per_second))}/s")
    if state.seconds_left is not None:
        parts.append(f"{console.as_duration(state.seconds_left)} left")
    return parts
