"""The scales of a quantized layer as every format stores them, checked."""

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import INT8_MAX, INT8_MIN, QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.dtypes import cast


def weight_scales(module: str, linear: QuantizedLinear) -> NDArray[np.float32]:
    """The scales of a layer's rows, float32 `[N]`; 1 for a row of zeros, whose own scale is 0.

    Raises:
        CheckpointError: one is not positive and finite.
    """
    empty = (linear.weight_scale == 0) & ~linear.weight.any(axis=1)
    scales = np.where(empty, np.float32(1), linear.weight_scale).astype(np.float32)
    if not all_positive(scales):
        raise CheckpointError(
            f"its weight scales are not positive and finite (from {linear.weight_scale.min():.4g} to "
            f"{linear.weight_scale.max():.4g})",
            where=module,
            remedy="keep this layer in floating point",
        )
    return scales


def input_parameters(module: str, linear: QuantizedLinear, dtype: str) -> tuple[np.float32, int]:
    """The input scale of a static layer, rounded to the model's dtype, and its zero point.

    Engines hold the scale in the model's dtype, and all formats store the same number, so that a model can be
    converted between them without a loss.

    Args:
        module: its name, for the error.
        linear: with static activations.
        dtype: the model's: `bfloat16`, `float16` or `float32`.

    Raises:
        CheckpointError: the scale is not positive and finite in that dtype; the zero point is no int8.
    """
    if linear.input_scale is None or linear.input_offset is None:
        raise CheckpointError("its activations are quantized per token", where=module)
    scale = np.float32(cast(f"{module}.input_scale", linear.input_scale.reshape(1), dtype)[0])
    zero_point = int(linear.input_offset.reshape(1)[0])
    if not scale > 0:
        raise CheckpointError(
            f"its input scale {linear.input_scale.item():.4g} is not positive and finite in {dtype}",
            where=module,
            remedy="calibrate with more and other text, or keep this layer in floating point",
        )
    if not INT8_MIN <= zero_point <= INT8_MAX:
        raise CheckpointError(f"its zero point {zero_point} is outside of [-128, 127]", where=module)
    return scale, zero_point


def deq_scales(module: str, linear: QuantizedLinear, input_scale: np.float32) -> NDArray[np.float32]:
    """`input_scale * weight_scale`, float32 `[N]`: what turns integer sums into the layer's output.

    Raises:
        CheckpointError: as `weight_scales`, or a product does not fit float32.
    """
    with np.errstate(over="ignore"):
        products = (np.float64(input_scale) * weight_scales(module, linear)).astype(np.float32)
    if not all_positive(products):
        raise CheckpointError(
            f"the products of its scales are not positive and finite (input scale {input_scale:.4g}, weight "
            f"scales from {linear.weight_scale.min():.4g} to {linear.weight_scale.max():.4g})",
            where=module,
            remedy="calibrate with more and other text, or keep this layer in floating point",
        )
    return products


def row_scales(deq_scale: NDArray[np.float32], input_scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scales of rows, of which only the product with the input's scale is stored; float32 `[N]`.

    Multiplied by the input's scale and rounded, they give the same bits again if what is stored was such a
    product: the quotient either rounds to the scale that it was made of, or to one whose product does.

    Args:
        deq_scale: float32 `[N]`, the products.
        input_scale: float32 `[1]`.
    """
    return (deq_scale.astype(np.float64) / np.float64(input_scale[0])).astype(np.float32)


def all_positive(scales: NDArray[np.floating]) -> bool:
    """Whether every scale is positive and finite."""
    return bool((np.isfinite(scales) & (scales > 0)).all())
