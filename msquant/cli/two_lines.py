"""Two lines at the foot of a terminal that say how far a long command is."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from msquant.cli import console
from msquant.cli.console import plain_line

_WIDEST_BAR, _NARROWEST_BAR = 24, 6


@dataclass(frozen=True)
class State:
    """What the two lines say.

    Attributes:
        title: begins the first line.
        share: of the bar behind it, 0 to 1.
        rest: ends the first line.
        detail: the second line.
    """

    title: str
    share: float
    rest: str
    detail: str


class TwoLines:
    """Shows a state on stderr several times a second, on a terminal alone, and takes it away at the end.

    Args:
        state: what is shown, asked for each time; None shows nothing.
    """

    def __init__(self, state: Callable[[], State | None]) -> None:
        self._state = state
        self._live: Live | None = None

    def start(self) -> None:
        """Show it."""
        if console.stderr.is_terminal and self._live is None:
            self._live = Live(console=console.stderr, transient=True, get_renderable=self._render)
            self._live.start()

    def stop(self) -> None:
        """Take it away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _render(self) -> RenderableType:
        state = self._state()
        return Text() if state is None else lines(state, console.stderr.width)


def lines(state: State, width: int) -> RenderableType:
    """The two lines of a state for a terminal of so many columns; neither wraps, and no word is cut."""
    rest = fit(plain_line(state.rest), width)
    title = fit(plain_line(state.title), width - cell_len(rest) - 1)
    row: list[RenderableType] = [Text(title, "bold")]
    room = width - cell_len(title) - cell_len(rest) - 2
    if room >= _NARROWEST_BAR:
        row.append(ProgressBar(1.0, state.share, width=min(room, _WIDEST_BAR)))
    row.append(Text(rest))
    first = Table.grid(padding=(0, 1, 0, 0))
    for _ in row:
        first.add_column(no_wrap=True)
    first.add_row(*row)
    return Group(first, Text(fit(plain_line(state.detail), width), "dim", no_wrap=True))


def fit(text: str, width: int) -> str:
    """As many whole words of a line as fit into so many columns, with `…` for those that do not."""
    if cell_len(text) <= width:
        return text
    words = text.split(" ")
    while words and cell_len(" ".join([*words, "…"])) > width:
        words.pop()
    return " ".join([*words, "…"])
