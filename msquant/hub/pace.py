"""Reads the body of an answer, and ends it when its sender is too slow to ever come to an end."""

import time
from collections.abc import Callable
from typing import Any

from msquant.hub.retry import Limits, Transient

# So long a piece is waited for to become whole; then what has come of it is used.
_PIECE_SECONDS = 0.5


class Pace:
    """The rate of one answer, over windows of time; time in which nobody reads does not count.

    Args:
        limits: the least rate and the window.
        clock: seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._bytes, self._seconds = 0, 0.0
        self._error: Exception | None = None

    def read(self, raw: Any, size: int) -> bytes:
        """At most `size` bytes as they were sent; empty at the end.

        Args:
            raw: urllib3's response.
            size: at least 1.

        Raises:
            Transient: over the last window less came than the least rate.
            Exception: what urllib3 raises. In both cases all that came was returned before.
        """
        if self._error is not None:
            raise self._error
        if self._seconds >= self._limits.rate_seconds:
            if self._bytes < self._limits.least_rate * self._seconds:
                raise Transient(
                    f"{self._bytes / self._seconds:.0f} bytes a second came over {self._seconds:.0f} s, "
                    f"the least is {self._limits.least_rate:g}",
                    slow=True,
                )
            self._bytes, self._seconds = 0, 0.0
        pieces: list[bytes] = []
        begun = before = self._clock()
        while size and before - begun < _PIECE_SECONDS:
            try:
                piece: bytes = raw.read1(size, decode_content=False)
            except Exception as error:
                if not pieces:
                    raise
                self._error = error
                break
            now = self._clock()
            self._bytes, self._seconds = self._bytes + len(piece), self._seconds + now - before
            if not piece:
                break
            pieces.append(piece)
            size, before = size - len(piece), now
        return b"".join(pieces)
