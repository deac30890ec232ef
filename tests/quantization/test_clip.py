"""The clip search against a direct evaluation of its definition."""

import numpy as np
import pytest

from msquant.algorithms.clip import best_clip_values, input_root

RATIOS = [1 - i / 20 for i in range(10)]


def errors(weight, inputs, ratio):
    """Mean over tokens of `(X Q(clip W) - X W)^2`, in float64, per output channel."""
    weight = weight.astype(np.float64)
    limit = np.abs(weight).max(axis=1, keepdims=True) * ratio
    clipped = np.clip(weight, -limit, limit)
    scale = 2 * np.abs(clipped).max(axis=1, keepdims=True) / 255
    quantized = np.clip(np.rint(clipped / scale), -128, 127) * scale
    return np.square(inputs @ (quantized - weight).T).mean(axis=0)


@pytest.mark.parametrize("tokens", [20, 64, 400], ids=["fewer tokens than channels", "as many", "more"])
def test_the_ratio_of_least_error_is_found_for_every_row(tokens):
    generator = np.random.default_rng(tokens)
    weight = generator.standard_t(3, size=(50, 64)).astype(np.float32)
    inputs = generator.normal(size=(tokens, 64)).astype(np.float32)
    inputs[:, 7] *= 30

    values = best_clip_values(weight, input_root(inputs), RATIOS)

    table = np.stack([errors(weight, inputs.astype(np.float64), ratio) for ratio in RATIOS])
    chosen = np.rint((1 - values / np.abs(weight).max(axis=1)) * 20).astype(int)
    assert len(set(chosen)) > 1
    # A different choice is right only where the errors agree to float32 precision.
    least, ours = table.min(axis=0), table[chosen, np.arange(50)]
    np.testing.assert_allclose(ours, least, rtol=1e-4)
    assert (chosen == table.argmin(axis=0)).mean() > 0.95


@pytest.mark.parametrize("tokens", [8, 100])
def test_the_root_has_the_inputs_gram_matrix(tokens):
    inputs = np.random.default_rng(0).normal(size=(tokens, 16)).astype(np.float32)
    root = input_root(inputs)
    assert root.shape == (min(tokens, 16), 16)
    np.testing.assert_allclose(root.T @ root, inputs.T @ inputs / tokens, atol=1e-5)


def test_a_row_of_zeros_is_left_alone():
    weight = np.zeros((2, 8), np.float32)
    weight[1] = np.linspace(-1, 1, 8)
    values = best_clip_values(weight, np.eye(8, dtype=np.float32), RATIOS)
    assert values[0] == 0
    assert values[1] > 0
