"""The scales of a quantized layer as every format stores them, checked."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import INT8_MAX, INT8_MIN, QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.dtypes import MODEL_DTYPES, cast

# How far from a static scale the one may be that is stored for it, below and above.
_NARROWER, _WIDER = np.float32(0.992), np.float32(1.01)


def weight_scales(module: str, linear: QuantizedLinear) -> NDArray[np.float32]:
    """The scales of a layer's rows, float32 `[N]`, or of their groups, `[N, G]`.

    It is 1 for a row or a group of zeros, whose own scale is 0.

    Raises:
        CheckpointError: one is not positive and finite.
    """
    groups = linear.weight.reshape(*linear.weight_scale.shape, -1)
    empty = (linear.weight_scale == 0) & ~groups.any(axis=-1)
    scales = np.where(empty, np.float32(1), linear.weight_scale).astype(np.float32)
    if not all_positive(scales):
        raise CheckpointError(
            f"its weight scales are not positive and finite (from {linear.weight_scale.min():.4g} to "
            f"{linear.weight_scale.max():.4g})",
            where=module,
            remedy="keep this layer in floating point",
        )
    return scales


def input_parameters(module: str, linear: QuantizedLinear, dtype: str) -> tuple[np.float32, NDArray[np.int8]]:
    """The input scale of a static layer in the model's dtype, and its zero points, `[1]` or `[K]`.

    Engines hold the scale in the model's dtype, and all formats store the same number, so that a model can be
    converted between them without a loss. vllm-ascend multiplies by a reciprocal that it rounds to that
    dtype, too: a scale that the dtype does not hold becomes the neighbour whose reciprocal survives that
    best, at most 0.8 % below or 1 % above. Next to the nearest one, s times the reciprocal of s is up to 4e-3
    away from 1 in bfloat16.

    Args:
        module: its name, for the error.
        linear: with static activations.
        dtype: the model's: `bfloat16`, `float16` or `float32`.

    Raises:
        CheckpointError: the scale is not positive and finite in that dtype; the zero point is no int8.
    """
    if linear.input_scale is None or linear.input_offset is None:
        raise CheckpointError("its activations are quantized per token", where=module)
    nearest = np.float32(cast(f"{module}.input_scale", linear.input_scale.reshape(1), dtype)[0])
    exact = np.float32(linear.input_scale.reshape(1)[0])
    scale = nearest if nearest in (0, exact) else _reciprocable(exact, nearest, dtype)
    zero_points = linear.input_offset
    if not scale > 0:
        raise CheckpointError(
            f"its input scale {linear.input_scale.item():.4g} is not positive and finite in {dtype}",
            where=module,
            remedy="calibrate with more and other text, or keep this layer in floating point",
        )
    if (outside := zero_points[(zero_points < INT8_MIN) | (zero_points > INT8_MAX)]).size:
        raise CheckpointError(f"its zero point {outside[0]} is outside of [-128, 127]", where=module)
    return scale, zero_points.astype(np.int8)


def reciprocable_scales(scales: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Scales in the model's dtype, as an engine that also rounds their reciprocals to it best computes with.

    See `input_parameters`.

    Args:
        scales: float32 `[N]`.
        dtype: the model's.

    Returns:
        float32 `[N]`, each 0.8 % below to 1 % above where the dtype does not hold it; 0 or infinite where it
        is out of the dtype's reach.
    """
    nearest = held_scales(scales, dtype)
    away = np.flatnonzero((nearest != scales) & (nearest > 0) & np.isfinite(nearest))
    for place in away:
        nearest[place] = _reciprocable(scales[place], nearest[place], dtype)
    return nearest


def _reciprocable(scale: np.float32, nearest: np.float32, dtype: str) -> np.float32:
    """The number of a dtype near `scale` whose product with its own rounded reciprocal is closest to 1."""
    kind = np.dtype(MODEL_DTYPES[dtype])
    # Positive floating-point numbers are in the order of their bits.
    bits = np.array([scale * _NARROWER, scale * _WIDER], np.float32).astype(kind).view(f"u{kind.itemsize}")
    near = np.arange(bits[0], bits[1] + 1, dtype=bits.dtype).view(kind).astype(np.float32)
    near = np.append(near[(near >= scale * _NARROWER) & (near <= scale * _WIDER)], nearest)
    with np.errstate(divide="ignore", over="ignore"):
        away = np.abs(near.astype(np.float64) * (1 / near).astype(kind).astype(np.float64) - 1)
    return np.float32(near[np.lexsort((np.abs(near - scale), away))[0]])


def rounded_reciprocal(input_scale: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """What an engine multiplies inputs by that keeps a scale and its reciprocal in the model's dtype.

    Args:
        input_scale: float32 `[1]`.
        dtype: the model's.

    Returns:
        float32 `[1]`; infinite in float16 where the scale is below 1.6e-5.
    """
    kind = MODEL_DTYPES[dtype]
    with np.errstate(divide="ignore", over="ignore"):
        return (1 / input_scale.astype(kind).astype(np.float32)).astype(kind).astype(np.float32)


def held_scales(scales: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Scales as an engine holds them that keeps them in the model's dtype, float32 of the same shape."""
    with np.errstate(over="ignore"):
        return scales.astype(MODEL_DTYPES[dtype]).astype(np.float32)


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


def all_signed(scales: NDArray[np.floating[Any]]) -> bool:
    """Whether every scale is finite and not 0, which is enough where inputs stay in floating point.

    AutoRound makes symmetric weights with scales of either sign, so that the longer half of the range lies
    where a group reaches farther.
    """
    return bool((np.isfinite(scales) & (scales != 0)).all())


def all_positive(scales: NDArray[np.floating[Any]]) -> bool:
    """Whether every scale is positive and finite."""
    return bool((np.isfinite(scales) & (scales > 0)).all())
