"""The filter that all text passes on its way to the terminal: whoever wrote it, it can only be read.

Names of tensors, files and architectures, manifests, recipes, and what a model says are written by others. A
terminal would obey the control sequences in them: move the cursor, clear what stands there, set its title.
Characters that turn the direction of writing let one text look like another.
"""

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

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
