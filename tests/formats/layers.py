"""Random quantized layers, and what they compute by their definition."""

import numpy as np

from msquant.checkpoint.weights import QuantizedLinear
from msquant.schemes import W8A8, W8A8_DYNAMIC


def random_layer(
    rows: int, columns: int, seed: int, *, dynamic: bool = False, bias: bool = False
) -> QuantizedLinear:
    """A W8A8 layer with static activations, or with per-token ones."""
    rng = np.random.default_rng(seed)
    return QuantizedLinear(
        weight=rng.integers(-128, 128, (rows, columns), dtype=np.int8),
        weight_scale=rng.uniform(1e-4, 1e-2, rows).astype(np.float32),
        scheme=W8A8_DYNAMIC if dynamic else W8A8,
        bias=rng.normal(size=rows).astype(np.float32) if bias else None,
        input_scale=None if dynamic else rng.uniform(0.01, 0.1, 1).astype(np.float32),
        input_offset=None if dynamic else rng.integers(-128, 128, 1, dtype=np.int32),
    )


def ideal_output(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """`weight_scale * input_scale * (weight @ (x_q - input_offset)) + bias` in float64.

    A token's scale is `max|x| / 127` where activations are per token.
    """
    if linear.input_scale is None or linear.input_offset is None:
        scale, offset = np.abs(x).max(axis=-1, keepdims=True) / 127, 0
    else:
        scale, offset = np.float64(linear.input_scale[0]), int(linear.input_offset[0])
    if linear.input_reciprocal is None:
        rounded = np.round(x / scale) + offset
    else:
        rounded = np.round(x * np.float64(linear.input_reciprocal[0]) + offset)
    x_q = np.clip(rounded, -128, 127)
    y = scale * ((x_q - offset) @ linear.weight.astype(np.float64).T) * linear.weight_scale
    return y if linear.bias is None else y + linear.bias
