"""golden-stick's int8 quantizer, for the search: quantize and dequantize in one go.

The arithmetic is that of golden-stick 1.4.1, `ptq/basic_functions/basic_quant_func.py`: parameters in float64
rounded once to float32, round half to even, int8 in [-128, 127].
"""

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import INT8_MAX, INT8_MIN

STEPS = INT8_MAX - INT8_MIN

Floats = NDArray[np.float32]


def activation_parameters(low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Asymmetric scale and zero point of a range.

    Args:
        low: float32, any shape: the least value of each range; it need not include 0.
        high: of the same shape: the greatest.

    Returns:
        Scale `(high - low) / 255` and zero point `round(-128 - low / scale)`, float32 of the same shape;
        where a range is a single value, 1 and 0, as golden-stick has it for a constant tensor.
    """
    wide_low, wide_high = low.astype(np.float64), high.astype(np.float64)
    constant = wide_high == wide_low
    scale = np.where(constant, 1.0, (wide_high - wide_low) / STEPS)
    offset = np.where(constant, 0.0, np.rint(INT8_MIN - wide_low / scale))
    return scale.astype(np.float32), offset.astype(np.float32)


def shifted_parameters(low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """One scale for all columns, and a zero point for each that puts its range in the middle of int8.

    The widest range, 0 included, takes all 256 integers. What Outlier Suppression+ (arXiv 2304.09145) does by
    shifting activations and adding to biases is here in zero points, so that no other weight changes.

    Args:
        low: float32 `[K]`, the least value of each column.
        high: `[K]`, the greatest.

    Returns:
        The scale, float32 `[1]`, 1 where every column is 0; zero points in [-128, 127], float32 `[K]`.
    """
    wide_low, wide_high = np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64)
    scale = (wide_high - wide_low).max(initial=0) / STEPS or 1.0
    middle = np.rint((INT8_MIN + INT8_MAX) / 2 - (low.astype(np.float64) + high) / 2 / scale)
    offset = np.clip(middle, INT8_MIN, INT8_MAX)
    return np.array([scale], np.float32), offset.astype(np.float32)


def in_int8(scale: Floats, offset: NDArray[np.int32]) -> tuple[Floats, NDArray[np.int32]]:
    """Widen a range that leaves out 0 until its zero point is an int8, as every serving engine asks.

    Args:
        scale: float32 `[1]`.
        offset: int32 `[1]`, outside of [-128, 127] where the range lies on one side of 0.
    """
    if INT8_MIN <= offset[0] <= INT8_MAX:
        return scale, offset
    low, high = (INT8_MIN - offset) * scale, (INT8_MAX - offset) * scale
    scale, wide_offset = activation_parameters(np.minimum(low, 0), np.maximum(high, 0))
    return scale, wide_offset.astype(np.int32)


def weight_scale(weight: Floats, steps: int = STEPS) -> Floats:
    """Symmetric scale of every row: `[N, K]` to `2 max|row| / steps`, `[N, 1]`; 1 for zeros."""
    return scale_of_maxima(row_maxima(weight)[:, None], steps)


def scale_of_maxima(maxima: Floats, steps: int = STEPS) -> Floats:
    """Symmetric scale of rows by their greatest magnitudes, of any shape: `2 maximum / steps`; 1 for 0."""
    scale = 2 * maxima.astype(np.float64) / steps
    return np.where(scale == 0, 1.0, scale).astype(np.float32)


def row_maxima(values: Floats) -> Floats:
    """The greatest magnitude in each row: `[N, K]` to `[N]`."""
    return np.maximum(values.max(axis=1), -values.min(axis=1))


def fake_quantize(
    x: Floats,
    scale: Floats,
    offset: Floats | float = 0.0,
    out: Floats | None = None,
    low: int = INT8_MIN,
    high: int = INT8_MAX,
) -> Floats:
    """`s * (clamp(round(x / s + z)) - z)` in the shape of `x`, against which the others broadcast.

    With `out`, which may be `x` itself, no memory is taken.
    """
    y = np.divide(x, scale, out=out)
    if np.any(offset):
        y += offset
    np.rint(y, out=y)
    np.clip(y, low, high, out=y)
    if np.any(offset):
        y -= offset
    y *= scale
    return y
