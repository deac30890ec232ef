"""Scales of rows that are stored only in a product."""

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import DTypeLike

from msquant.formats.scales import row_scales


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_the_product_of_what_is_read_is_what_was_stored(dtype: DTypeLike) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scale = rng.uniform(0.001, 2, 1).astype(dtype).astype(np.float32)
        rows = np.exp(rng.uniform(-12, 2, 2000)).astype(np.float32)
        stored = (scale.astype(np.float64) * rows).astype(np.float32)
        read = row_scales(stored, scale)
        np.testing.assert_array_equal((scale.astype(np.float64) * read).astype(np.float32), stored)
        np.testing.assert_allclose(read, rows, rtol=1.2e-7)
