"""The tensors of one linear layer in the compressed-tensors layout `int-quantized`, written and read back.

It is that of vLLM's `CompressedTensorsW8A8Int8` and, with one int4 weight in a byte,
`CompressedTensorsW4A8Int` (vllm 0.11.0 and 0.32.0, compressed_tensors/schemes), whose kernels
(kernels/.../scaled_mm) compute

    y = input_scale * weight_scale * (weight @ (x_q - input_zero_point)) + bias
    x_q = clamp(round(x / input_scale) + input_zero_point)

with static activations; with dynamic ones `input_scale` is max|x| / 127 of each token, without a zero point.
int4 weights may have a scale for each group of columns.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.compressed_tensors.packed import groups_of
from msquant.formats.scales import all_positive
from msquant.schemes import W8A8, W8A8_DYNAMIC, Quant, Scheme

STATIC_PARTS = ("weight", "weight_scale", "input_scale", "input_zero_point")
"""The tensors of a layer with static activations; the layer's own `bias` is the only other one."""

DYNAMIC_PARTS = ("weight", "weight_scale")
"""The tensors of a layer with per-token activations, likewise."""

SERVED_DTYPES = ("bfloat16", "float16", "float32")
"""Model dtypes that vLLM accepts (`CompressedTensorsConfig.get_supported_act_dtypes`)."""

# Bits of an input scale of which vLLM recovers the zero point exactly, see `exact_scale`.
_SCALE_BITS = 16


def exact_scale(scale: np.float32) -> np.float32:
    """A scale rounded to 16 bits, which changes nothing in a bfloat16 or float16 model.

    vLLM computes the range `scale * (-128 - zp)` to `scale * (127 - zp)`, and from that in float32 the scale
    and the zero point again, which its CUDA kernel truncates: a range rounded by half a bit moves the zero
    point by 1. The range of a scale with 16 bits is exact.
    """
    mantissa, exponent = np.frexp(np.float64(scale))
    return np.float32(np.ldexp(np.rint(np.ldexp(mantissa, _SCALE_BITS)), exponent - _SCALE_BITS))


def takes(scheme: Scheme) -> bool:
    """Whether a layer is stored so: int8 weights with int8 inputs, or int4 weights with per-token ones."""
    return scheme in (W8A8, W8A8_DYNAMIC) or (
        scheme.inputs == W8A8_DYNAMIC.inputs
        and scheme.weights is not None
        and scheme.is_int4
        and scheme.weights.symmetric
    )


def scale_shape(quant: Quant, shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of `weight_scale` of a weight `[N, K]`: one a row, or one a group of it."""
    return shape[0], groups_of(quant, shape[1])


def decode_linear(
    module: str, tensors: Mapping[str, NDArray[Any]], scheme: Scheme | None = None
) -> QuantizedLinear:
    """The quantized layer that `encode_linear`, or another tool, stored.

    Args:
        module: its name.
        tensors: `weight` and `weight_scale` by full name; `input_scale` where activations are static,
            `input_zero_point` where they are asymmetric too; `bias` if there is one. Scales may be in any
            floating-point dtype, and one for the whole weight.
        scheme: as `config.json` has it; None for int8 weights.

    Raises:
        CheckpointError: a scale is not positive and finite.
    """
    weight, bias = tensors[f"{module}.weight"], tensors.get(f"{module}.bias")
    scale = tensors[f"{module}.weight_scale"].astype(np.float32)
    if scheme is None or scheme.weights is None or scheme.weights.group_size is None:
        scale = np.broadcast_to(scale.reshape(-1), weight.shape[:1])
    input_scale, input_offset = None, None
    if f"{module}.input_scale" in tensors:
        input_scale = tensors[f"{module}.input_scale"].astype(np.float32).reshape(1)
        zero_point = tensors.get(f"{module}.input_zero_point", np.zeros(1, np.int8))
        input_offset = zero_point.astype(np.int32).reshape(1)
    if not all_positive(scale) or (input_scale is not None and not all_positive(input_scale)):
        raise CheckpointError("its scales are not positive and finite", where=module)
    return QuantizedLinear(
        weight=weight,
        weight_scale=scale.copy(),
        scheme=scheme or (W8A8_DYNAMIC if input_scale is None else W8A8),
        bias=None if bias is None else bias.astype(np.float32),
        input_scale=input_scale,
        input_offset=input_offset,
    )
