"""Exact products of small integers: by the processor's int8 instructions, or in float32 where it has none."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from msquant.kernels import onednn

Floats = NDArray[np.float32]
Integers = NDArray[np.int8]

# float32 holds integers exactly up to this.
EXACT = 2**24

# Channels that an exact product is cut at multiples of: 64 * 128 * 255 is far below 2 ** 24.
_STEP = 64


def exact_parts(weight: Integers, largest: float) -> list[int]:
    """Bounds of runs of channels whose products with inputs up to `largest` stay exact.

    The runs are as long as they can be in steps of a few channels, which no input up to 255 can overflow.
    """
    channels = weight.shape[1]
    starts = np.arange(0, channels, _STEP)
    # Of magnitudes up to 128 in int8, -128 included: as uint8 they do not overflow.
    magnitudes = np.abs(weight).view(np.uint8)
    steps = np.add.reduceat(magnitudes, starts, axis=1, dtype=np.int32)
    sums = np.cumsum(steps, axis=1, out=steps)
    bounds = [0]
    while bounds[-1] < len(starts):
        before = sums[:, bounds[-1] - 1 : bounds[-1]] if bounds[-1] else 0
        fits = ((sums - before) * largest <= EXACT).all(axis=0)
        bounds.append(int(np.count_nonzero(fits)))
    return [*(int(starts[bound]) for bound in bounds[:-1]), channels]


def product_by_weight(weight: Integers, lowest: Floats, highest: Floats) -> Callable[[Floats], Floats]:
    """What multiplies integers by one weight, again and again.

    Args:
        weight: `[N, K]`.
        lowest: the least integers of the inputs, whole numbers `[1]` or `[K]`: -128 less an int8 zero point.
        highest: the greatest.

    Returns:
        Takes whole numbers `[T, K]`, which it may overwrite, to the exact `[T, N]`, rounded to float32.
    """
    gemm = _gemm(weight.shape[1])
    if gemm is None:
        parts = _widened(weight, lowest, highest)
        return lambda quantized: _sum_of_parts(quantized, parts)
    shifted = gemm(_zero(weight.shape[1], lowest), weight)

    def product(quantized: Floats) -> Floats:
        quantized -= lowest
        total = gemm(quantized.astype(np.uint8), weight)
        total -= shifted
        return total.astype(np.float32)

    return product


def product_by_inputs(quantized: Floats, lowest: Floats, highest: Floats) -> Callable[[Integers], Floats]:
    """What multiplies one set of integers by weight after weight: `product_by_weight` the other way round.

    Args:
        quantized: whole numbers `[T, K]`.
        lowest: as for `product_by_weight`.
        highest: as for `product_by_weight`.

    Returns:
        Takes a weight `[N, K]` to `[T, N]`, exact, rounded to float32; threads may call it at once.
    """
    gemm = _gemm(quantized.shape[1])
    if gemm is None:
        return lambda weight: _sum_of_parts(quantized, _widened(weight, lowest, highest))
    codes = np.concatenate([(quantized - lowest).astype(np.uint8), _zero(quantized.shape[1], lowest)])

    def product(weight: Integers) -> Floats:
        total = gemm(codes, weight)
        total[:-1] -= total[-1]
        return total[:-1].astype(np.float32)

    return product


def _gemm(channels: int) -> onednn.Int8Product | None:
    return onednn.load_int8() if channels < onednn.LONGEST else None


def _zero(channels: int, lowest: Floats) -> NDArray[np.uint8]:
    """What an input of zeros is where inputs from `lowest` on are counted from 0: `[1, K]`."""
    return np.broadcast_to(-lowest, (1, channels)).astype(np.uint8)


def _widened(weight: Integers, lowest: Floats, highest: Floats) -> list[tuple[slice, Floats]]:
    """The weight in float32, 4 bytes a number, in as many parts as its products are exact in."""
    bounds = exact_parts(weight, float(max(-lowest.min(), highest.max())))
    return [
        (slice(start, stop), np.asarray(weight[:, start:stop], dtype=np.float32, order="C").T)
        for start, stop in pairwise(bounds)
    ]


def _sum_of_parts(quantized: Floats, parts: list[tuple[slice, Floats]]) -> Floats:
    if len(parts) == 1:
        return quantized @ parts[0][1]
    total = np.zeros((len(quantized), parts[0][1].shape[1]), np.int32)
    for columns, weight in parts:
        total += (quantized[:, columns] @ weight).astype(np.int32)
    return total.astype(np.float32)
