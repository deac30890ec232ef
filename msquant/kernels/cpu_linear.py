"""Linear layers in NumPy, with the arithmetic of `msquant.models.cells`."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import (
    INT8_MAX,
    INT8_MIN,
    FloatLinear,
    Linear,
    QuantizedLinear,
    as_computed,
    token_scales,
)
from msquant.kernels import onednn
from msquant.kernels.integer_product import product_by_weight

Array = NDArray[np.float32]
Weight = TypeVar("Weight", np.int8, np.float32)
Layer = Callable[[Array], Array]
"""`[T, K]` to `[T, N]`."""

# Up to so many, reading the weights takes the time, and NumPy's threads are of no use.
_FEW_ROWS = 8


def linear_layer(*linears: Linear) -> Layer:
    """Build the layer that computes several linears of the same input, their outputs side by side.

    They are one product where they quantize the input alike, as they mostly do.
    """
    linears = tuple(map(as_computed, linears))
    first = linears[0]
    if isinstance(first, FloatLinear):
        floats = [linear for linear in linears if isinstance(linear, FloatLinear)]
        if len(floats) == len(linears):
            return _FloatLayer(floats)
    else:
        alike = [
            linear for linear in linears if isinstance(linear, QuantizedLinear) and _alike(linear, first)
        ]
        if len(alike) == len(linears):
            return _Int8Layer(alike)
    layers = [linear_layer(linear) for linear in linears]
    return lambda x: np.concatenate([layer(x) for layer in layers], axis=1)


def _alike(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    if a.scheme.without_cache != b.scheme.without_cache:
        return False
    if a.input_offset is not None and b.input_offset is not None:
        same_offsets = np.array_equal(a.input_offset, b.input_offset)
    else:
        same_offsets = a.input_offset is b.input_offset
    return same_offsets and a.input_scale == b.input_scale and a.input_reciprocal == b.input_reciprocal


class _FloatLayer:
    """`x W^T + b`."""

    def __init__(self, linears: Sequence[FloatLinear]) -> None:
        self._weight = _stack([linear.weight for linear in linears])
        self._bias = _biases(linears)
        self._product = onednn.load_float()

    def __call__(self, x: Array) -> Array:
        if self._product is not None and len(x) <= _FEW_ROWS:
            y = self._product(np.ascontiguousarray(x), self._weight)
        else:
            y = x @ self._weight.T
        if self._bias is not None:
            y += self._bias
        return y


class _Int8Layer:
    """Integer weights and int8 inputs; see `msquant.models.cells.Int8Linear` for the formula."""

    def __init__(self, linears: Sequence[QuantizedLinear]) -> None:
        first = linears[0]
        self._input_scale: np.float32 | None = None
        self._input_reciprocal: np.float32 | None = None
        offset = np.zeros(1, np.float32)
        if first.input_scale is not None and first.input_offset is not None:
            self._input_scale, offset = (
                np.float32(first.input_scale[0]),
                first.input_offset.astype(np.float32),
            )
            if first.input_reciprocal is not None:
                self._input_reciprocal = np.float32(first.input_reciprocal[0])
        # The offset is taken off before the product: x_q - z lies between these. `[1]` or `[K]` all of them.
        self._offset, self._lowest, self._highest = offset, INT8_MIN - offset, INT8_MAX - offset
        weights, output_scales = zip(*(linear.factors for linear in linears), strict=True)
        weight = _stack(weights)
        if weight.dtype != np.int8:
            self._product: Layer = lambda quantized: quantized @ weight.T
        else:
            self._product = product_by_weight(weight, self._lowest, self._highest)
        self._output_scale = np.concatenate(output_scales)
        if self._input_scale is not None:
            self._output_scale = self._output_scale * self._input_scale
        self._bias = _biases(linears)

    def __call__(self, x: Array) -> Array:
        if self._input_scale is None:
            scale = token_scales(x)
            quantized = np.rint(x / scale)
        elif self._input_reciprocal is None:
            quantized = np.rint(x / self._input_scale)
        else:
            # The zero point is added before: it decides where ties go.
            quantized = np.rint(x * self._input_reciprocal + self._offset)
            quantized -= self._offset
        np.maximum(quantized, self._lowest, out=quantized)
        np.minimum(quantized, self._highest, out=quantized)
        y = self._product(quantized)
        y *= self._output_scale
        if self._input_scale is None:
            y *= scale
        if self._bias is not None:
            y += self._bias
        return y


def _stack(weights: Sequence[NDArray[Weight]]) -> NDArray[Weight]:
    """One matrix with all rows; a single one is not copied."""
    return np.ascontiguousarray(weights[0]) if len(weights) == 1 else np.concatenate(weights)


def _biases(linears: Sequence[Linear]) -> Array | None:
    if all(linear.bias is None for linear in linears):
        return None
    absent = np.float32(0)
    return np.concatenate(
        [np.full(len(linear.weight), absent) if linear.bias is None else linear.bias for linear in linears]
    )
