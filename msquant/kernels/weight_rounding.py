"""Weights to integers, in cache-sized blocks of rows on all cores, with golden-stick's arithmetic."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from msquant.kernels.compiled import round_smoothed, smoothed_maxima
from msquant.kernels.fake_quant import fake_quantize, row_maxima, scale_of_maxima, weight_scale
from msquant.schemes import Quant

_Number = TypeVar("_Number", bound=np.generic)
_Made = TypeVar("_Made")

INT8 = Quant(8, "channel")
"""Int8 with one scale for each output channel."""

# Of float32: a block and its temporaries stay in a core's cache.
BLOCK_BYTES = 1 << 20


# Named here because NumPy has no bfloat16 of its own.
_BFLOAT16, _FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
_DTYPES = {"bfloat16": (_BFLOAT16,), "float16": (_FLOAT16,), "bfloat16 and float16": (_BFLOAT16, _FLOAT16)}


class RoundedWeight(NamedTuple):
    """A weight as integers.

    Attributes:
        weight: int8 `[N, K]`, one integer in each.
        scale: float32 `[N]`, or `[N, K / group_size]`.
        offset: int32 in the shape of `scale`, the zero points; None for symmetric integers.
    """

    weight: NDArray[np.int8]
    scale: NDArray[np.float32]
    offset: NDArray[np.int32] | None = None


Rounder = Callable[[NDArray[np.float32], str, Quant], RoundedWeight]
"""What is called as `quantize_weight` and returns as it does."""


def quantize_weight(
    weight: NDArray[np.float32], scale_dtype: str = "float32", quant: Quant = INT8
) -> RoundedWeight:
    """Round a weight to integers, per output channel or per group of its columns.

    The arithmetic is golden-stick 1.4.1's (`ptq/basic_functions/basic_quant_func.py`, `quant_tensor`): scale
    `2 max|w| / (2^bits - 1)` in float64 rounded to float32, then `clamp(round(w / scale))`, half to even.
    With zero points it is compressed-tensors' (`calculate_qparams`), see `group_parameters`, and then
    `clamp(round(w / scale + zero point))`.

    Args:
        weight: `[N, K]`; K is a multiple of the group's size.
        scale_dtype: `bfloat16`, `float16`, `bfloat16 and float16` or `float32`: the scale is rounded up to
            one that it, or each of the two, can hold, so that an engine which keeps scales in that dtype
            multiplies by what the weight was divided by.
        quant: the integers.
    """
    result = _unrounded(weight.shape, quant)

    def block(rows: slice) -> None:
        _round_rows(weight[rows].copy(), rows, scale_dtype, quant, result)

    for_blocks(weight, block)
    return result


def quantize_blocks(
    blocks: Iterable[tuple[int, NDArray[np.float32]]],
    shape: tuple[int, ...],
    scale_dtype: str = "float32",
    quant: Quant = INT8,
) -> RoundedWeight:
    """As `quantize_weight`, of a weight that is never in memory whole in floating point, in one thread.

    Args:
        blocks: pairs of a block's first row and its rows, float32 `[n, K]`, which are overwritten.
        shape: `(N, K)`.
        scale_dtype: as for `quantize_weight`.
        quant: the integers.

    Returns:
        As `quantize_weight`; the scale of a row or group that holds NaN or infinity is not finite.
    """
    result = _unrounded(shape, quant)
    for start, block in blocks:
        _round_rows(block, slice(start, start + len(block)), scale_dtype, quant, result)
    return result


def _unrounded(shape: tuple[int, ...], quant: Quant) -> RoundedWeight:
    rows, columns = shape
    size = (rows,) if quant.group_size is None else (rows, columns // quant.group_size)
    offset = None if quant.symmetric else np.empty(size, np.int32)
    return RoundedWeight(np.empty((rows, columns), np.int8), np.empty(size, np.float32), offset)


def _round_rows(
    values: NDArray[np.float32], rows: slice, scale_dtype: str, quant: Quant, result: RoundedWeight
) -> None:
    """Round some rows of a weight into their place; the values are overwritten."""
    groups = in_groups(values, quant)
    scale, offset = group_parameters(groups, scale_dtype, quant)
    with np.errstate(invalid="ignore"):
        np.divide(groups, scale, out=groups)
    if result.offset is not None and offset is not None:
        groups += offset
        result.offset[rows] = offset.reshape(result.offset[rows].shape)
    np.rint(groups, out=groups)
    # Of a symmetric row, its greatest number alone may be rounded up to one too many, and the least fits.
    if not quant.symmetric:
        np.clip(groups, quant.low, quant.high, out=groups)
    elif groups.max(initial=0) > quant.high:
        np.minimum(groups, np.full(groups.shape[1], quant.high, np.float32), out=groups)
    # What is not finite has a scale that is not, either.
    with np.errstate(invalid="ignore"):
        result.weight[rows] = values
    result.scale[rows] = scale.reshape(result.scale[rows].shape)


def group_parameters(
    groups: NDArray[np.float32], scale_dtype: str, quant: Quant
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The scale and the zero point of every row of what `in_groups` returns, `[G, size]`.

    With zero points, the range from `min(w, 0)` to `max(w, 0)` takes all integers: scale `(high - low) /
    (2^bits - 1)`, zero point `clamp(round(least integer - low / scale))`; scale 1 for zeros.

    Args:
        groups: `[G, size]`.
        scale_dtype: as for `quantize_weight`.
        quant: the integers.

    Returns:
        float32 `[G, 1]` both; no zero points for symmetric integers.
    """
    steps = quant.high - quant.low
    if quant.symmetric:
        return rounded_up(weight_scale(groups, steps), scale_dtype), None
    low = np.minimum(groups.min(axis=1, keepdims=True), 0).astype(np.float64)
    high = np.maximum(groups.max(axis=1, keepdims=True), 0).astype(np.float64)
    exact = np.where(high == low, 1.0, (high - low) / steps).astype(np.float32)
    scale = rounded_up(exact, scale_dtype)
    offset = np.clip(np.rint(quant.low - low / scale), quant.low, quant.high)
    return scale, offset.astype(np.float32)


def in_groups(weight: NDArray[_Number], quant: Quant) -> NDArray[_Number]:
    """A view of a weight, its codes or its integers `[N, K]` with a row for what shares a scale.

    It is `[N, K]`, or `[N K / size, size]`.
    """
    return weight if quant.group_size is None else weight.reshape(-1, quant.group_size)


def rounded_up(scale: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """The least numbers of a dtype (as for `quantize_weight`) that are not below these, in float32."""
    # Where float16 holds fewer digits than bfloat16, bfloat16 holds what it holds.
    for kind in _DTYPES.get(dtype, ()):
        with np.errstate(over="ignore"):
            rounded = scale.astype(kind)
        above = np.nextafter(rounded, np.array(np.inf, rounded.dtype))
        scale = np.where(rounded.astype(np.float32) < scale, above, rounded).astype(np.float32)
    return scale


def smoothed_and_rounded(
    weight: NDArray[np.float32],
    smooth_scale: NDArray[np.float32],
    clip_ratio: NDArray[np.float32] | None = None,
    quant: Quant = INT8,
) -> NDArray[np.float32]:
    """What integers keep of a weight whose columns are multiplied by a smooth scale.

    Args:
        weight: `[N, K]`.
        smooth_scale: `[K]`.
        clip_ratio: of each row's greatest magnitude, `[N]`: what is beyond is clipped.
        quant: the integers.

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
        groups = in_groups(smoothed, quant)
        scale, offset = group_parameters(groups, "float32", quant)
        zero = 0.0 if offset is None else offset
        fake_quantize(groups, scale, zero, out=groups, low=quant.low, high=quant.high)

    for_blocks(weight, block)
    return result


def quantize_smoothed(
    weight: NDArray[np.float32], smooth_scale: NDArray[np.float32], quant: Quant = INT8
) -> RoundedWeight:
    """As `quantize_weight` of a weight whose columns are multiplied by a smooth scale, in one thread.

    Args:
        weight: `[N, K]`.
        smooth_scale: `[K]`.
        quant: symmetric integers with a scale for each output channel.
    """
    scale = scale_of_maxima(smoothed_maxima(weight, smooth_scale), quant.high - quant.low)
    rounded = np.empty(weight.shape, np.int8)
    round_smoothed(weight, smooth_scale, scale, quant.high, rounded)
    return RoundedWeight(rounded, scale)


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


def for_blocks(values: NDArray[np.float32], work: Callable[[slice], _Made]) -> list[_Made]:
    """Call `work` with slices that cover all rows, on all cores; NumPy works outside of Python's lock.

    Returns:
        What it returned, in the order of the rows.
    """
    rows = max(1, BLOCK_BYTES // max(1, values[:1].nbytes))
    slices = [slice(start, start + rows) for start in range(0, len(values), rows)]
    if len(slices) == 1:
        # So that work on a block may use this for its own rows: threads that wait for threads would not end.
        return [work(slices[0])]
    return list(_threads().map(work, slices))


def for_parts(rows: int, work: Callable[[slice], None]) -> None:
    """As `for_blocks`, in larger parts, one a core or so: for work that costs something a part."""
    size = max(1, -(-rows // len(os.sched_getaffinity(0))), min(rows, 256))
    list(_threads().map(work, [slice(start, start + size) for start in range(0, rows, size)]))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))
