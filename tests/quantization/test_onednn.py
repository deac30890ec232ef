"""The int8 kernel is taken only where it is exact."""

import os

import numpy as np
import pytest
from numpy.typing import NDArray

from msquant.kernels import onednn


def saturating(a: NDArray[np.uint8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    """What `vpmaddubsw` does on processors without VNNI: pairs of products are added in 16 bits."""
    products = a[:, None, :].astype(np.int32) * b[None, :, :]
    return np.clip(products[..., ::2] + products[..., 1::2], -(2**15), 2**15 - 1).sum(axis=2, dtype=np.int32)


def exact(a: NDArray[np.uint8], b: NDArray[np.int8]) -> NDArray[np.int32]:
    return a.astype(np.int32) @ b.T.astype(np.int32)


def test_a_saturating_kernel_is_found_out() -> None:
    assert onednn.is_exact(exact)
    assert not onednn.is_exact(saturating)


def test_other_processors_and_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    load = onednn._library.__wrapped__
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert load() is None
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load() is None


def test_random_products_are_exact() -> None:
    gemm = onednn.load_int8()
    if gemm is None:
        pytest.skip("this processor has no exact int8 instructions")
    generator = np.random.default_rng(0)
    for rows, columns, channels in [(1, 576, 1536), (2, 7, 65), (64, 33, 576), (0, 33, 576)]:
        a = generator.integers(0, 256, (rows, channels), np.uint8)
        b = generator.integers(-128, 128, (columns, channels), np.int8)
        np.testing.assert_array_equal(gemm(a, b), exact(a, b))


def test_large_matrices_are_split_over_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    int8, single = onednn.load_int8(), onednn.load_float()
    if int8 is None or single is None:
        pytest.skip("this processor has no exact int8 instructions")
    monkeypatch.setattr(onednn, "SPLIT_BYTES", 1 << 10)
    monkeypatch.setattr(onednn, "threads", lambda: 3)
    generator = np.random.default_rng(0)
    for rows in (1, 5):
        a = generator.integers(0, 256, (rows, 64), np.uint8)
        b = generator.integers(-128, 128, (100, 64), np.int8)
        np.testing.assert_array_equal(int8(a, b), exact(a, b))
        x, w = a.astype(np.float32), b.astype(np.float32)
        np.testing.assert_array_equal(single(x, w), x @ w.T)
    assert len(onednn._pool()._threads) > 0


def test_half_of_the_processors_compute() -> None:
    assert onednn.threads() == max(1, len(os.sched_getaffinity(0)) // 2)
