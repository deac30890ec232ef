"""Smooth scales beside golden-stick's, and powers of two."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest

from msquant.kernels.smoothing import power_of_two, smooth_scale


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85])
def test_the_scale_equals_golden_sticks(alpha: float) -> None:
    from mindspore_gs.ptq.algo_modules.mindone.anti_outliers import LinearSmoother

    generator = np.random.default_rng(0)
    inputs = np.exp(generator.normal(size=64) * 2).astype(np.float32)
    weights = np.exp(generator.normal(size=64)).astype(np.float32)
    inputs[3], weights[5] = 0, 0
    expected = LinearSmoother._calculate_smooth_scale(
        SimpleNamespace(is_gqa_wo_layer=False), ms.Tensor(inputs), ms.Tensor(weights), alpha, 4, 4
    ).asnumpy()
    ours = smooth_scale(inputs, weights, alpha)
    np.testing.assert_allclose(np.delete(ours, [3, 5]), np.delete(expected, [3, 5]), rtol=1e-6)
    assert ours[3] == ours[5] == 1


def test_powers_of_two_change_no_digit() -> None:
    scale = power_of_two(np.array([0.3, 1.0, 1.5, 100.0], np.float32))
    np.testing.assert_array_equal(scale, [0.25, 1, 2, 128])
    weight = np.random.default_rng(0).normal(size=4).astype(np.float32)
    np.testing.assert_array_equal(weight / scale * scale, weight)
