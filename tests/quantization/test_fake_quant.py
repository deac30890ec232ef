"""The search's quantizer against golden-stick's own, bit for bit."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from msquant.kernels.fake_quant import (
    activation_parameters,
    fake_quantize,
    in_int8,
    shifted_parameters,
    weight_scale,
)
from msquant.models.device import use_device


@pytest.fixture(scope="module", autouse=True)
def device():
    use_device()


def golden_stick_quantizer(x, *, symmetric, axis):
    from mindspore_gs.ptq.basic_functions.basic_quant_func import quant_tensor

    return quant_tensor(
        ms.Tensor(x),
        ops.min,
        ops.max,
        narrow_range=False,
        symmetric=symmetric,
        need_group=False,
        group_size=0,
        quant_axis=axis,
        if_pesudo_quant=True,
        high_precision_params=False,
    )


@pytest.mark.parametrize("shift", [0.0, 3.0, -50.0])
def test_activations_are_quantized_as_golden_stick_does(shift):
    x = (np.random.default_rng(0).normal(size=(33, 48)) ** 3 + shift).astype(np.float32)
    scale, offset, expected = golden_stick_quantizer(x, symmetric=False, axis=-1)

    ours = activation_parameters(x.min(keepdims=True), x.max(keepdims=True))

    np.testing.assert_array_equal(ours[0].reshape(-1), scale.asnumpy())
    np.testing.assert_array_equal(ours[1].reshape(-1), offset.asnumpy())
    np.testing.assert_array_equal(fake_quantize(x, *ours), expected.asnumpy())


def test_zero_points_of_columns_put_every_range_in_the_middle():
    x = np.random.default_rng(2).normal(size=(64, 30)) * np.geomspace(0.01, 4, 30)
    x += np.linspace(-40, 40, 30)
    x[:, 3], x[:, 4], x[:, 5] = 0, np.abs(x[:, 4]), -7
    x = x.astype(np.float32)
    low, high = x.min(axis=0), x.max(axis=0)

    scale, offset = shifted_parameters(low, high)

    # The widest range, with 0 in it, takes the 256 integers.
    width = (np.maximum(high, 0).astype(np.float64) - np.minimum(low, 0)).max()
    assert scale[0] == pytest.approx(width / 255, rel=1e-6)
    assert offset[3] == 0
    integers = np.rint(x / scale) + offset
    assert integers.min() >= -129
    assert integers.max() <= 128
    # Nothing is cut but by half a step where a zero point is rounded, so nothing moves by more than one step.
    assert np.abs(fake_quantize(x.copy(), scale, offset) - x).max() <= 1.5 * scale[0]
    middle = (low + high) / 2 / scale + offset
    free = np.abs((low + high) / 2 / scale) < 127
    assert np.abs(middle[free] + 0.5).max() <= 0.51
    # A mean far from 0 takes none of the range: with one zero point the step is that of the whole tensor.
    y = (x - x.mean(axis=0) + 3).astype(np.float32)
    assert shifted_parameters(y.min(axis=0), y.max(axis=0))[0][0] < 0.9 * width / 255


def test_zeros_alone_have_scale_one():
    scale, offset = shifted_parameters(np.zeros(3, np.float32), np.zeros(3, np.float32))
    assert scale[0] == 1
    np.testing.assert_array_equal(offset, 0)


def test_weights_are_quantized_as_golden_stick_does():
    weight = np.random.default_rng(1).normal(size=(40, 96)).astype(np.float32)
    weight[3] *= 1000
    scale, _, expected = golden_stick_quantizer(weight, symmetric=True, axis=0)

    np.testing.assert_array_equal(weight_scale(weight), scale.asnumpy().astype(np.float32))
    np.testing.assert_array_equal(fake_quantize(weight, weight_scale(weight)), expected.asnumpy())


def test_a_constant_range_has_scale_one():
    scale, offset = activation_parameters(np.float32([2.5, -1]), np.float32([2.5, 1]))
    assert scale[0] == 1
    assert offset[0] == 0
    assert scale[1] == np.float32(2 / 255)


def test_a_row_of_zeros_stays_zero():
    weight = np.zeros((2, 4), np.float32)
    weight[1] = 1
    assert weight_scale(weight)[0] == 1
    np.testing.assert_array_equal(fake_quantize(weight, weight_scale(weight))[0], 0)


@pytest.mark.parametrize(("low", "high"), [(3.0, 5.0), (-9.0, -8.5), (0.5, 300.0)])
def test_a_range_that_leaves_out_zero_is_widened_to_an_int8_zero_point(low, high):
    scale = np.float32([(high - low) / 255])
    offset = np.rint(-128 - low / scale).astype(np.int32)

    scale, offset = in_int8(scale, offset)

    assert -128 <= offset[0] <= 127
    least, most = (-128 - offset[0]) * scale[0], (127 - offset[0]) * scale[0]
    assert least <= low + scale[0] / 2
    assert most >= high - scale[0] / 2


def test_a_range_that_holds_zero_is_left_as_it_is():
    scale, offset = np.float32([0.02]), np.int32([-128])
    assert in_int8(scale, offset) == (scale, offset)
