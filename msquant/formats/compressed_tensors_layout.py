"""The tensors of one linear layer in the compressed-tensors layout `int-quantized`, written and read back.

It is that of vLLM's `CompressedTensorsW8A8Int8` (vllm 0.11.0 and 0.32.0, compressed_tensors/schemes), whose
kernels (kernels/.../scaled_mm) compute

    y = input_scale * weight_scale * (weight @ (x_q - input_zero_point)) + bias
    x_q = clamp(round(x / input_scale) + input_zero_point)

with static activations; with dynamic ones `input_scale` is max|x| / 127 of each token, without a zero point.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import FloatLinear, Linear, QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.dtypes import DTYPE_CODES, cast
from msquant.formats.scales import all_positive, input_parameters, weight_scales
from msquant.schemes import W8A8, W8A8_DYNAMIC, Scheme

QUANT_METHOD: Literal["compressed-tensors"] = "compressed-tensors"
"""What `quant_method` is in `config.json`."""

STATIC_PARTS = ("weight", "weight_scale", "input_scale", "input_zero_point")
"""The tensors of a layer with static activations; the layer's own `bias` is the only other one."""

DYNAMIC_PARTS = ("weight", "weight_scale")
"""The tensors of a layer with per-token activations, likewise."""

SERVED_DTYPES = ("bfloat16", "float16", "float32")
"""Model dtypes that vLLM accepts (`CompressedTensorsConfig.get_supported_act_dtypes`)."""

# Bits of an input scale of which vLLM recovers the zero point exactly, see `exact_scale`.
_SCALE_BITS = 16


def linear_specs(
    module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str, bias: bool
) -> list[TensorSpec]:
    """The tensors that `encode_linear` makes of a quantized layer.

    Args:
        module: its name.
        shape: `(N, K)`.
        scheme: one of `compressed_tensors_schemes.DESCRIBED`, not in floating point.
        dtype: the model's.
        bias: whether it has one.
    """
    rows = shape[:1]
    parts: list[tuple[str, str, tuple[int, ...]]] = [
        ("weight", "I8", shape),
        ("weight_scale", "F32", (*rows, 1)),
    ]
    if scheme.is_static:
        parts += [("input_scale", "F32", (1,)), ("input_zero_point", "I8", (1,))]
    if bias:
        parts.append(("bias", DTYPE_CODES[dtype], rows))
    return [TensorSpec(f"{module}.{part}", code, part_shape) for part, code, part_shape in parts]


def encode_linear(module: str, linear: Linear, dtype: str) -> dict[str, NDArray[Any]]:
    """The tensors that `linear` is stored as.

    Static activations are always stored with their zero point, be it 0: vLLM's kernel for a CPU with AMX
    takes symmetric static activations for dynamic ones.

    Args:
        module: its name, for example `model.layers.0.self_attn.q_proj`.
        linear: in floating point, or W8A8 with static or per-token activations.
        dtype: the model's: `bfloat16`, `float16` or `float32`.

    Returns:
        Arrays by full tensor name. Floating point: `weight` and `bias` in `dtype`. W8A8: `weight` int8 [N,
        K], `weight_scale` float32 [N, 1] and, with static activations, `input_scale` float32 [1], rounded to
        `dtype` and to 16 bits, and `input_zero_point` int8 [1]. `bias`, if there is one, in `dtype` [N].

    Raises:
        CheckpointError: a scale is not positive and finite; the zero point is no int8; a value does not fit
            `dtype`.
    """
    tensors: dict[str, NDArray[Any]] = {}
    if linear.bias is not None:
        tensors[f"{module}.bias"] = cast(f"{module}.bias", linear.bias, dtype)
    if isinstance(linear, FloatLinear):
        tensors[f"{module}.weight"] = cast(f"{module}.weight", linear.weight, dtype)
        return tensors
    tensors[f"{module}.weight"] = linear.weight
    tensors[f"{module}.weight_scale"] = weight_scales(module, linear).reshape(-1, 1)
    if linear.is_static:
        scale, zero_point = input_parameters(module, linear, dtype)
        tensors[f"{module}.input_scale"] = np.array([exact_scale(scale)], np.float32)
        tensors[f"{module}.input_zero_point"] = np.array([zero_point], np.int8)
    return tensors


def exact_scale(scale: np.float32) -> np.float32:
    """A scale rounded to 16 bits, which changes nothing in a bfloat16 or float16 model.

    vLLM computes the range `scale * (-128 - zp)` to `scale * (127 - zp)`, and from that in float32 the scale
    and the zero point again, which its CUDA kernel truncates: a range rounded by half a bit moves the zero
    point by 1. The range of a scale with 16 bits is exact.
    """
    mantissa, exponent = np.frexp(np.float64(scale))
    return np.float32(np.ldexp(np.rint(np.ldexp(mantissa, _SCALE_BITS)), exponent - _SCALE_BITS))


def decode_linear(module: str, tensors: Mapping[str, NDArray[Any]]) -> QuantizedLinear:
    """The quantized layer that `encode_linear`, or another tool, stored.

    Args:
        module: its name.
        tensors: `weight` and `weight_scale` by full name; `input_scale` where activations are static,
            `input_zero_point` where they are asymmetric too; `bias` if there is one. Scales may be in any
            floating-point dtype, and one for the whole weight.

    Raises:
        CheckpointError: a scale is not positive and finite.
    """
    weight, bias = tensors[f"{module}.weight"], tensors.get(f"{module}.bias")
    scale = np.broadcast_to(
        tensors[f"{module}.weight_scale"].astype(np.float32).reshape(-1), weight.shape[:1]
    )
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
        scheme=W8A8_DYNAMIC if input_scale is None else W8A8,
        bias=None if bias is None else bias.astype(np.float32),
        input_scale=input_scale,
        input_offset=input_offset,
    )
