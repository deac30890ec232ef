"""Progress over decoder layers, apart from the console: commands load it when they need it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from msquant.cli import console
from msquant.cli.console import plain_line
from msquant.cli.two_lines import State, TwoLines
from msquant.progress import Phase, Progress

_PHASES: dict[Phase, str] = {
    "start": "calibration",
    "ends": "embeddings and output head",
    "layers": "decoder layers",
    "evaluation": "evaluation",
    "formats": "further formats",
}


class LayerProgress:
    """Progress over decoder layers on stderr: two lines on a terminal, elsewhere a line for each layer.

    The first line has the phase of the whole run and the time to the very end of it; the second the decoder
    layer, what goes on in it, and what came out of the last one. Layers are numbered from 0.

    Args:
        unit: what is counted, where that is something else.
        most_lines: where there is no terminal, so many lines at most; None writes one for each.
    """

    def __init__(self, unit: str = "decoder layer", most_lines: int | None = None) -> None:
        self._unit, self._most_lines = unit, most_lines
        self._lines = TwoLines(self._state)
        self._phases: Sequence[Phase] = ()
        self._phase: Phase | None = None
        self._count = self._done = self._before = 0
        self._step = self._note = ""
        self._numbered = False
        self._run_started = self._started = time.monotonic()
        self._until: float | None = None

    def __enter__(self) -> Self:
        self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to another display meanwhile."""
        self._lines.stop()
        try:
            yield
        finally:
            self._lines.start()

    def flow(self, note: Callable[[dict[str, Any]], str], *, in_order: bool = True) -> Progress:
        """Callbacks of a flow over decoder layers that show here.

        Args:
            note: makes a line of a record.
            in_order: one layer after the other, so that the next one is known.
        """
        self._numbered = in_order
        return Progress(
            stage=self.stage,
            phases=self.phases,
            phase=self.phase,
            layers=self.start,
            layer=lambda record: self.advance(f"layer {record['index']}: {note(record)}"),
            step=self.step,
            left=self.left,
        )

    def stage(self, text: str) -> None:
        """Say what begins now."""
        console.print_note(text)

    def phases(self, names: Sequence[Phase]) -> None:
        """The run will have these phases."""
        self._phases = names

    def phase(self, name: Phase) -> None:
        """A phase of the run begins."""
        self._phase = name
        self._step = self._note = ""

    def start(self, count: int, done: int = 0) -> None:
        """Begin with `count` layers in all, of which `done` are there already."""
        self._count, self._done, self._before = count, done, done
        self._step = self._note = ""
        self._started = time.monotonic()
        if done:
            self.stage(f"continuing: {done} of {count} {self._unit}s are done")

    def left(self, seconds: float) -> None:
        """The flow says that so many are left, of these layers and of all that comes after them."""
        self._until = time.monotonic() + seconds

    def step(self, text: str) -> None:
        """Say what goes on within a layer, on a terminal alone."""
        self._step = text

    def advance(self, note: str) -> None:
        """A layer is done; `note` says what came out."""
        self._done, self._step, self._note = self._done + 1, "", note
        every = -(-self._count // self._most_lines) if self._most_lines else 1
        if not console.stderr.is_terminal and (self._done % every == 0 or self._done == self._count):
            parts = (f"{self._done} of {self._count} {self._unit}s", note, self._eta())
            console.stderr.print(plain_line("  ".join(part for part in parts if part)), markup=False)

    def _seconds_left(self) -> float | None:
        now = time.monotonic()
        if self._until is not None:
            return max(0.0, self._until - now)
        if self._done == self._before:
            return None
        return (now - self._started) / (self._done - self._before) * (self._count - self._done)

    def _eta(self) -> str:
        left = self._seconds_left()
        return "" if left is None else f"ETA {console.as_duration(left)}"

    def _state(self) -> State | None:
        if not self._count and self._phase is None:
            return None
        gone, left = time.monotonic() - self._run_started, self._seconds_left()
        counted = f"{self._done} of {self._count} {self._unit}s"
        title, in_layers = counted, True
        if self._phase is not None:
            place = f"phase {self._phases.index(self._phase) + 1} of {len(self._phases)}"
            in_layers = self._phase == "layers"
            title = f"{place}, {counted if in_layers and self._count else _PHASES[self._phase]}"
        share = 0.0 if left is None else gone / max(1e-9, gone + left)
        rest = [f"{console.as_duration(gone)} gone", self._eta()]
        doing = [self._step]
        if self._numbered and in_layers and self._done < self._count:
            doing.insert(0, f"layer {self._done}")
        detail = [": ".join(filter(None, doing)), self._note]
        return State(title, share, ", ".join(filter(None, rest)), "; ".join(filter(None, detail)))
