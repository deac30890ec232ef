"""W8A8 linear layers against exact integer arithmetic in NumPy."""

from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from numpy.typing import NDArray

from msquant.checkpoint.weights import FloatLinear, QuantizedLinear
from msquant.models import cells
from msquant.models.cells import Int8Linear, dense, linear_cell
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

SIZES = [64, 1024, 1500, 3000]


@pytest.fixture(params=["cpu", "ascend"], autouse=True)
def cell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU computes, and what an NPU does, on a CPU."""
    if request.param == "ascend":
        monkeypatch.setattr(cells, "CpuLinear", lambda linear: Int8Linear(linear, ms.float32))


def run(linear: FloatLinear | QuantizedLinear, x: NDArray[np.float32], dtype: Any) -> NDArray[np.float32]:
    return linear_cell(linear, dtype)(Tensor(x)).asnumpy()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("k", SIZES)
def test_random_layers_equal_the_reference(k: int, static: bool, bias: bool, dtype: Any) -> None:
    linear, x = random_linear(k, static=static, bias=bias), random_input(k)
    expected = reference(linear, x)
    # One step of the int8 input moves the output by far more than this.
    atol = 2e-7 * np.abs(expected).max()
    np.testing.assert_allclose(run(linear, x, dtype), expected, rtol=5e-7, atol=atol)


@pytest.mark.parametrize("k", SIZES)
def test_each_column_has_its_zero_point(k: int, dtype: Any) -> None:
    linear, x = random_shifted(k), random_input(k)
    expected = reference(linear, x)
    atol = 2e-7 * np.abs(expected).max()
    np.testing.assert_allclose(run(linear, x, dtype), expected, rtol=5e-7, atol=atol)


def test_an_input_is_multiplied_by_a_reciprocal_where_there_is_one(dtype: Any) -> None:
    linear, x = with_reciprocal(64)
    expected = reference(linear, x)
    atol = 2e-7 * np.abs(expected).max()
    np.testing.assert_allclose(run(linear, x, dtype), expected, rtol=5e-7, atol=atol)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_with_int8_weights_alone_equals_the_reference(bias: bool, dtype: Any) -> None:
    linear, x = replace(random_linear(64, static=False, bias=bias), scheme=W8A16), random_input(64)
    expected = reference(linear, x)
    atol = 2e-7 * np.abs(expected).max()
    np.testing.assert_allclose(run(linear, x, dtype), expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("offset", [-128, -1, 127])
def test_extreme_integers_are_summed_exactly(k: int, offset: int, dtype: Any) -> None:
    linear, x, exact = extremes(k, offset)
    np.testing.assert_array_equal(run(linear, x, dtype), exact)


def test_a_float32_sum_over_all_channels_would_be_wrong() -> None:
    """Why the product is split: odd sums above 2**24 do not fit float32."""
    x, weight = np.full((1, 3000), 127.0, np.float32), np.full((1, 3000), 127, np.int8)
    weight[0, 0] = 126
    in_one_go = np.float32(0)
    for product in x[0] * weight[0].astype(np.float32):
        in_one_go += product
    assert int(in_one_go) != 127 * 127 * 2999 + 127 * 126


@pytest.mark.parametrize("static", [True, False])
def test_a_token_of_zeros_gives_the_bias(static: bool, dtype: Any) -> None:
    linear = random_linear(64, static=static)
    y = run(linear, np.zeros((3, 64), np.float32), dtype)
    np.testing.assert_array_equal(y, np.tile(linear.bias, (3, 1)))


def test_dynamic_scales_are_per_token(dtype: Any) -> None:
    linear, x = random_linear(64, static=False), random_input(64)
    together = run(linear, x, dtype)
    for row in range(T):
        np.testing.assert_array_equal(run(linear, x[row : row + 1], dtype)[0], together[row])


def test_the_quantizer_rounds_half_to_even_and_saturates(dtype: Any) -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, 200, -200], np.float32)
    linear = QuantizedLinear(
        weight=np.eye(len(values), dtype=np.int8),
        weight_scale=np.ones(len(values), np.float32),
        scheme=W8A8,
        input_scale=np.ones(1, np.float32),
        input_offset=np.array([10], np.int32),
    )
    expected = np.array([[0, 2, 2, 0, -2, 117, -138, 117, -138]], np.float32)
    np.testing.assert_array_equal(run(linear, values[None], dtype), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_floating_point_layers(bias: bool, dtype: Any) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((N, 64)).astype(np.float32)
    added = generator.standard_normal(N).astype(np.float32) if bias else None
    x = random_input(64)
    expected = x.astype(np.float64) @ weight.T + (0 if added is None else added)
    np.testing.assert_allclose(run(FloatLinear(weight, added), x, dtype), expected, rtol=1e-5, atol=1e-4)


def test_a_dense_cell_is_cloned_with_its_values(dtype: Any) -> None:
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    cell = dense(FloatLinear(weight, np.arange(4, dtype=np.float32)), dtype)
    np.testing.assert_array_equal(cell.weight.clone().asnumpy(), weight)
    np.testing.assert_array_equal(cell.bias.clone().asnumpy(), np.arange(4))
