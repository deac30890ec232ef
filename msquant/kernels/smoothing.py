"""Smooth scales of feed-forward blocks, whose linears are quantized per token and not searched.

The scale is SmoothQuant's (arXiv 2211.10438, equation 4) in golden-stick's form
(`ptq/algo_modules/mindone/anti_outliers.py`, `_calculate_smooth_scale`).
"""

import numpy as np
from numpy.typing import NDArray

SMALLEST = 1e-5


def smooth_scale(
    inputs: NDArray[np.float32], weights: NDArray[np.float32], alpha: float
) -> NDArray[np.float32]:
    """`max(1e-5, a^alpha / w^(1 - alpha))`, and 1 where either is 0.

    Args:
        inputs: a, the greatest magnitude of each input channel, float32 `[K]`.
        weights: w, the greatest magnitude of each weight column, float32 `[K]`.
        alpha: migration strength; 0 leaves outliers to the activations, 1 to the weights.
    """
    usable = (inputs > 0) & (weights > 0)
    a, w = np.where(usable, inputs, 1), np.where(usable, weights, 1)
    scale = np.maximum(np.power(a, np.float32(alpha)) / np.power(w, np.float32(1 - alpha)), SMALLEST)
    return np.where(usable, scale, 1).astype(np.float32)


def power_of_two(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest powers of two: to multiply by them changes no digit of a floating-point weight."""
    return np.exp2(np.rint(np.log2(scale))).astype(np.float32)
