"""What the pass over one decoder layer found out, for progress, the manifest and the tests."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from msquant.schemes import Scheme


@dataclass(frozen=True)
class ChannelRanges:
    """The channels' greatest magnitudes over the calibration tokens, to four digits.

    Attributes:
        median: half of the channels stay below it.
        p99: 99 of 100 do.
        largest: of all.
    """

    median: float
    p99: float
    largest: float


@dataclass(frozen=True)
class GroupReport:
    """What was chosen for one smooth group.

    Attributes:
        name: the group's name in its family.
        alpha: the chosen migration strength.
        loss: mean squared error of the decoder layer's output with only this group quantized; for osl
            the group's own relative error, see `held_out.py`; None where nothing is searched.
        range_floor: quantile of the floor under the channels' ranges, for osl.
        before: what the group's linears read, unsmoothed.
        after: the same divided by the smooth scale.
    """

    name: str
    alpha: float
    loss: float | None = None
    range_floor: float | None = None
    before: ChannelRanges | None = None
    after: ChannelRanges | None = None


@dataclass(frozen=True)
class CacheReport:
    """What was chosen for the scales of a layer's cached keys or values.

    Attributes:
        name: `keys` or `values`; `latent` for what both are made of.
        range_floor: quantile of the floor under the channels' ranges; 0 is no floor.
        factor: what all ranges are multiplied by.
        loss: mean squared error of what attention adds, relative to the residual stream, on held-out samples.
        alpha: of what makes the latent's channels alike; None where each has a scale of its own.
    """

    name: str
    range_floor: float
    factor: float
    loss: float
    alpha: float | None = None


@dataclass
class LayerReport:
    """The pass over one decoder layer.

    Attributes:
        name: the layer's full name, for example `model.layers.0`.
        groups: one entry a smooth group, in order of computation.
        clip_ratios: linear name to the ratio chosen for every output channel, float32 `[N]`.
        expert_tokens: calibration tokens that each routed expert got; empty where there are none.
        lent_tokens: further tokens that each of them was given to be calibrated, where it got too few.
        cache: what was chosen for keys and for values; empty where their cache is in floating point.
        error: squared error of the quantized layer's output, relative to the square of what the layer adds to
            its input, over the first calibration samples.
    """

    name: str
    groups: list[GroupReport] = field(default_factory=list)
    clip_ratios: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    expert_tokens: list[int] = field(default_factory=list)
    lent_tokens: list[int] = field(default_factory=list)
    cache: list[CacheReport] = field(default_factory=list)
    error: float = float("nan")


@dataclass(frozen=True)
class GroupError:
    """What quantizing one group of linears costs; they run as one or must be alike.

    Attributes:
        layer: number of the decoder layer.
        group: the group's name in its family, or `feed_forward`.
        linears: full names of those that the policy quantizes.
        scheme: the policy's, of the first of them.
        error: mean relative squared error of the layer's output, see `sensitivity.py`.
        dynamic_error: the same with a scale per token; None where that was not asked for or is the scheme.
    """

    layer: int
    group: str
    linears: tuple[str, ...]
    scheme: Scheme
    error: float
    dynamic_error: float | None = None


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
