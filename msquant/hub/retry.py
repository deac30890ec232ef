"""What is worth another attempt, how many there are, and how long to wait in between."""

import email.utils
import math
import os
import time
from dataclasses import dataclass

from msquant.errors import HubError

WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}
"""The HTTP status codes that may pass."""

RATE_VARIABLE = "MSQUANT_MIN_RATE"
"""Bytes a second: a connection that brings less is given up; 0 lifts the limit."""


@dataclass(frozen=True)
class Limits:
    """How patient a download is.

    Attributes:
        connect_seconds: for a connection to be made.
        read_seconds: between two pieces of an answer.
        first_attempts: to reach the hub at all, before anything came from it.
        attempts: in a row without one byte of progress, later.
        backoff_seconds: before the second attempt; doubled for each further one.
        max_backoff_seconds: the longest pause of our own.
        max_retry_after_seconds: the longest pause that a hub may ask for.
        corrupt_attempts: how often a file whose hash is wrong is fetched.
        least_rate: bytes a second; an answer that brings less is ended, and asked for again.
        rate_seconds: over so long.
        slow_attempts: how often one thing may come too slowly.
    """

    connect_seconds: float = 10
    read_seconds: float = 30
    first_attempts: int = 2
    attempts: int = 10
    backoff_seconds: float = 0.5
    max_backoff_seconds: float = 60
    max_retry_after_seconds: float = 600
    corrupt_attempts: int = 3
    least_rate: float = 1000
    rate_seconds: float = 30
    slow_attempts: int = 3

    @classmethod
    def of_environment(cls) -> "Limits":
        """The usual ones, with the least rate that the environment names.

        Raises:
            HubError: it names something else than a number of bytes.
        """
        text = os.environ.get(RATE_VARIABLE, "").strip()
        if not text:
            return cls()
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise HubError(
                f"{text[:40]!r} is not a number of bytes a second",
                where=RATE_VARIABLE,
                remedy="use 1000, or 0",
            )
        return cls(least_rate=int(text))

    @property
    def progress_bytes(self) -> float:
        """So many bytes between two failures are progress: what the least rate brings in its time."""
        return max(1, self.least_rate * self.rate_seconds)

    def backoff(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        return min(self.max_backoff_seconds, self.backoff_seconds * 2 ** (failures - 1))


class Transient(Exception):  # noqa: N818 - it is answered by another attempt
    """A request failed in a way that may pass.

    Attributes:
        wait: seconds that the hub asks to wait, or None.
        reached: whether anything answered.
        slow: whether it answered too slowly.
    """

    def __init__(
        self, reason: str, wait: float | None = None, *, reached: bool = True, slow: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait = wait
        self.reached = reached
        self.slow = slow


class WrongFile(Exception):  # noqa: N818 - it is answered by fetching the file again
    """What the hub sends is not the file that it lists."""


class UnreachableError(HubError):
    """The hub does not answer, or nothing does."""


class Stopped(Exception):  # noqa: N818 - it is how a worker ends
    """Everything was told to stop."""


def reason_of(error: BaseException) -> str:
    """Why a connection failed, in a few words; the libraries' own texts hold whole addresses."""
    text = str(error)
    for pattern, reason in (
        ("resolve", "its name cannot be resolved"),
        ("Name or service", "its name cannot be resolved"),
        ("refused", "the connection was refused"),
        ("timed out", "timed out"),
        ("ProxyError", "the proxy failed"),
        ("reset", "the connection was reset"),
        ("unreachable", "the network is unreachable"),
    ):
        if pattern in text:
            return reason
    return f"the connection was lost ({type(error).__name__})"


def retry_after(value: str | None) -> float | None:
    """Seconds to wait: the header gives them, or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    # Beyond a wrong form: a date that no clock has, and fields that are missing.
    except (TypeError, ValueError, OverflowError, OSError, IndexError):
        return None
