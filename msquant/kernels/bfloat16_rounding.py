"""Weights in bfloat16 to integers with symmetric scales, without the floating-point weight in between."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from msquant.kernels.fake_quant import scale_of_maxima
from msquant.kernels.weight_rounding import INT8, RoundedWeight, in_groups, rounded_up
from msquant.schemes import Quant


def quantize_bfloat16(
    blocks: Iterable[tuple[int, NDArray[np.uint16]]],
    shape: tuple[int, ...],
    scale_dtype: str = "float32",
    quant: Quant = INT8,
    memory: NDArray[np.int8] | None = None,
) -> RoundedWeight:
    """Round a weight to nearest, in one thread; the same numbers as `quantize_weight` of it in float32.

    Args:
        blocks: pairs of a block's first row and its codes, `[n, K]`.
        shape: `(N, K)`.
        scale_dtype: as for `quantize_weight`.
        quant: the integers, without zero points.
        memory: int8 `[N, K]` for the integers; None for memory of their own.

    Returns:
        As `quantize_weight`; the scale of a row or group that holds NaN or infinity is not finite.
    """
    from msquant.kernels.compiled import bfloat16_maxima, round_bfloat16

    rows, columns = shape
    size = quant.group_size or columns
    weight = np.empty((rows, columns), np.int8) if memory is None else memory
    scales = np.empty((rows, columns // size), np.float32)
    for start, block in blocks:
        groups, place = in_groups(block, quant), slice(start, start + len(block))
        maxima = (bfloat16_maxima(groups).astype(np.uint32) << 16).view(np.float32)
        scale = rounded_up(scale_of_maxima(maxima, quant.high - quant.low), scale_dtype)
        round_bfloat16(groups, scale, quant.high, in_groups(weight[place], quant))
        scales[place] = scale.reshape(len(block), -1)
    return RoundedWeight(weight, scales if quant.group_size else scales.reshape(rows))
