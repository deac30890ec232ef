"""Ends a growing text before a stop string, and never shows a part of one."""

from collections.abc import Sequence


class StopStrings:
    """Passes a text through piece by piece until one of the stop strings is complete in it.

    Where a stop string is cut into pieces does not matter: the one that is complete first ends the text, of
    those that are complete at the same character the longest. The end of the text that may be the start of a
    stop string is held back.

    Args:
        stop: the strings, none of them empty; without any, every piece passes at once.

    Attributes:
        reached: a stop string was found; nothing comes after it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.reached = False

    def add(self, piece: str) -> str:
        """Take the next piece and return the text that is certain now and was not before."""
        if self.reached:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.reached = True
            self._held = ""
            return text[: min(found)[1]]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
