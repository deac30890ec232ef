"""FP8 with a scale a block to int8 with a scale a row, without the weight in between.

A code stands for `value * block scale`, so the greatest magnitude of a row is told by the greatest code of
each of its blocks, and what is rounded is `value * (block scale / row scale)`: one multiplication in place of
one, a division and two searches for the extremes. Next to `quantize_weight` of the dequantized weight, which
rounds the product and the quotient one after the other, a number half-way between two integers may go to the
other one.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.fp8 import SHIFT, VALUES, can_spread, spread
from msquant.kernels.weight_rounding import INT8, RoundedWeight, rounded_up

_NAN = 0x7F
_NEARLY = INT8.high + 0.499


def quantize_codes(
    blocks: Iterable[tuple[int, NDArray[np.uint8], NDArray[np.float32]]],
    shape: tuple[int, ...],
    scale_dtype: str = "float32",
) -> RoundedWeight | None:
    """Round a weight in FP8 to int8 with a scale for each output channel, in one thread.

    Args:
        blocks: triples of a block's first row, its codes `[n, K]`, and the scales `[B]` of the B runs of
            columns, as long as one another, that these rows are made of.
        shape: `(N, K)`.
        scale_dtype: as for `quantize_weight`, whose scales these are.

    Returns:
        None where it cannot be done so: a code is NaN, or the scales are too far from one another.
    """
    rows, columns = shape
    result = RoundedWeight(np.empty((rows, columns), np.int8), np.empty(rows, np.float32))
    high = np.full(columns, INT8.high, np.float32)
    floats = np.empty((0, columns), np.float32)
    for start, codes, scales in blocks:
        count = len(codes)
        if not can_spread(scales):
            return None
        if len(floats) < count:
            floats = np.empty((count, columns), np.float32)
        values = floats[:count]
        greatest = (codes & _NAN).reshape(count, len(scales), -1).max(axis=2)
        if (greatest == _NAN).any():
            return None
        largest = (VALUES[greatest] * scales).max(axis=1).astype(np.float64)
        exact = np.where(largest == 0, 1.0, 2 * largest / (INT8.high - INT8.low)).astype(np.float32)
        scale = rounded_up(exact, scale_dtype)
        with np.errstate(over="ignore"):
            factors = (scales * np.float64(SHIFT) / scale[:, None]).astype(np.float32)
        if not np.isfinite(factors).all():
            return None
        spread(codes, values)
        parts = values.reshape(count, len(scales), -1)
        np.multiply(parts, factors[:, :, None], out=parts)
        np.rint(values, out=values)
        # The greatest number of a row alone may be rounded up to one too many: it is at most 127.5.
        if (largest / scale > _NEARLY).any():
            np.minimum(values, high, out=values)
        result.weight[start : start + count] = values
        result.scale[start : start + count] = scale
    return result
