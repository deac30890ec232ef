"""The tensors of one linear layer in the golden-stick layout, written and read back.

With static activations the layout is that of vLLM-MindSpore's `A8W8LinearMethod` (vllm_mindspore 0.5.1,
model_executor/layers/quantization/golden_stick/a8w8.py, and its namesake in mindformers 1.7.0), which
computes, with int32 accumulation,

    y = deq_scale * (weight @ x_q + quant_bias) + bias,    x_q = clamp(round(x / input_scale) + input_offset)

With per-token activations it is that of MindFormers' `A8W8DynamicLinearMethod` (golden_stick/a8dynw8.py):

    y = weight_scale * s * (weight @ round(x / s)) + bias,    s = max|x| / 127 of each token

Those of routed experts with int4 weights (W4A8_DYNAMIC) are in `int4_experts`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from msquant import schemes
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError
from msquant.families import find_family
from msquant.formats.description import Description
from msquant.formats.golden_stick import int4_experts
from msquant.formats.scales import all_positive, held_scales, row_scales
from msquant.schemes import Scheme

Variant = Literal["native", "mindformers"]
"""The backend of vLLM-MindSpore that a folder is for."""

W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC, FLOAT = "W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "FLOAT"

WORDS: Mapping[Variant, Mapping[Scheme, str]] = {
    "native": {schemes.W8A8: W8A8, schemes.FLOAT: FLOAT, schemes.W8A8_SHIFTED: W8A8},
    "mindformers": {
        schemes.W8A8: W8A8,
        schemes.W8A8_DYNAMIC: W8A8_DYNAMIC,
        schemes.W4A8_DYNAMIC: W4A8_DYNAMIC,
        schemes.FLOAT: FLOAT,
    },
}
"""What `quantization_description.json` calls the schemes that each backend runs and msquant reads."""

QUANT_METHOD: Final = "golden-stick"
"""What vLLM-MindSpore's `quantization=` takes for this format."""

SECTION: Final = {"quant_method": QUANT_METHOD}
"""`quantization_config` of a folder for MindFormers: without one it builds attention that does not fit the
caches which vLLM-MindSpore allocates below TP16. In a folder for the native backend the same section would
make every layer float."""

DESCRIPTION_NAME = "quantization_description.json"

DESCRIPTION_NAMES = (DESCRIPTION_NAME, "quant_model_description.json")
"""The engine takes either."""

QUANTIZED_PARTS = ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset")
"""The tensors of a W8A8 linear layer; the layer's own `bias` is the only other one."""

DYNAMIC_PARTS = ("weight", "weight_scale", "weight_offset")
"""The tensors of a W8A8_DYNAMIC or W4A8_DYNAMIC linear layer, likewise."""

SERVED_DTYPES = ("bfloat16", "float16")
"""Model dtypes vLLM-MindSpore accepts with this format (`GoldenStickConfig.get_supported_act_dtypes`)."""


def variant_of(config: Mapping[str, Any]) -> Variant:
    """The backend that has the model's code; the native one for a model of no known family."""
    family = find_family(config.get("model_type"))
    return family.mindspore_backend if family else "native"


def folder_variant(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Variant:
    """The variant that a folder's manifest records, or that of its architecture if it records none.

    Args:
        config: the content of `config.json`.
        manifest: the content of `msquant.json`; empty if there is none.

    Raises:
        CheckpointError: the manifest records an unknown one.
    """
    recorded = manifest.get("variant")
    if recorded is None:
        return variant_of(config)
    for variant in WORDS:
        if recorded == variant:
            return variant
    raise CheckpointError(
        f"variant is {recorded!r}, one of {', '.join(WORDS)} is expected", where="msquant.json"
    )


_LATENT_CACHE = "fa_quant_type"


def description_files(folder: Path) -> list[Path]:
    """The files vLLM takes for descriptions: any whose name *ends* with one of the two known names."""
    return sorted(path for path in folder.glob("*.json") if path.name.endswith(DESCRIPTION_NAMES))


def read_description(folder: Path) -> Description:
    """What is said of the tensors of a folder.

    Raises:
        CheckpointError: there is not exactly one description, it does not map names to strings, or it
            describes an int8 latent cache.
    """
    files = description_files(folder)
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise CheckpointError(
            f"exactly one of {' and '.join(DESCRIPTION_NAMES)} is expected, found {found}",
            where=folder,
            remedy="quantize the model again, or remove the file that does not belong here",
        )
    content = read_json(files[0])
    # The engine, too, takes only dotted names for tensors.
    tensors = {name: value for name, value in content.items() if "." in name}
    for name, value in tensors.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{name} is {value!r}, {W8A8} or {FLOAT} is expected", where=files[0])
    entries = {name: value for name, value in content.items() if "." not in name}
    if cache := entries.get(_LATENT_CACHE):
        raise CheckpointError(
            f"{_LATENT_CACHE} is {cache!r}: MindFormers' int8 latent cache, whose arithmetic is not "
            "published",
            where=files[0],
            remedy="msquant reads folders of this format with a cache in floating point",
        )
    return Description(tensors, entries, WORDS["mindformers"])


def read_variant(folder: Path, config: Mapping[str, Any]) -> Variant:
    """The backend a folder is for: what its manifest records, else that of its architecture.

    Args:
        folder: the checkpoint, with or without a manifest.
        config: the content of its `config.json`.

    Raises:
        CheckpointError: the manifest records an unknown variant.
    """
    try:
        manifest = read_json(folder / MANIFEST_NAME)
    except CheckpointError:
        manifest = {}
    return folder_variant(config, manifest)


def parts_of(scheme: Scheme) -> tuple[str, ...]:
    """The tensors of a quantized layer; the layer's own `bias` is the only other one."""
    return QUANTIZED_PARTS if scheme.is_static else DYNAMIC_PARTS


def stored_scheme(checkpoint: Checkpoint, module: str, description: Description) -> Scheme:
    """The scheme of a layer of a folder; floating point where a word is unknown, as the rules report it."""
    scheme = description.scheme(module) or schemes.FLOAT
    if scheme.is_static:
        return static_scheme(checkpoint, module)
    named = all(f"{module}.{part}" in checkpoint for part in ("weight", "weight_scale"))
    return int4_experts.stored_scheme(checkpoint, module, description) if scheme.is_int4 and named else scheme


def static_scheme(checkpoint: Checkpoint, module: str) -> Scheme:
    """The scheme of a static layer of a folder, by its zero points: the description has one word for all."""
    name = f"{module}.input_offset"
    return _by_zero_points(checkpoint.raw(name)) if name in checkpoint else schemes.W8A8


def _by_zero_points(offsets: NDArray[Any]) -> Scheme:
    return schemes.W8A8 if (offsets == offsets[:1]).all() else schemes.W8A8_SHIFTED


def decode_linear(
    module: str,
    tensors: Mapping[str, NDArray[Any]],
    dtype: str | None = None,
    scheme: Scheme = schemes.W8A8_DYNAMIC,
) -> QuantizedLinear:
    """The quantized layer that `encode_linear` stored.

    Args:
        module: its name.
        tensors: at least its parts by full name, and the bias if there is one. With `deq_scale` among them
            activations are static, and `weight_scale` becomes `deq_scale / input_scale`, in float64.
        dtype: the model's. In bfloat16 the engine rounds the `weight_scale` of a layer per token to it.
        scheme: of a layer per token. Of experts with int4 weights the engine keeps scales in float32.

    Raises:
        CheckpointError: the scales are not positive and finite; the input scales differ among the columns,
            because a smooth scale was folded into them; a `weight_offset` is not 0.
    """
    bias = tensors.get(f"{module}.bias")
    bias = None if bias is None else bias.astype(np.float32)
    if f"{module}.deq_scale" not in tensors:
        return _decode_dynamic(module, tensors, bias, dtype, scheme)
    scales = tensors[f"{module}.input_scale"].astype(np.float32)
    offsets = tensors[f"{module}.input_offset"]
    if not (scales == scales[0]).all():
        raise CheckpointError(
            "has one input scale a column; msquant reads one a tensor", where=f"{module}.input_scale"
        )
    static = _by_zero_points(offsets)
    deq_scale = tensors[f"{module}.deq_scale"].astype(np.float32)
    if not all_positive(deq_scale) or not all_positive(scales[:1]):
        raise CheckpointError("its scales are not positive and finite", where=module)
    return QuantizedLinear(
        weight=tensors[f"{module}.weight"],
        weight_scale=row_scales(deq_scale, scales),
        scheme=static,
        bias=bias,
        input_scale=scales[:1].copy(),
        input_offset=(offsets if static.is_shifted else offsets[:1]).astype(np.int32),
    )


def _decode_dynamic(
    module: str,
    tensors: Mapping[str, NDArray[Any]],
    bias: NDArray[np.float32] | None,
    dtype: str | None,
    scheme: Scheme,
) -> QuantizedLinear:
    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if scheme.is_int4:
        weight, scale = int4_experts.decode(module, weight, scale, scheme)
    else:
        # Other tools store [N, 1], and in the model's dtype.
        scale = scale.astype(np.float32).reshape(-1)
        scale = held_scales(scale, dtype) if dtype == "bfloat16" else scale
    if not all_positive(scale):
        raise CheckpointError("its scales are not positive and finite", where=module)
    if tensors[f"{module}.weight_offset"].any():
        raise CheckpointError(
            "is not zero: the engine takes weights as symmetric", where=f"{module}.weight_offset"
        )
    return QuantizedLinear(weight, scale, scheme, bias)


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
        sums: NDArray[np.int64] = -weight.sum(axis=1, dtype=np.int64) * int(input_offset[0])
    else:
        sums = -np.einsum("nk,k->n", weight, input_offset, dtype=np.int64, casting="safe")
    if np.abs(sums).max(initial=0) > np.iinfo(np.int32).max:
        raise CheckpointError("does not fit 32 bits", where=f"{module}.quant_bias")
    return sums.astype(np.int32)
