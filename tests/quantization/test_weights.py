"""Weights to int8 beside golden-stick's own quantizer."""

import mindspore as ms
import numpy as np
import pytest
import torch

from msquant.kernels import golden_stick, weights
from msquant.kernels.weight_rounding import column_maxima, for_blocks, quantize_weight, smoothed_and_rounded


def random_weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    scales = np.exp(generator.normal(size=(rows, 1)) * 3)
    return (generator.normal(size=(rows, columns)) * scales).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 8), (64, 96), (300, 1000)])
def test_every_bit_equals_golden_sticks(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    golden_stick.load()
    from mindspore_gs.ptq.basic_functions.basic_quant_func import quant_tensor

    monkeypatch.setattr(weights, "BLOCK_BYTES", 10_000)
    weight = random_weight(*shape)
    weight[0, :4] = [1.0, -1.0, 0.5, 0.0]
    theirs_scale, _, theirs = quant_tensor(
        ms.Tensor(weight), ms.ops.min, ms.ops.max, False, True, False, 0, ms.int8, 0
    )
    ours, scale = quantize_weight(weight)
    assert ours.dtype == np.int8
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs.asnumpy())
    np.testing.assert_array_equal(scale, theirs_scale.asnumpy().reshape(-1).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_rounded_up_to_what_an_engine_holds_before_the_weights_are_rounded(dtype: str) -> None:
    weight = random_weight(300, 64)
    rounded, scale = quantize_weight(weight, dtype)
    exact = quantize_weight(weight)[1]
    held = torch.from_numpy(scale).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(held, scale)
    assert (scale >= exact).all()
    assert (scale != exact).any()
    # By less than one unit in the last place; below 6e-5 those of float16 have all the same size.
    assert (scale <= np.maximum(exact * (1 + 2**-7), exact + 2**-24)).all()
    expected = np.clip(np.rint(weight / scale[:, None]), -128, 127)
    np.testing.assert_array_equal(rounded, expected)
    # What the engine multiplies is within half a step of the weight.
    assert (np.abs(rounded * held[:, None] - weight) <= 0.5001 * scale[:, None]).all()


def test_rows_are_clipped_before_they_are_rounded() -> None:
    weight, scale = random_weight(5, 32), np.exp(np.random.default_rng(1).normal(size=32)).astype(np.float32)
    ratio = np.float32([1, 0.9, 0.8, 0.5, 0.3])
    limit = np.abs(weight * scale).max(axis=1) * ratio
    rounded, step = quantize_weight(np.clip(weight * scale, -limit[:, None], limit[:, None]))
    expected = rounded * step[:, None]
    np.testing.assert_allclose(smoothed_and_rounded(weight, scale, ratio), expected, rtol=1e-6)
    assert (np.abs(expected).max(axis=1) <= limit * 1.01).all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight = random_weight(4, 16)
    weight[2] = 0
    rounded, scale = quantize_weight(weight)
    assert not rounded[2].any()
    assert scale[2] == 1


def test_column_maxima_are_of_the_magnitude() -> None:
    np.testing.assert_array_equal(column_maxima(np.array([[1, -3], [-2, 2]], np.float32)), [2, 3])
    np.testing.assert_array_equal(column_maxima(np.zeros((0, 3), np.float32)), [0, 0, 0])


def test_an_error_in_a_thread_is_raised() -> None:
    def work(rows: slice) -> None:
        raise OSError("in a thread")

    with pytest.raises(OSError, match="in a thread"):
        for_blocks(np.zeros((4, 4), np.float32), work)
