"""How far a download is, how fast, and how long it will take."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_WINDOW_SECONDS = 15.0
# Between two pieces; a longer one is a pause and no slow network.
_PAUSE_SECONDS = 1.0
_STALL_SECONDS = 5.0


@dataclass(frozen=True)
class TransferState:
    """What a person is shown.

    Attributes:
        verb: what is done now: `downloading` or `verifying`.
        done_bytes: never less than before, also when a file has to be fetched again.
        total_bytes: of all files.
        done_files: verified and in their place.
        total_files: of them.
        bytes_per_second: lately; None until it can be told, and while nothing comes for some seconds.
        seconds_left: None likewise.
    """

    verb: str
    done_bytes: int
    total_bytes: int
    done_files: int
    total_files: int
    bytes_per_second: float | None
    seconds_left: float | None


@dataclass(frozen=True)
class HubProgress:
    """Callbacks of a running download or upload, in the caller's thread; each may be left out.

    Attributes:
        stage: called with a line that says what begins, or what a person should know.
        update: called about ten times a second.
    """

    stage: Callable[[str], None] = lambda text: None
    update: Callable[[TransferState], None] = lambda state: None


class Meter:
    """Turns counters, of which one may go back, into a state that does not.

    The speed is that of the bytes that moved while any did, an exponential average over about 15 seconds;
    bytes that are fetched again count for it and not for what is done. So a file that is begun again does not
    make the time left grow, and a pause before another attempt hardly does.

    Args:
        verb: see `TransferState`.
        total_bytes: to be done in all.
        total_files: likewise.
        clock: seconds.
    """

    def __init__(
        self, verb: str, total_bytes: int, total_files: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._verb = verb
        self._total_bytes = total_bytes
        self._total_files = total_files
        self._clock = clock
        self._done = 0
        self._moved = 0
        self._last = clock()
        self._speed = 0.0
        self._weight = 0.0

    def state(self, done: int, files: int, moved: int) -> TransferState:
        """The state now.

        Args:
            done: bytes that are there.
            files: that are finished.
            moved: bytes that were moved since the beginning, those that were lost again included.
        """
        now = self._clock()
        if moved > self._moved and now > self._last:
            seconds = min(now - self._last, _PAUSE_SECONDS)
            # The average of a beginning is not pulled towards nought: its weight is divided out.
            keep = 0.5 ** (seconds / (_WINDOW_SECONDS / 3))
            self._speed = keep * self._speed + (1 - keep) * (moved - self._moved) / seconds
            self._weight = keep * self._weight + (1 - keep)
            self._last, self._moved = now, moved
        self._done = max(self._done, min(done, self._total_bytes))
        moving = self._weight and now - self._last < _STALL_SECONDS
        speed = self._speed / self._weight if moving else None
        left = self._total_bytes - self._done
        return TransferState(
            verb=self._verb,
            done_bytes=self._done,
            total_bytes=self._total_bytes,
            done_files=files,
            total_files=self._total_files,
            bytes_per_second=speed,
            seconds_left=left / speed if speed else None,
        )
