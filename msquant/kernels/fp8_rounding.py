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

from msquant.checkpoint.fp8 import SHIFT, VALUES, can_spread
from msquant.kernels.fake_quant import scale_of_maxima
from msquant.kernels.weight_rounding import INT8, RoundedWeight, rounded_up

_NAN = 0x7F


def quantize_codes(
    blocks: Iterable[tuple[NDArray[np.uint8], NDArray[np.float32]]],
    shape: tuple[int, ...],
    scale_dtype: str = "float32",
    memory: NDArray[np.int8] | None = None,
) -> RoundedWeight | None:
    """Round a weight in FP8 to int8 with a scale for each output channel, in one thread.

    Args:
        blocks: pairs of the codes of some rows, `[n, K]`, all rows in order, and the scales `[n, B]` of the B
            runs of columns, as long as one another, that each row is made of.
        shape: `(N, K)`.
        scale_dtype: as for `quantize_weight`, whose scales these are.
        memory: int8 `[N, K]` for the integers; None for memory of their own.

    Returns:
        None where it cannot be done so: a code is NaN, or the scales are too far from one another.
    """
    from msquant.kernels.compiled import float8_maxima, round_float8

    rows, columns = shape
    weight = np.empty((rows, columns), np.int8) if memory is None else memory
    result = RoundedWeight(weight, np.empty(rows, np.float32))
    start = 0
    for codes, scales in blocks:
        if not can_spread(scales):
            return None
        count, runs = scales.shape
        place = slice(start, start + count)
        parts = codes.reshape(count * runs, -1)
        greatest = float8_maxima(parts).reshape(count, runs)
        if greatest.max(initial=0) == _NAN:
            return None
        largest = (VALUES[greatest] * scales).max(axis=1)
        scale = rounded_up(scale_of_maxima(largest), scale_dtype)
        with np.errstate(over="ignore"):
            factors = (scales * np.float64(SHIFT) / scale[:, None]).astype(np.float32)
        if not np.isfinite(factors).all():
            return None
        # The greatest number of a row alone may be rounded up to one too many: it is at most 127.5.
        round_float8(parts, factors.reshape(-1), INT8.high, weight[place].reshape(parts.shape))
        result.scale[place] = scale
        start += count
    return result
