"""Exact integer products in float32."""

import numpy as np
from numpy.typing import NDArray

# float32 holds integers exactly up to this.
EXACT = 2**24

# Channels that an exact product is cut at multiples of: 64 * 128 * 255 is far below 2 ** 24.
_STEP = 64


def exact_parts(weight: NDArray[np.int8], largest: float) -> list[int]:
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
