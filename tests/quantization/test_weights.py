"""Weights to int8 beside golden-stick's own quantizer."""

import mindspore as ms
import numpy as np
import pytest
import torch

from msquant.checkpoint.weights import QuantizedLinear
from msquant.kernels import golden_stick, weight_rounding
from msquant.kernels.weight_rounding import column_maxima, for_blocks, quantize_weight, smoothed_and_rounded
from msquant.schemes import Quant, Scheme, parse_scheme


def random_weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    scales = np.exp(generator.normal(size=(rows, 1)) * 3)
    return (generator.normal(size=(rows, columns)) * scales).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 8), (64, 96), (300, 1000)])
def test_every_bit_equals_golden_sticks(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    golden_stick.load()
    from mindspore_gs.ptq.basic_functions.basic_quant_func import quant_tensor

    monkeypatch.setattr(weight_rounding, "BLOCK_BYTES", 10_000)
    weight = random_weight(*shape)
    weight[0, :4] = [1.0, -1.0, 0.5, 0.0]
    theirs_scale, _, theirs = quant_tensor(
        ms.Tensor(weight), ms.ops.min, ms.ops.max, False, True, False, 0, ms.int8, 0
    )
    ours, scale, _ = quantize_weight(weight)
    assert ours.dtype == np.int8
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs.asnumpy())
    np.testing.assert_array_equal(scale, theirs_scale.asnumpy().reshape(-1).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_rounded_up_to_what_an_engine_holds_before_the_weights_are_rounded(dtype: str) -> None:
    weight = random_weight(300, 64)
    rounded, scale, _ = quantize_weight(weight, dtype)
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


def test_scales_that_two_dtypes_hold() -> None:
    """Those of int4 groups; of tiny ones float16 holds few digits, and the integers are of what it holds."""
    quant = parse_scheme("W4A8_DYNAMIC_G32").weights
    assert quant is not None
    sizes = np.float32(10) ** np.arange(-12, 3)[:, None]
    weight = random_weight(15, 64) * sizes
    rounded, scale, _ = quantize_weight(weight, "bfloat16 and float16", quant)
    for dtype in (torch.bfloat16, torch.float16):
        np.testing.assert_array_equal(torch.from_numpy(scale).to(dtype).float().numpy(), scale)
    alone = quantize_weight(weight, "bfloat16", quant)
    large = scale >= 2**-17
    assert large.any()
    assert not large.all()
    np.testing.assert_array_equal(scale[large], alone.scale[large])
    each = np.repeat(scale, 32, axis=1)
    np.testing.assert_array_equal(rounded, np.clip(np.rint(weight / each), -8, 7))
    assert (np.abs(rounded * each - weight) <= 0.51 * each).all()


def test_rows_are_clipped_before_they_are_rounded() -> None:
    weight, scale = random_weight(5, 32), np.exp(np.random.default_rng(1).normal(size=32)).astype(np.float32)
    ratio = np.float32([1, 0.9, 0.8, 0.5, 0.3])
    limit = np.abs(weight * scale).max(axis=1) * ratio
    rounded, step, _ = quantize_weight(np.clip(weight * scale, -limit[:, None], limit[:, None]))
    expected = rounded * step[:, None]
    np.testing.assert_allclose(smoothed_and_rounded(weight, scale, ratio), expected, rtol=1e-6)
    assert (np.abs(expected).max(axis=1) <= limit * 1.01).all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight = random_weight(4, 16)
    weight[2] = 0
    rounded, scale, _ = quantize_weight(weight)
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


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("group_size", [8, 32, None])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
def test_groups_of_any_bits_equal_compressed_tensors(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    """The package's own scales (`calculate_qparams`) and rounding, of vLLM's and llm-compressor's format."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = random_weight(300, 64)
    weight[5, :32] = 0
    arguments = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="group" if group_size else "channel",
        group_size=group_size,
    )
    groups = torch.from_numpy(weight).reshape(300, -1, group_size or 64)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    theirs = quantize(torch.from_numpy(weight), scale, zero_point, arguments).numpy()
    quant = Quant(bits, "group" if group_size else "channel", group_size, symmetric)
    ours, scales, offset = quantize_weight(weight, quant=quant)
    assert scales.shape == ((300, 64 // group_size) if group_size else (300,))
    filled = groups.abs().amax(-1).reshape(scales.shape).numpy() > 0
    np.testing.assert_allclose(scales[filled], scale.numpy().reshape(scales.shape)[filled], rtol=2e-7)
    # A quotient that lies on a tie may be rounded either way.
    if symmetric:
        assert offset is None
        assert np.count_nonzero(ours != theirs) <= 2
    else:
        assert offset is not None
        assert offset.dtype == np.int32
        assert np.count_nonzero(offset[filled] != zero_point.numpy().reshape(scales.shape)[filled]) <= 2
        # The package divides by a scale of 0 where all is 0.
        unlike = (ours != theirs) & np.repeat(filled.reshape(300, -1), group_size or 64, axis=1)
        assert np.count_nonzero(unlike) <= 2 * (group_size or 64)
    linear = QuantizedLinear(ours, scales, Scheme(quant), weight_offset=offset)
    assert not linear.float_weight[5, :32].any()
    kept = smoothed_and_rounded(weight, np.ones(64, np.float32), quant=quant)
    np.testing.assert_array_equal(linear.float_weight, kept)
    # By half a step, and by another half where the zero point is rounded.
    steps = scales.reshape(300, -1, 1) * (0.501 if symmetric else 1.001)
    assert (
        np.abs(linear.float_weight - weight).reshape(300, scales.reshape(300, -1).shape[1], -1) <= steps
    ).all()
