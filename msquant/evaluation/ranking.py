"""The order of what quantization costs, for every place that shows one: by the noise that each part adds.

Noise is `mean of |quantized - y|^2 / |y|^2` over tokens, with y the residual stream that the part puts out in
floating point and with the inputs that floating point gives it. The layers after it read that stream through
norms which divide it by its size, so this is what they see of the part; an error relative to what a layer
adds makes a layer that adds much look harmless.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

_MOST_DECIBELS = 300.0
"""Beyond what float32 can tell apart, and within what float64 can hold."""


@dataclass(frozen=True)
class Ranked(Generic[K]):
    """A part of a model among all of it.

    Attributes:
        key: which part.
        noise: that it adds of its own.
        share: of the sum of all noise, 0 to 1.
    """

    key: K
    noise: float
    share: float


def rank(noise: Mapping[K, float | None]) -> list[Ranked[K]]:
    """Order the parts of a model, the one that adds most noise of its own first.

    Args:
        noise: of each part; None where it is not known.

    Returns:
        Those whose noise is known. Equal ones keep their order.
    """
    known = {key: value for key, value in noise.items() if value is not None}
    total = math.fsum(known.values())
    ordered = sorted(known.items(), key=lambda item: -item[1])
    return [Ranked(key, value, value / total if total else 0.0) for key, value in ordered]


def rank_layers(own_snr: Mapping[K, float | None]) -> list[Ranked[K]]:
    """As `rank`, by each part's own signal-to-noise in dB, as `LayerScore.own_snr`: None is no noise."""
    return rank({key: noise_of(snr) for key, snr in own_snr.items()})


def listed(own_snr: Mapping[K, float | None], ranked: Sequence[Ranked[K]]) -> str:
    """Layers of `rank_layers` for people, each with its own signal-to-noise: `11 (23.3 dB), 0 (25.3 dB)`."""
    return ", ".join(f"{layer.key} ({own_snr[layer.key]:.1f} dB)" for layer in ranked)


def noise_of(snr: float | None) -> float | None:
    """The noise at a signal-to-noise ratio in dB: `10^(-snr / 10)`; None without one."""
    if snr is None:
        return None
    bounded: float = max(-_MOST_DECIBELS, min(snr, _MOST_DECIBELS))
    return float(10 ** (-bounded / 10))
