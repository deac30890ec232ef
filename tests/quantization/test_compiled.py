"""The compiled loops against NumPy's own steps, to the bit."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.fp8 import SHIFT, VALUES
from msquant.kernels.bfloat16_rounding import quantize_bfloat16
from msquant.kernels.compiled import (
    bfloat16_maxima,
    float8_maxima,
    round_bfloat16,
    round_float8,
    round_smoothed,
    smoothed_maxima,
)
from msquant.kernels.weight_rounding import quantize_smoothed, quantize_weight
from msquant.schemes import Quant

# Lengths that fill a vector register, and that do not.
LENGTHS = (1, 7, 64, 131)


def bfloat16(*shape: int) -> np.ndarray:
    """Finite codes of all magnitudes, subnormal numbers and both zeros among them."""
    codes = np.random.default_rng(0).integers(0, 0x7F80, shape, np.uint16)
    codes[..., ::3] |= 0x8000
    codes[..., 0] = 0x8000
    return codes


@pytest.mark.parametrize("length", LENGTHS)
def test_bfloat16(length: int) -> None:
    codes = bfloat16(33, length)
    values = codes.view(ml_dtypes.bfloat16).astype(np.float32)
    greatest = np.abs(values).max(axis=1)
    found = (bfloat16_maxima(codes).astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(found, greatest)
    scale = np.where(greatest == 0, 1, greatest / 127.4).astype(np.float32)
    for high in (7, 127):
        out = np.empty(codes.shape, np.int8)
        steps = scale * np.float32(127 / high)
        round_bfloat16(codes, steps, high, out)
        assert np.array_equal(out, np.minimum(np.rint(values / steps[:, None]), high).astype(np.int8))
        assert len(np.unique(out)) > 2 or length == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_float8(length: int) -> None:
    codes = np.random.default_rng(1).integers(0, 256, (40, length)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    assert np.array_equal(float8_maxima(codes), (codes & 0x7F).max(axis=1))
    factors = np.linspace(0.01, 0.284, 40, dtype=np.float32)
    out = np.empty(codes.shape, np.int8)
    round_float8(codes, factors * SHIFT, 127, out)
    assert np.array_equal(
        out, np.minimum(np.rint(VALUES[codes] * factors[:, None]), 127).clip(-128).astype(np.int8)
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_smoothed(length: int) -> None:
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((12, 2, length)).astype(np.float32)
    weight[4] = 0
    smooth = generator.uniform(0.5, 2, (2, length)).astype(np.float32)
    values = (weight * smooth).reshape(-1, length)
    runs, factors = weight.reshape(-1, length), smooth.reshape(-1)
    greatest = smoothed_maxima(runs, factors)
    assert np.array_equal(greatest, np.abs(values).max(axis=1))
    scale = np.where(greatest == 0, 1, greatest / 127.4).astype(np.float32)
    out = np.empty(runs.shape, np.int8)
    round_smoothed(runs, factors, scale, 127, out)
    assert np.array_equal(out, np.minimum(np.rint(values / scale[:, None]), 127).astype(np.int8))


def test_smoothed_weights_are_rounded_as_others_are() -> None:
    generator = np.random.default_rng(4)
    weight = generator.standard_normal((48, 96)).astype(np.float32)
    smooth = generator.uniform(0.5, 2, 96).astype(np.float32)
    for quant in (Quant(8, "channel"), Quant(4, "channel")):
        found, expected = (
            quantize_smoothed(weight, smooth, quant),
            quantize_weight(weight * smooth, quant=quant),
        )
        assert np.array_equal(found.weight, expected.weight)
        assert np.array_equal(found.scale, expected.scale)


def test_what_is_not_finite_has_a_greatest_that_is_not() -> None:
    weight = np.ones((3, 64), np.float32)
    weight[0, 5], weight[1, 6] = np.nan, -np.inf
    assert np.isfinite(smoothed_maxima(weight, np.ones(64, np.float32))).tolist() == [False, False, True]


def test_runs_that_make_no_row_are_refused() -> None:
    with pytest.raises(ValueError, match="runs of 8 do not make rows of 12"):
        smoothed_maxima(np.ones((3, 8), np.float32), np.ones(12, np.float32))
    with pytest.raises(ValueError, match="is needed"):
        smoothed_maxima(np.ones((3, 8), np.float32), np.ones(8))


def test_the_greatest_integer_is_not_exceeded() -> None:
    codes = np.array([[0x4300, 0xC300]], np.uint16)  # 128 and -128
    out = np.empty((1, 2), np.int8)
    round_bfloat16(codes, np.ones(1, np.float32), 127, out)
    assert out.tolist() == [[127, -128]]


@pytest.mark.parametrize("quant", [Quant(8, "channel"), Quant(4, "channel"), Quant(4, "group", 32)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_weight_is_rounded_as_in_float32(quant: Quant, dtype: str) -> None:
    codes = (np.random.default_rng(2).standard_normal((48, 96)) / 50).astype(ml_dtypes.bfloat16)
    codes[3] = 0
    expected = quantize_weight(codes.astype(np.float32), dtype, quant)
    stored = codes.view(np.uint16)
    memory = np.empty(codes.shape, np.int8)
    found = quantize_bfloat16([(0, stored[:30]), (30, stored[30:])], codes.shape, dtype, quant, memory)
    assert found.weight is memory
    assert np.array_equal(found.weight, expected.weight)
    assert np.array_equal(found.scale, expected.scale)


@pytest.mark.parametrize("code", [0x7F80, 0xFF80, 0x7FC0])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(code: int) -> None:
    codes = bfloat16(3, 64)
    codes[1, 5] = code
    with np.errstate(over="ignore", invalid="ignore"):
        found = quantize_bfloat16([(0, codes)], codes.shape)
    assert np.isfinite(found.scale).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    assert bfloat16_maxima(np.empty(shape, np.uint16)).tolist() == [0] * shape[0]
    round_bfloat16(np.empty(shape, np.uint16), np.ones(shape[0], np.float32), 127, np.empty(shape, np.int8))


def test_memory_that_does_not_fit_is_refused() -> None:
    codes, scale, out = np.zeros((4, 8), np.uint16), np.ones(4, np.float32), np.empty((4, 8), np.int8)
    for wrong in (
        (codes.astype(np.int32), scale, out),
        (codes, scale[:3], out),
        (codes, scale.astype(np.float64), out),
        (codes, scale, out[:, :7]),
        (codes[:, ::2], scale, out[:, ::2]),
    ):
        with pytest.raises(ValueError, match="is needed"):
            round_bfloat16(wrong[0], wrong[1], 127, wrong[2])
    with pytest.raises(ValueError, match="is needed"):
        bfloat16_maxima(codes.view(np.int16))


def test_threads_that_ask_at_once_get_the_same_loops() -> None:
    """In a process of its own, where nothing is compiled yet: machine code that is freed ends it."""
    code = """
import threading
import numpy as np
from msquant.kernels import compiled

start, found = threading.Barrier(8), []

def work():
    codes = np.full((2000, 512), 0x3F80, np.uint16)
    start.wait()
    found.append(compiled.bfloat16_maxima(codes).tolist() == [0x3F80] * 2000)

threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert found == [True] * 8
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
