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

W8A8_MIX has the tensors of both: vllm-ascend computes as with static activations where it takes another
engine's cache (a decode instance), and as with per-token ones everywhere else (w8a8_pdmix.py).

Those of routed experts with int4 weights (W4A8_DYNAMIC) are in `four_bits`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msquant import schemes
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.ascend import fa_quant, four_bits, kv_cache
from msquant.formats.description import GROUP_SIZE, Description
from msquant.formats.int4_rows import unpack_rows
from msquant.formats.scales import all_positive, held_scales, rounded_reciprocal, row_scales
from msquant.schemes import W8A8, W8A8_DYNAMIC, Quant, Scheme

QUANT_METHOD: Final = "ascend"
"""What vllm-ascend's `quantization=` takes for this format."""

DESCRIPTION_NAME = "quant_model_description.json"

FLOAT = "FLOAT"

WORDS: Mapping[Scheme, str] = {
    schemes.FLOAT: FLOAT,
    schemes.W8A8: "W8A8",
    schemes.W8A8_DYNAMIC: "W8A8_DYNAMIC",
    schemes.W8A8_MIX: "W8A8_MIX",
    schemes.W4A8_DYNAMIC: "W4A8_DYNAMIC",
    schemes.W8A16: "W8A16",
}
"""The word the description has for each scheme that vllm-ascend runs and msquant reads."""

# A description of caches in int8, and of attention that is quantized in a way that is not computed.
_CACHES = {**dict.fromkeys(kv_cache.ENTRIES, kv_cache.WORD), fa_quant.ENTRY: fa_quant.KIND}
_ATTENTION_ENTRIES = ("indexer_quant_type",)

# What changes nothing that is computed on one NPU.
_KNOWN_ENTRIES = ("version", "model_quant_type", "metadata", "optional", "reduce_quant_type", GROUP_SIZE)

STATIC_PARTS = ("weight", "quant_bias", "input_scale", "input_offset", "deq_scale")
"""The tensors of a W8A8 linear layer; the layer's own `bias` is the only other one."""

DYNAMIC_PARTS = ("weight", "weight_scale", "weight_offset")
"""The tensors of a W8A8_DYNAMIC or W8A16 linear layer, likewise."""

PREFILL_PARTS = ("weight_scale", "weight_offset")
"""Those that a W8A8_MIX linear layer has beside them."""

MIXED_PARTS = STATIC_PARTS + PREFILL_PARTS
"""The tensors of a W8A8_MIX linear layer: those of both."""

OFFSETS = ("weight_offset", "weight_offset_second")
"""Zeros: the weights of every scheme are symmetric."""

SERVED_DTYPES = ("bfloat16", "float16")
"""Model dtypes vllm-ascend accepts with this format (`AscendModelSlimConfig.get_supported_act_dtypes`)."""


def read_description(folder: Path) -> Description:
    """Read a folder's description.

    Raises:
        CheckpointError: it is missing or damaged; or it describes quantized attention, a cache in other
            words than C8 or FAKQuant, or an online rotation, which msquant does not compute, or has an entry
            that it does not know.
    """
    path = folder / DESCRIPTION_NAME
    content = read_json(path)
    tensors, entries = {}, {}
    for name, value in content.items():
        if name.endswith(f".{fa_quant.LAYER_ENTRY}"):
            if value != fa_quant.LAYER_KIND:
                raise _refused(path, f"{name} is {value!r}: a quantized cache or attention")
        elif "." not in name or not isinstance(value, str):
            entries[name] = value
        else:
            tensors[name] = value
    for key in (*_ATTENTION_ENTRIES, *_CACHES):
        if entries.get(key) and entries[key] != _CACHES.get(key):
            raise _refused(path, f"{key} is {entries[key]!r}: a quantized cache or attention")
    # What `optional` has is folded into the weights, see `quarot`.
    metadata = entries.get("metadata")
    if isinstance(metadata, dict) and "quarot" in metadata:
        raise _refused(path, "it describes activations that are rotated while the model runs")
    for key, value in entries.items():
        if value and key not in (*_KNOWN_ENTRIES, *_CACHES):
            raise _refused(path, f"{key} is {value!r}: what it changes is not known to msquant")
    if WORDS[schemes.W4A8_DYNAMIC] in tensors.values():
        entries.setdefault(GROUP_SIZE, four_bits.DEFAULT_GROUP_SIZE)
    return Description(tensors, entries, WORDS)


def _refused(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        what,
        where=path,
        remedy="msquant reads layers in int8 or int4, with keys and values in floating point or int8 (C8, "
        "FAKQuant)",
    )


def parts_of(scheme: Scheme, packed: bool = True) -> tuple[str, ...]:
    """The tensors of a quantized layer; the layer's own `bias` is the only other one.

    Args:
        scheme: of the layer.
        packed: whether two int4 weights are in a byte.
    """
    if scheme.is_int4:
        return four_bits.parts_of(scheme, packed)
    if scheme.prefill is not None:
        return MIXED_PARTS
    return STATIC_PARTS if scheme.is_static else DYNAMIC_PARTS


def deq_scale_code(dtype: str | None) -> str:
    """The safetensors dtype of `deq_scale` in a model of the given dtype."""
    return "I64" if dtype == "float16" else "F32"


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
    folded: NDArray[Any] = sums if bias is None else np.rint(bias.astype(np.float64) / deq_scale) + sums
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
        scheme: of the layer; the tensors of W8A8_DYNAMIC and W8A16 are the same, and those of W8A8_MIX are
            of a static layer here. Of int4 weights the engine keeps scales as `four_bits.scales` returns
            them.

    Returns:
        The layer. With static activations and without a `bias`, what `quant_bias` holds beside the zero point
        is its bias.

    Raises:
        CheckpointError: a scale, or in the model's dtype its reciprocal, is not positive and finite; the zero
            point is no int8; a weight is no int4; an offset of weights is not 0; `deq_scale` holds something
            else than float32 bits.
    """
    weight, stored_bias = tensors[f"{module}.weight"], tensors.get(f"{module}.bias")
    bias = None if stored_bias is None else stored_bias.astype(np.float32)
    if f"{module}.deq_scale" not in tensors:
        if scheme.weights is not None and scheme.is_int4:
            packed = f"{module}.scale_bias" in tensors
            weight = unpack_rows(weight) if packed else _one_a_byte(module, weight, scheme.weights)
            scale = four_bits.scales(tensors, module, scheme)
        else:
            scale = tensors[f"{module}.weight_scale"].astype(np.float32).reshape(-1)
            scale = scale if dtype is None else held_scales(scale, dtype)
        if not all_positive(scale):
            raise CheckpointError("its scales are not positive and finite", where=module)
        for part in OFFSETS:
            if f"{module}.{part}" in tensors and tensors[f"{module}.{part}"].any():
                raise CheckpointError(
                    "is not zero: the engine takes weights as symmetric", where=f"{module}.{part}"
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
        scheme=scheme if scheme.is_static else W8A8,
        bias=bias,
        input_scale=input_scale,
        input_offset=np.array([zero_point], np.int32),
        input_reciprocal=reciprocal,
    )


def _one_a_byte(module: str, weight: NDArray[np.int8], quant: Quant) -> NDArray[np.int8]:
    if weight.min(initial=0) < quant.low or weight.max(initial=0) > quant.high:
        raise CheckpointError(
            f"holds {weight.min()} to {weight.max()}, which are no integers of {quant.bits} bits",
            where=f"{module}.weight",
            remedy=f"set version to {four_bits.VERSION!r} in {DESCRIPTION_NAME} if two are in a byte",
        )
    return weight


def deq_scale_values(stored: NDArray[Any]) -> NDArray[np.float32]:
    """`deq_scale` as float32 numbers, also where it holds their bits in int64."""
    return stored.astype(np.int32).view(np.float32) if stored.dtype == np.int64 else stored.astype(np.float32)


def zero_point_of(stored: NDArray[Any]) -> int | None:
    """The zero point that `input_offset` holds; None if that is no int8."""
    value = float(stored.reshape(-1)[0])
    return int(value) if value.is_integer() and -128 <= value <= 127 else None
