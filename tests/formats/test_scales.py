"""Scales as they are stored: those of rows only in a product, those of inputs in the model's dtype."""

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import DTypeLike

from msquant.checkpoint.weights import QuantizedLinear
from msquant.formats.scales import input_parameters, rounded_reciprocal, row_scales
from msquant.schemes import W8A8

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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


def layer(scale: float) -> QuantizedLinear:
    one = np.ones(1, np.float32)
    return QuantizedLinear(np.ones((1, 1), np.int8), one, W8A8, None, np.float32([scale]), np.int32([0]))


def away(scales: np.ndarray, dtype: str) -> np.ndarray:
    """How far the product of each scale with its reciprocal, as torch rounds both to the dtype, is from 1."""
    held = torch.from_numpy(scales).to(TORCH[dtype])
    return np.abs((held.double() * (1 / held).double()).numpy() - 1)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 8e-4), ("float16", 5e-5)])
def test_an_input_scale_is_stored_as_a_neighbour_whose_reciprocal_survives(dtype: str, limit: float) -> None:
    wanted = np.exp(np.random.default_rng(0).uniform(-7, 1, 1000)).astype(np.float32)
    stored = np.array([input_parameters("a", layer(scale), dtype)[0] for scale in wanted])
    held = torch.from_numpy(stored).to(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(held, stored)
    assert (stored >= 0.992 * wanted).all()
    assert (stored <= 1.01 * wanted).all()
    assert abs(np.mean(stored / wanted) - 1) < 2e-3
    rms = np.sqrt(np.mean(away(stored, dtype) ** 2))
    assert rms < limit
    # Those of the nearest numbers survive less than half as well.
    assert rms < 0.5 * np.sqrt(np.mean(away(wanted, dtype) ** 2))
    # What is read again stays what it is, so that a folder can be converted there and back.
    for scale in stored[:50]:
        assert input_parameters("a", layer(scale), dtype)[0] == scale


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reciprocal_is_the_one_that_torch_computes_in_that_dtype(dtype: str) -> None:
    scales = np.exp(np.random.default_rng(1).uniform(-8, 2, 2000)).astype(np.float32)
    expected = (1 / torch.from_numpy(scales).to(TORCH[dtype])).float().numpy()
    np.testing.assert_array_equal(rounded_reciprocal(scales, dtype), expected)
