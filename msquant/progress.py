"""What a flow over decoder layers tells whoever started it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal[
    "start", "ends", "evaluation sample", "attention", "layer", "evaluated layer", "head", "export"
]
"""A part of a quantization: what needs no layer; the two ends written; a decoder layer of the float model
computed as the evaluation will do; the attention block of a decoder layer, where the feed-forward block comes
apart; the rest of a layer, or all of it; a layer evaluated; the predictions compared; a further format."""

Phase = Literal["start", "layers", "ends", "evaluation", "formats"]
"""A phase of a whole quantization: what needs no layer, the calibration text above all; the decoder layers;
the two ends of the model; the comparison of the result with the float model; further formats."""


@dataclass(frozen=True)
class Progress:
    """Callbacks of a running flow; each may be left out.

    Attributes:
        stage: called with a line that says what begins.
        phases: called with the phases that the whole run will have, in their order.
        phase: called when one of them begins.
        layers: called with the number of decoder layers and how many an earlier run has finished.
        layer: called with a decoder layer's record when it is done, for good where the flow can be continued.
        step: called with what goes on within a layer.
        lap: called when a part of the flow is done, with what it was.
        left: called with the seconds that the flow will take until its very end, as far as it can tell.
    """

    stage: Callable[[str], None] = lambda text: None
    phases: Callable[[Sequence[Phase]], None] = lambda names: None
    phase: Callable[[Phase], None] = lambda name: None
    layers: Callable[[int, int], None] = lambda count, done: None
    layer: Callable[[dict[str, Any]], None] = lambda record: None
    step: Callable[[str], None] = lambda text: None
    lap: Callable[[Part], None] = lambda part: None
    left: Callable[[float], None] = lambda seconds: None
