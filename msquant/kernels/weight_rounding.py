"""Weights to int8, in cache-sized blocks of rows on all cores: golden-stick's arithmetic at memory speed."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import INT8_MAX, INT8_MIN
from msquant.kernels.fake_quant import fake_quantize, row_maxima, weight_scale

# Of float32: a block and its temporaries stay in a core's cache.
BLOCK_BYTES = 1 << 20


# Named here because NumPy has no bfloat16 of its own.
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def quantize_weight(
    weight: NDArray[np.float32], scale_dtype: str = "float32"
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a weight to int8, symmetric per output channel.

    The arithmetic is golden-stick 1.4.1's (`ptq/basic_functions/basic_quant_func.py`, `quant_tensor`): scale
    `2 max|row| / 255` in float64 rounded once to float32, then `clamp(round(w / scale))`, half to even.

    Args:
        weight: `[N, K]`.
        scale_dtype: `bfloat16`, `float16` or `float32`: the scale is rounded up to one that it can hold, so
            that an engine which keeps scales in that dtype multiplies by what the weight was divided by.

    Returns:
        int8 `[N, K]` and float32 `[N]`.
    """
    rounded = np.empty(weight.shape, np.int8)
    scales = np.empty(len(weight), np.float32)

    def block(rows: slice) -> None:
        scale = rounded_up(weight_scale(weight[rows]), scale_dtype)
        values = weight[rows] / scale
        np.rint(values, out=values)
        np.clip(values, INT8_MIN, INT8_MAX, out=values)
        rounded[rows] = values
        scales[rows] = scale[:, 0]

    for_blocks(weight, block)
    return rounded, scales


def rounded_up(scale: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """The least numbers of a dtype (as for `quantize_weight`) that are not below these, in float32."""
    if dtype not in _DTYPES:
        return scale
    with np.errstate(over="ignore"):
        rounded = scale.astype(_DTYPES[dtype])
    above = np.nextafter(rounded, np.array(np.inf, rounded.dtype))
    return np.where(rounded.astype(np.float32) < scale, above, rounded).astype(np.float32)


def smoothed_and_rounded(
    weight: NDArray[np.float32],
    smooth_scale: NDArray[np.float32],
    clip_ratio: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """What int8 keeps of a weight whose columns are multiplied by a smooth scale.

    Args:
        weight: `[N, K]`.
        smooth_scale: `[K]`.
        clip_ratio: of each row's greatest magnitude, `[N]`: what is beyond is clipped.

    Returns:
        float32 `[N, K]`.
    """
    result = np.empty_like(weight)

    def block(rows: slice) -> None:
        # In place: memory that comes and goes in every block would be cleared by the system every time.
        smoothed = np.multiply(weight[rows], smooth_scale, out=result[rows])
        if clip_ratio is not None:
            limit = (row_maxima(smoothed) * clip_ratio[rows])[:, None]
            np.clip(smoothed, -limit, limit, out=smoothed)
        fake_quantize(smoothed, weight_scale(smoothed), out=smoothed)

    for_blocks(weight, block)
    return result


def clipping_change(
    weight: NDArray[np.float32], limit: NDArray[np.float32], out: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What int8 makes of a weight clipped at `limit`, less the weight.

    Args:
        weight: `[N, K]`.
        limit: of each row, `[N, 1]`.
        out: `[N, K]`, for the result.
    """

    def block(rows: slice) -> None:
        clipped = np.clip(weight[rows], -limit[rows], limit[rows], out=out[rows])
        fake_quantize(clipped, weight_scale(clipped), out=clipped)
        clipped -= weight[rows]

    for_blocks(weight, block)
    return out


def column_maxima(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The greatest magnitude in each column: `[R, K]` to `[K]`; zeros where there are no rows."""
    if not len(values):
        return np.zeros(values.shape[1], np.float32)
    return np.maximum(values.max(axis=0), -values.min(axis=0))


def for_blocks(values: NDArray[np.float32], work: Callable[[slice], None]) -> None:
    """Call `work` with slices that cover all rows, on all cores; NumPy works outside of Python's lock."""
    rows = max(1, BLOCK_BYTES // max(1, values[:1].nbytes))
    slices = [slice(start, start + rows) for start in range(0, len(values), rows)]
    # Exhausted, so that an error in a thread is raised here.
    list(_threads().map(work, slices))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())
