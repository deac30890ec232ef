"""The CPU's linear layers against exact integer arithmetic in NumPy."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from msquant.checkpoint.weights import FloatLinear, Linear, QuantizedLinear
from msquant.kernels import onednn
from msquant.kernels.cpu_linear import linear_layer
from msquant.schemes import W8A8, W8A16
from tests.fixtures.linears import (
    N,
    T,
    extremes,
    random_input,
    random_linear,
    random_shifted,
    reference,
    with_reciprocal,
)

SIZES = [64, 576, 1500, 3000]
pytestmark = pytest.mark.usefixtures("product")


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    # One step of the int8 input moves the output by far more than this.
    np.testing.assert_allclose(found, expected, rtol=5e-7, atol=2e-7 * np.abs(expected).max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("k", SIZES)
def test_random_layers_equal_the_reference(k: int, static: bool, bias: bool) -> None:
    linear, x = random_linear(k, static=static, bias=bias), random_input(k)
    assert_close(linear_layer(linear)(x), reference(linear, x))


@pytest.mark.parametrize("k", SIZES)
def test_each_column_has_its_zero_point(k: int) -> None:
    linear, x = random_shifted(k), random_input(k)
    assert_close(linear_layer(linear)(x), reference(linear, x))


def test_an_input_is_multiplied_by_a_reciprocal_where_there_is_one() -> None:
    linear, x = with_reciprocal(64)
    assert_close(linear_layer(linear)(x), reference(linear, x))
    # One that has another reciprocal is computed apart.
    other = dataclasses.replace(linear, input_reciprocal=np.float32([30]))
    both = np.concatenate([reference(linear, x), reference(other, x)], axis=1)
    assert_close(linear_layer(linear, other)(x), both)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("offset", [-128, -1, 127])
def test_extreme_integers_are_summed_exactly(k: int, offset: int, rows: int) -> None:
    linear, x, exact = extremes(k, offset, rows)
    np.testing.assert_array_equal(linear_layer(linear)(x), exact)


@pytest.mark.parametrize("static", [True, False])
def test_a_token_of_zeros_gives_the_bias(static: bool) -> None:
    linear = random_linear(64, static=static)
    y = linear_layer(linear)(np.zeros((3, 64), np.float32))
    np.testing.assert_array_equal(y, np.tile(linear.bias, (3, 1)))


@pytest.mark.parametrize("static", [True, False])
def test_a_token_does_not_depend_on_the_others(static: bool) -> None:
    layer, x = linear_layer(random_linear(576, static=static)), random_input(576)
    together = layer(x)
    for row in range(T):
        np.testing.assert_array_equal(layer(x[row : row + 1])[0], together[row])


def float_linear(k: int) -> FloatLinear:
    weight = np.random.default_rng(k).standard_normal((N, k)).astype(np.float32)
    return FloatLinear(weight)


def weight_only(k: int) -> QuantizedLinear:
    return dataclasses.replace(random_linear(k, static=False), scheme=W8A16)


def shifted(linear: QuantizedLinear) -> QuantizedLinear:
    return dataclasses.replace(linear, input_offset=np.array([5], np.int32))


@pytest.mark.parametrize(
    "linears",
    [
        (random_linear(64, static=True), random_linear(64, static=True, bias=False)),
        (random_linear(64, static=False), random_linear(64, static=False, bias=False)),
        (random_linear(64, static=True), shifted(random_linear(64, static=True))),
        (random_shifted(64), random_shifted(64)),
        (random_shifted(64), random_linear(64, static=True)),
        (random_linear(64, static=True), random_linear(64, static=False), float_linear(64)),
        (float_linear(64), random_linear(64, static=True)),
        (float_linear(64), float_linear(64)),
        (weight_only(64), weight_only(64)),
        (random_linear(64, static=True), weight_only(64)),
    ],
    ids=[
        "static",
        "dynamic",
        "other offset",
        "columns",
        "a column and all",
        "all kinds",
        "float first",
        "float",
        "weights alone",
        "both",
    ],
)
def test_several_linears_of_one_input(linears: tuple[Linear, ...]) -> None:
    x = random_input(64)
    expected = [
        x.astype(np.float64) @ linear.weight.T if isinstance(linear, FloatLinear) else reference(linear, x)
        for linear in linears
    ]
    assert_close(linear_layer(*linears)(x), np.concatenate(expected, axis=1))


def test_channels_that_could_overflow_int32_take_the_other_product() -> None:
    k = onednn.LONGEST + 64
    weight = np.full((1, k), 127, np.int8)
    linear = QuantizedLinear(
        weight, np.ones(1, np.float32), W8A8, None, np.ones(1, np.float32), np.array([-128], np.int32)
    )
    found = linear_layer(linear)(np.full((1, k), 255, np.float32))
    assert found.tolist() == [[np.float32(255 * 127 * k)]]
