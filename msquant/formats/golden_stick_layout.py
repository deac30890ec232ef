"""The tensors of one linear layer in the golden-stick layout, written and read back.

With static activations the layout is that of vLLM-MindSpore's `A8W8LinearMethod` (vllm_mindspore 0.5.1,
model_executor/layers/quantization/golden_stick/a8w8.py, and its namesake in mindformers 1.7.0), which
computes, with int32 accumulation,

    y = deq_scale * (weight @ x_q + quant_bias) + bias,    x_q = clamp(round(x / input_scale) + input_offset)

With per-token activations it is that of MindFormers' `A8W8DynamicLinearMethod` (golden_stick/a8dynw8.py):

    y = weight_scale * s * (weight @ round(x / s)) + bias,    s = max|x| / 127 of each token
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msquant import schemes
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import FloatLinear, Linear, QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.dtypes import DTYPE_CODES, MODEL_DTYPES, cast
from msquant.formats.golden_stick_schemes import ACCEPTED, FLOAT, W8A8, W8A8_DYNAMIC, Variant
from msquant.formats.scales import (
    all_positive,
    deq_scales,
    held_scales,
    input_parameters,
    row_scales,
    weight_scales,
)
from msquant.schemes import Scheme

QUANT_METHOD: Final = "golden-stick"
"""What vLLM-MindSpore's `quantization=` takes for this format."""

SECTION: Final = {"quant_method": QUANT_METHOD}
"""`quantization_config` of a folder for MindFormers: without one it builds attention that does not fit the
caches which vLLM-MindSpore allocates below TP16. In a folder for the native backend the same section would
make every layer float."""

DESCRIPTION_NAME = "quantization_description.json"

QUANTIZED_PARTS = ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset")
"""The tensors of a W8A8 linear layer; the layer's own `bias` is the only other one."""

DYNAMIC_PARTS = ("weight", "weight_scale", "weight_offset")
"""The tensors of a W8A8_DYNAMIC linear layer, likewise."""

SERVED_DTYPES = ("bfloat16", "float16")
"""Model dtypes vLLM-MindSpore accepts with this format (`GoldenStickConfig.get_supported_act_dtypes`)."""


def linear_specs(
    module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str, bias: bool
) -> list[TensorSpec]:
    """The tensors that `encode_linear` makes of a quantized layer.

    Args:
        module: its name.
        shape: `(N, K)`.
        scheme: one of `golden_stick_schemes.DESCRIBED` that a variant accepts, not in floating point.
        dtype: the model's.
        bias: whether it has one.
    """
    rows, columns = shape[:1], shape[1:]
    parts: list[tuple[str, str, tuple[int, ...]]] = [("weight", "I8", shape)]
    if scheme.is_dynamic:
        parts += [("weight_scale", "F32", rows), ("weight_offset", "F32", rows)]
    else:
        parts += [("deq_scale", "F32", rows), ("quant_bias", "I32", rows)]
        parts += [("input_scale", DTYPE_CODES[dtype], columns), ("input_offset", "I8", columns)]
    if bias:
        parts.append(("bias", DTYPE_CODES[dtype], rows))
    return [TensorSpec(f"{module}.{part}", code, part_shape) for part, code, part_shape in parts]


def encode_linear(
    module: str, linear: Linear, dtype: str, variant: Variant = "native"
) -> dict[str, NDArray[Any]]:
    """The tensors that `linear` is stored as.

    `input_scale` is stored in the model's dtype, so it is rounded first and `deq_scale` is computed from the
    rounded value: the engine then divides and multiplies by the same number. Computed from the unrounded
    scale, `deq_scale` would scale the layer's output by up to 1 + 2**-8 in bfloat16.

    Args:
        module: its name, for example `model.layers.0.self_attn.q_proj`.
        linear: in floating point, or W8A8 with static or per-token activations.
        dtype: the model's: `bfloat16`, `float16` or `float32`.
        variant: the backend that will read it.

    Returns:
        Arrays by full tensor name. Floating point: `weight` and `bias` in `dtype`. W8A8, with s_x the rounded
        input scale, s_w the weight scales and zp the input's zero point: `weight` int8 [N, K]; `deq_scale` =
        s_x s_w float32 [N]; `quant_bias` = -sum_k zp W int32 [N]; `input_scale` = s_x in `dtype` [K];
        `input_offset` = zp int8 [K]. W8A8_DYNAMIC: `weight` int8 [N, K]; `weight_scale` = s_w and
        `weight_offset` = 0, float32 [N]. `bias`, if there is one, in `dtype` [N].

    Raises:
        CheckpointError: activations are quantized per token, but the variant is native; a scale is not
            positive and finite; the zero point is no int8; a sum does not fit int32; a value does not fit
            `dtype`.
    """
    tensors: dict[str, NDArray[Any]] = {}
    if linear.bias is not None:
        tensors[f"{module}.bias"] = cast(f"{module}.bias", linear.bias, dtype)
    if isinstance(linear, FloatLinear):
        tensors[f"{module}.weight"] = cast(f"{module}.weight", linear.weight, dtype)
        return tensors
    if linear.input_scale is None or linear.input_offset is None:
        if W8A8_DYNAMIC not in ACCEPTED[variant]:
            raise CheckpointError(
                "its activations are quantized per token, which the native backend of vLLM-MindSpore cannot "
                f"run: it accepts {' and '.join(ACCEPTED[variant])}",
                where=module,
                remedy="quantize it with static activations, or keep it in floating point",
            )
        return {**tensors, **_encode_dynamic(module, linear)}
    columns = linear.weight.shape[1]
    input_scale, zero_point = input_parameters(module, linear, dtype)
    tensors[f"{module}.weight"] = linear.weight
    tensors[f"{module}.deq_scale"] = deq_scales(module, linear, input_scale)
    tensors[f"{module}.quant_bias"] = quantized_bias(
        module, linear.weight, np.full(columns, zero_point, np.int8)
    )
    tensors[f"{module}.input_scale"] = np.full(columns, input_scale, MODEL_DTYPES[dtype])
    tensors[f"{module}.input_offset"] = np.full(columns, zero_point, np.int8)
    return tensors


def _encode_dynamic(module: str, linear: QuantizedLinear) -> dict[str, NDArray[Any]]:
    # float32 loads as it is or, in a bfloat16 model, is rounded by the engine, which changes no scale that
    # the pass has made for such a model.
    weight_scale = weight_scales(module, linear)
    return {
        f"{module}.weight": linear.weight,
        f"{module}.weight_scale": weight_scale,
        f"{module}.weight_offset": np.zeros_like(weight_scale),
    }


def decode_linear(
    module: str, tensors: Mapping[str, NDArray[Any]], dtype: str | None = None
) -> QuantizedLinear:
    """The quantized layer that `encode_linear` stored.

    Args:
        module: its name.
        tensors: at least its parts by full name, and the bias if there is one. With `deq_scale` among them
            activations are static, and `weight_scale` becomes `deq_scale / input_scale`, in float64.
        dtype: the model's. In bfloat16 the engine rounds the `weight_scale` of a layer per token to it.

    Raises:
        CheckpointError: the scales are not positive and finite; the input scales or offsets differ among the
            columns, because a smooth scale was folded into them; a `weight_offset` is not 0.
    """
    bias = tensors.get(f"{module}.bias")
    bias = None if bias is None else bias.astype(np.float32)
    if f"{module}.deq_scale" not in tensors:
        return _decode_dynamic(module, tensors, bias, dtype)
    scales = tensors[f"{module}.input_scale"].astype(np.float32)
    offsets = tensors[f"{module}.input_offset"]
    if not (scales == scales[0]).all() or not (offsets == offsets[0]).all():
        raise CheckpointError(
            "has one input scale a column; msquant reads one a tensor", where=f"{module}.input_scale"
        )
    deq_scale = tensors[f"{module}.deq_scale"].astype(np.float32)
    if not all_positive(deq_scale) or not all_positive(scales[:1]):
        raise CheckpointError("its scales are not positive and finite", where=module)
    return QuantizedLinear(
        weight=tensors[f"{module}.weight"],
        weight_scale=row_scales(deq_scale, scales),
        scheme=schemes.W8A8,
        bias=bias,
        input_scale=scales[:1].copy(),
        input_offset=offsets[:1].astype(np.int32),
    )


def _decode_dynamic(
    module: str, tensors: Mapping[str, NDArray[Any]], bias: NDArray[np.float32] | None, dtype: str | None
) -> QuantizedLinear:
    # Other tools store [N, 1], and in the model's dtype.
    scale = tensors[f"{module}.weight_scale"].astype(np.float32).reshape(-1)
    if dtype == "bfloat16":
        scale = held_scales(scale, dtype)
    if not all_positive(scale):
        raise CheckpointError("its scales are not positive and finite", where=module)
    if tensors[f"{module}.weight_offset"].any():
        raise CheckpointError(
            "is not zero: the engine takes weights as symmetric", where=f"{module}.weight_offset"
        )
    return QuantizedLinear(tensors[f"{module}.weight"], scale, schemes.W8A8_DYNAMIC, bias)


def quantized_bias(
    module: str, weight: NDArray[np.int8], input_offset: NDArray[np.int8]
) -> NDArray[np.int32]:
    """`-sum_k input_offset[k] weight[n, k]`, which takes the zero point out of the integer product.

    Args:
        module: the layer's name, for the error.
        weight: int8 [N, K].
        input_offset: int8 [K].

    Returns:
        int32 [N].

    Raises:
        CheckpointError: a sum does not fit int32, which takes more than 131,072 columns.
    """
    if (input_offset == input_offset[:1]).all():
        sums = -weight.sum(axis=1, dtype=np.int64) * int(input_offset[0])
    else:
        sums = -np.einsum("nk,k->n", weight, input_offset, dtype=np.int64, casting="safe")
    if np.abs(sums).max(initial=0) > np.iinfo(np.int32).max:
        raise CheckpointError("does not fit 32 bits", where=f"{module}.quant_bias")
    return sums.astype(np.int32)


def describe(names: Iterable[str], quantized: Iterable[str], dynamic: Iterable[str] = ()) -> dict[str, str]:
    """The content of `quantization_description.json`.

    Args:
        names: every tensor that is stored; an output head that shares the embedding's weight is not.
        quantized: names of the W8A8 modules, whose tensors (a bias too) are all `W8A8`.
        dynamic: names of the W8A8_DYNAMIC modules, likewise.

    Returns:
        `W8A8`, `W8A8_DYNAMIC` or `FLOAT` by tensor name, sorted.
    """
    values = {**dict.fromkeys(quantized, W8A8), **dict.fromkeys(dynamic, W8A8_DYNAMIC)}
    return {name: values.get(name.rpartition(".")[0], FLOAT) for name in sorted(names)}
