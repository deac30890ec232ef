"""The tensors of one linear layer as msModelSlim writes them for vllm-ascend, written and read back.

Read in msModelSlim (quant_service/modelslim_v1/save/ascendv1.py, `on_w8a8_static`,
`on_w8a8_dynamic_per_channel`, `on_w8a16_static_per_channel`) and vllm-ascend (quantization/methods/
w8a8_static.py, w8a8_dynamic.py, w8a16.py). Static activations, with int32 sums:

    y = deq_scale * (weight @ x_q + quant_bias),    x_q = clamp(round(x * r + input_offset))

with r the reciprocal of `input_scale`, which the engine rounds to the model's dtype as it does `input_scale`
itself. The layer's own bias is part of `quant_bias`. Per-token activations:

    y = weight_scale * s * (weight @ round(x / s)) + bias,    s = max|x| / 127 of each token

With weights alone in int8 (W8A16) the tensors are the same, and

    y = (weight_scale * weight) @ x + bias
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import FloatLinear, Linear, QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.dtypes import cast
from msquant.formats.scales import (
    all_positive,
    deq_scales,
    held_scales,
    input_parameters,
    rounded_reciprocal,
    row_scales,
    weight_scales,
)
from msquant.schemes import W8A8, W8A8_DYNAMIC, Scheme

STATIC_PARTS = ("weight", "quant_bias", "input_scale", "input_offset", "deq_scale")
"""The tensors of a W8A8 linear layer; the layer's own `bias` is the only other one."""

DYNAMIC_PARTS = ("weight", "weight_scale", "weight_offset")
"""The tensors of a W8A8_DYNAMIC or W8A16 linear layer, likewise."""

SERVED_DTYPES = ("bfloat16", "float16")
"""Model dtypes vllm-ascend accepts with this format (`AscendModelSlimConfig.get_supported_act_dtypes`)."""


def deq_scale_code(dtype: str | None) -> str:
    """The safetensors dtype of `deq_scale` in a model of the given dtype."""
    return "I64" if dtype == "float16" else "F32"


def linear_specs(
    module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str, bias: bool
) -> list[TensorSpec]:
    """The tensors that `encode_linear` makes of a quantized layer.

    Args:
        module: its name.
        shape: `(N, K)`.
        scheme: one of `ascend_schemes.DESCRIBED`, not in floating point.
        dtype: the model's.
        bias: whether it has one.
    """
    rows = shape[:1]
    parts: list[tuple[str, str, tuple[int, ...]]] = [("weight", "I8", shape)]
    if not scheme.is_static:
        parts += [("weight_scale", "F32", (*rows, 1)), ("weight_offset", "F32", (*rows, 1))]
    else:
        parts += [("quant_bias", "I32", rows), ("input_scale", "F32", (1,)), ("input_offset", "F32", (1,))]
        parts += [("deq_scale", deq_scale_code(dtype), rows)]
    if bias:
        parts.append(("bias", "F32", rows))
    return [TensorSpec(f"{module}.{part}", code, part_shape) for part, code, part_shape in parts]


def encode_linear(module: str, linear: Linear, dtype: str) -> dict[str, NDArray[Any]]:
    """The tensors that `linear` is stored as.

    The engine holds `input_scale` in the model's dtype, so it is rounded first and `deq_scale` is computed
    from the rounded value: it then divides and multiplies by the same number.

    Args:
        module: its name, for example `model.layers.0.self_attn.q_proj`.
        linear: in any scheme.
        dtype: the model's: `bfloat16` or `float16`.

    Returns:
        Arrays by full tensor name. Floating point: `weight` and `bias` in `dtype`. W8A8, with s_x the rounded
        input scale and zp its zero point: `weight` int8 [N, K]; `deq_scale` = s_x s_w float32 [N], in a
        float16 model int64 with its bits; `quant_bias` = round(bias / deq_scale) - sum_k zp W int32 [N];
        `input_scale` = s_x and `input_offset` = zp float32 [1]. W8A8_DYNAMIC and W8A16: `weight` int8 [N, K];
        `weight_scale` = s_w and `weight_offset` = 0, float32 [N, 1]. `bias`, if there is one, rounded to
        `dtype`, of a quantized layer in float32 [N]: msModelSlim keeps it beside `quant_bias`.

    Raises:
        CheckpointError: a scale, or in the model's dtype its reciprocal, is not positive and finite; the zero
            point is no int8; a sum does not fit int32; a value does not fit `dtype`.
    """
    tensors: dict[str, NDArray[Any]] = {}
    bias = None if linear.bias is None else cast(f"{module}.bias", linear.bias, dtype)
    if isinstance(linear, FloatLinear):
        tensors[f"{module}.weight"] = cast(f"{module}.weight", linear.weight, dtype)
        return tensors if bias is None else {f"{module}.bias": bias, **tensors}
    if bias is not None:
        tensors[f"{module}.bias"] = bias.astype(np.float32)
    tensors[f"{module}.weight"] = linear.weight
    if not linear.is_static:
        scale = weight_scales(module, linear).reshape(-1, 1)
        return {**tensors, f"{module}.weight_scale": scale, f"{module}.weight_offset": np.zeros_like(scale)}
    input_scale, zero_point = input_parameters(module, linear, dtype)
    if not all_positive(rounded_reciprocal(np.array([input_scale]), dtype)):
        raise CheckpointError(
            f"the reciprocal of its input scale {input_scale:.4g} is infinite or 0 in {dtype}, in which the "
            "engine keeps it",
            where=module,
            remedy="quantize the model in bfloat16, or keep this layer in floating point",
        )
    deq_scale = deq_scales(module, linear, input_scale)
    bits = deq_scale.view(np.int32).astype(np.int64)
    return {
        **tensors,
        f"{module}.quant_bias": folded_bias(module, linear.weight, zero_point, deq_scale, bias),
        f"{module}.input_scale": np.array([input_scale], np.float32),
        f"{module}.input_offset": np.array([zero_point], np.float32),
        f"{module}.deq_scale": bits if deq_scale_code(dtype) == "I64" else deq_scale,
    }


def folded_bias(
    module: str,
    weight: NDArray[np.int8],
    zero_point: int,
    deq_scale: NDArray[np.float32],
    bias: NDArray[Any] | None,
) -> NDArray[np.int32]:
    """`round(bias / deq_scale) - sum_k zp W`, int32 [N].

    Args:
        module: the layer's name, for the error.
        weight: int8 [N, K].
        zero_point: of the input.
        deq_scale: float32 [N].
        bias: the layer's own, [N], or None.

    Raises:
        CheckpointError: a sum does not fit int32.
    """
    sums = -zero_point * weight.sum(axis=1, dtype=np.int64)
    largest = np.iinfo(np.int32).max
    # float64 holds all integers that int32 does.
    folded = sums if bias is None else np.rint(bias.astype(np.float64) / deq_scale) + sums
    if np.abs(folded).max(initial=0) > largest:
        raise CheckpointError(
            "does not fit 32 bits", where=f"{module}.quant_bias", remedy="keep this layer in floating point"
        )
    return folded.astype(np.int32)


def decode_linear(
    module: str,
    tensors: Mapping[str, NDArray[Any]],
    dtype: str | None = None,
    scheme: Scheme = W8A8_DYNAMIC,
) -> QuantizedLinear:
    """The quantized layer that `encode_linear`, or msModelSlim, stored.

    Args:
        module: its name.
        tensors: at least its parts by full name, and the bias if there is one. With `deq_scale` among them
            activations are static, and `weight_scale` becomes `deq_scale / input_scale`, in float64.
        dtype: the model's, in which the engine keeps `weight_scale`, `input_scale` and its reciprocal; None
            if config.json does not say: they are then exact.
        scheme: of a layer without static activations; the tensors of W8A8_DYNAMIC and W8A16 are the same.

    Returns:
        The layer. With static activations and without a `bias`, what `quant_bias` holds beside the zero point
        is its bias.

    Raises:
        CheckpointError: a scale, or in the model's dtype its reciprocal, is not positive and finite; the zero
            point is no int8; a `weight_offset` is not 0; `deq_scale` holds something else than float32 bits.
    """
    weight, stored_bias = tensors[f"{module}.weight"], tensors.get(f"{module}.bias")
    bias = None if stored_bias is None else stored_bias.astype(np.float32)
    if f"{module}.deq_scale" not in tensors:
        scale = tensors[f"{module}.weight_scale"].astype(np.float32).reshape(-1)
        if dtype is not None:
            scale = held_scales(scale, dtype)
        if not all_positive(scale):
            raise CheckpointError("its scales are not positive and finite", where=module)
        if tensors[f"{module}.weight_offset"].any():
            raise CheckpointError(
                "is not zero: the engine takes weights as symmetric", where=f"{module}.weight_offset"
            )
        return QuantizedLinear(weight, scale, scheme, bias)
    deq_scale = deq_scale_values(tensors[f"{module}.deq_scale"])
    input_scale = tensors[f"{module}.input_scale"].astype(np.float32).reshape(1)
    zero_point = zero_point_of(tensors[f"{module}.input_offset"])
    reciprocal = None if dtype is None else rounded_reciprocal(input_scale, dtype)
    if not all(map(all_positive, (deq_scale, input_scale, *([] if reciprocal is None else [reciprocal])))):
        raise CheckpointError("its scales are not positive and finite", where=module)
    if zero_point is None:
        raise CheckpointError("is not an integer in [-128, 127]", where=f"{module}.input_offset")
    folded = tensors[f"{module}.quant_bias"] + zero_point * weight.sum(axis=1, dtype=np.int64)
    if bias is None and folded.any():
        bias = (folded * deq_scale.astype(np.float64)).astype(np.float32)
    return QuantizedLinear(
        weight=weight,
        weight_scale=row_scales(deq_scale, input_scale),
        scheme=W8A8,
        bias=bias,
        input_scale=input_scale,
        input_offset=np.array([zero_point], np.int32),
        input_reciprocal=reciprocal,
    )


def deq_scale_values(stored: NDArray[Any]) -> NDArray[np.float32]:
    """`deq_scale` as float32 numbers, also where it holds their bits in int64."""
    return stored.astype(np.int32).view(np.float32) if stored.dtype == np.int64 else stored.astype(np.float32)


def zero_point_of(stored: NDArray[Any]) -> int | None:
    """The zero point that `input_offset` holds; None if that is no int8."""
    value = float(stored.reshape(-1)[0])
    return int(value) if value.is_integer() and -128 <= value <= 127 else None
