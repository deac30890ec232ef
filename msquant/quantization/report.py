"""What the pass over one decoder layer found out, for progress, the manifest and the tests."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupReport:
    """What was chosen for one smooth group.

    Attributes:
        name: the group's name in its family.
        alpha: the chosen migration strength.
        loss: mean squared error of the decoder layer's output with only this group quantized; for osl-robust
            the group's own relative error, see `held_out.py`; None where nothing is searched.
        range_floor: quantile of the floor under the channels' ranges, for osl-robust.
    """

    name: str
    alpha: float
    loss: float | None = None
    range_floor: float | None = None


@dataclass
class LayerReport:
    """The pass over one decoder layer.

    Attributes:
        name: the layer's full name, for example `model.layers.0`.
        groups: one entry a smooth group, in order of computation.
        clip_ratios: linear name to the ratio chosen for every output channel, float32 `[N]`.
        expert_tokens: calibration tokens that each routed expert got; empty where there are none.
        error: squared error of the quantized layer's output, relative to the square of what the layer adds to
            its input, over the first batch of calibration tokens.
    """

    name: str
    groups: list[GroupReport] = field(default_factory=list)
    clip_ratios: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)
    error: float = float("nan")


def relative_error(
    before: NDArray[np.float32], after: NDArray[np.float32], quantized: NDArray[np.float32]
) -> float:
    """Squared error of a quantized layer's output, relative to the square of what the layer adds.

    Args:
        before: the layer's input, any shape.
        after: its output in floating point, of the same shape.
        quantized: its output in int8.
    """
    wrong, added = quantized - after, after - before
    square = float(np.vdot(added, added))
    return float(np.vdot(wrong, wrong)) / square if square else 0.0
