"""Products of small integers, bound to a weight or to inputs, with and without int8 instructions."""

import numpy as np
import pytest
from numpy.typing import NDArray

from msquant.kernels.integer_product import product_by_inputs, product_by_weight

pytestmark = pytest.mark.usefixtures("product")


@pytest.mark.parametrize("offset", [np.int32([3]), np.int32([-128]), np.arange(-128, 128, dtype=np.int32)])
@pytest.mark.parametrize("rows", [1, 40])
def test_both_are_exact(rows: int, offset: NDArray[np.int32]) -> None:
    generator = np.random.default_rng(0)
    channels = 256
    weight = generator.integers(-128, 128, (33, channels)).astype(np.int8)
    x = generator.integers(-128, 128, (rows, channels)) - offset
    expected = (x @ weight.T.astype(np.int64)).astype(np.float32)
    lowest, highest = (limit - offset.astype(np.float32) for limit in (-128, 127))
    by_inputs = product_by_inputs(x.astype(np.float32), lowest, highest)
    by_weight = product_by_weight(weight, lowest, highest)
    for _ in range(2):
        np.testing.assert_array_equal(by_inputs(weight), expected)
        np.testing.assert_array_equal(by_weight(x.astype(np.float32)), expected)


def test_no_inputs() -> None:
    zero = np.zeros(1, np.float32)
    product = product_by_inputs(np.empty((0, 64), np.float32), zero - 128, zero + 127)
    assert product(np.ones((5, 64), np.int8)).shape == (0, 5)
