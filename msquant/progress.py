"""What a flow over decoder layers tells whoever started it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Callbacks of a running flow; each may be left out.

    Attributes:
        stage: called with a line that says what begins.
        layers: called with the number of decoder layers and how many an earlier run has finished.
        layer: called with a decoder layer's record when it is done, for good where the flow can be continued.
        step: called with what goes on within a layer.
    """

    stage: Callable[[str], None] = lambda text: None
    layers: Callable[[int, int], None] = lambda count, done: None
    layer: Callable[[dict[str, Any]], None] = lambda record: None
    step: Callable[[str], None] = lambda text: None
