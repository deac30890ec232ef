"""The rules a folder must keep for vllm-ascend to load and compute it correctly.

Each rule is taken from what vllm-ascend does (quantization/modelslim_config.py, method_adapters.py; in
methods/ w8a8_static.py, w8a8_dynamic.py, w8a16.py: `get_pertensor_param`, `get_perchannel_param`; w4a8.py),
and from vLLM, whose loader calls it: it copies into a parameter's dtype, but insists on its shape.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.ascend import fa_quant, four_bits, kv_cache
from msquant.formats.ascend.layout import (
    DESCRIPTION_NAME,
    OFFSETS,
    PREFILL_PARTS,
    SERVED_DTYPES,
    WORDS,
    deq_scale_code,
    deq_scale_values,
    folded_bias,
    parts_of,
    zero_point_of,
)
from msquant.formats.description import GROUP_SIZE, Description
from msquant.formats.dtypes import MODEL_DTYPES, model_dtype
from msquant.formats.folder_rules import (
    FLOAT_CODES,
    Finding,
    Parts,
    Shape,
    check_float,
    check_integers,
    check_parts,
    check_positive,
    layer_shape,
)
from msquant.formats.fused_layers import check_fused_inputs
from msquant.formats.int4_rows import unpack_rows
from msquant.formats.scales import all_positive, rounded_reciprocal
from msquant.schemes import FLOAT, MOST_COLUMNS, W4A8_DYNAMIC, Scheme

_INT8 = frozenset({"I8"})
_ANY_DEQ_SCALE = frozenset({"F32", "I64"})
_NUMBER: tuple[Shape, ...] = ((1,),)
_ROUNDED = 2**-7


def check_config(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Check what vLLM reads of `config.json`."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            yield Finding("config.json", f"{key} is there: vLLM reads it instead of the description")
    if (dtype := model_dtype(config)) not in SERVED_DTYPES:
        yield Finding(
            "config.json", f"dtype is {dtype}: vllm-ascend runs this format in {' or '.join(SERVED_DTYPES)}"
        )


def check_head(description: Description) -> Iterator[Finding]:
    """vLLM's Llama makes an output head before it ties it to the embedding, and vllm-ascend looks it up."""
    if "lm_head.weight" not in description.tensors:
        yield Finding(
            DESCRIPTION_NAME,
            "does not describe lm_head.weight: vllm-ascend asks for it even if it is not stored",
        )


def check_words(description: Description, stored: Mapping[str, str]) -> Iterator[Finding]:
    """Check that every tensor is described, by a word that vllm-ascend and msquant know.

    Args:
        description: of the folder.
        stored: its tensors; only the names count.
    """
    for name in stored:
        if name not in description.tensors:
            yield Finding(name, "stored, but not described")
    for name, word in description.tensors.items():
        module, _, part = name.rpartition(".")
        # msModelSlim describes an output head that shares the embedding's weight too.
        if name not in stored and name != "lm_head.weight":
            yield Finding(name, "described, but not stored")
        if part in kv_cache.PARTS or fa_quant.is_part(name):
            wanted = kv_cache.WORD if part in kv_cache.PARTS else fa_quant.WORD
            if word != wanted:
                yield Finding(name, f"described as {word!r}: a scale of a cache is described as {wanted!r}")
        elif word not in WORDS.values():
            *most, last = WORDS.values()
            yield Finding(name, f"described as {word!r}: only {', '.join(most)} and {last} are known")
        elif part != "bias" and word != description.tensors.get(f"{module}.weight", word):
            yield Finding(
                name,
                f"described as {word}, but the layer's weight as {description.tensors[f'{module}.weight']}",
            )


def check_four_bits(description: Description) -> Iterator[Finding]:
    """Check what vllm-ascend reads of the description where experts have int4 weights."""
    if WORDS[W4A8_DYNAMIC] not in description.tensors.values():
        return
    size = description.entries.get(GROUP_SIZE)
    if type(size) is not int or not 0 <= size <= MOST_COLUMNS:
        yield Finding(
            DESCRIPTION_NAME,
            f"{GROUP_SIZE} is {size!r}: {W4A8_DYNAMIC} is read with 0 for one scale a row, or with the "
            "columns of a group",
        )


def check_layout(
    checkpoint: Checkpoint, module: str, scheme: Scheme, dtype: str | None = None, *, packed: bool = True
) -> list[Finding]:
    """Check the names, dtypes and shapes of a quantized layer's tensors, from the headers alone.

    Args:
        checkpoint: the opened folder.
        module: the layer, for example `model.layers.0.mlp.up_proj`.
        scheme: one of `WORDS`, not in floating point.
        dtype: the model's, which `deq_scale` depends on; None accepts both of its dtypes.
        packed: whether two int4 weights are in a byte.
    """
    if not packed and scheme.is_int4 and (bias := f"{module}.scale_bias") in checkpoint:
        return [Finding(bias, f"is there, but only version {four_bits.VERSION} has it, with packed weights")]
    if scheme == W4A8_DYNAMIC and (grouped := f"{module}.{four_bits.GROUP_PARTS[0]}") in checkpoint:
        problem = f"is there, but with {GROUP_SIZE} 0 int4 weights are read with one scale a row"
        return [Finding(grouped, problem)]
    static = scheme.is_static
    shape = layer_shape(checkpoint, module, parts_of(scheme, packed))
    if isinstance(shape, list):
        return shape
    rows = shape[:1]
    expected: Parts = {"weight": (_INT8, (shape,))}
    if scheme.is_int4:
        whole = (2 if packed else 1) * shape[0], shape[1]
        if misfit := four_bits.shape_problem(module, whole, scheme):
            return [Finding(f"{module}.weight", misfit)]
        specs = four_bits.part_specs(module, whole, scheme, packed)
        expected = {part: (frozenset({code}), (size,)) for part, (code, size) in specs.items()}
        for part in set(expected) & set(OFFSETS):
            # msModelSlim has zeros of another dtype for those of groups.
            expected[part] = (FLOAT_CODES | frozenset({"I64", "I32"}), expected[part][1])
    elif not static:
        expected["weight_scale"] = (FLOAT_CODES, ((*rows, 1),))
        expected["weight_offset"] = (FLOAT_CODES, ((*rows, 1),))
    else:
        codes = frozenset({deq_scale_code(dtype)}) if dtype else _ANY_DEQ_SCALE
        expected["deq_scale"] = (codes, (rows,))
        expected["quant_bias"] = (frozenset({"I32"}), (rows,))
        expected["input_scale"] = (FLOAT_CODES, _NUMBER)
        expected["input_offset"] = (FLOAT_CODES | _INT8, _NUMBER)
        if scheme.prefill is not None:
            expected |= dict.fromkeys(PREFILL_PARTS, (FLOAT_CODES, ((*rows, 1),)))
    if f"{module}.bias" in checkpoint:
        expected["bias"] = (FLOAT_CODES, (rows,))
    return check_parts(checkpoint, module, expected)


def check_tensors(checkpoint: Checkpoint, description: Description, dtype: str | None) -> Iterator[Finding]:
    """Check every stored tensor, reading one layer at a time.

    Args:
        checkpoint: the opened folder.
        description: of its tensors.
        dtype: the model's, from config.json; None if that does not say.
    """
    quantized: dict[str, Scheme] = {}
    for name in checkpoint.names():
        module = name.removesuffix(".weight")
        scheme = description.scheme(module)
        if module != name and scheme is not None and not scheme.is_float:
            quantized[module] = scheme
    for name in checkpoint.names():
        module = name.rpartition(".")[0]
        if name.endswith(kv_cache.PARTS) or fa_quant.is_part(name):
            # See `check_folder` of these.
            continue
        if module not in quantized and description.scheme(module) == FLOAT:
            yield from check_float(checkpoint, name)
    packed = four_bits.is_packed(description.entries)
    for module, scheme in quantized.items():
        yield from check_layout(checkpoint, module, scheme, dtype, packed=packed) or _check_values(
            checkpoint, module, scheme, dtype, packed
        )
    yield from check_fused_inputs(checkpoint, ("input_scale", "input_offset"))


def _check_values(
    checkpoint: Checkpoint, module: str, scheme: Scheme, dtype: str | None, packed: bool
) -> Iterator[Finding]:
    bias = f"{module}.bias"
    if bias in checkpoint and (found := list(check_float(checkpoint, bias))):
        yield from found
        return
    if not scheme.is_static or scheme.prefill is not None:
        for part in parts_of(scheme, packed):
            if part.startswith("weight_scale"):
                yield from check_positive(checkpoint, f"{module}.{part}")
            elif part in OFFSETS and checkpoint.raw(f"{module}.{part}").any():
                yield Finding(
                    f"{module}.{part}", "is not zero everywhere: the engine takes weights as symmetric"
                )
        if scheme.is_int4 and packed:
            yield from _check_scale_bias(checkpoint, module, scheme)
        elif scheme.is_int4 and scheme.weights is not None:
            yield from check_integers(checkpoint, f"{module}.weight", scheme.weights)
        if not scheme.is_static:
            return
        yield from _check_both_scales(checkpoint, module)
    deq_scale = deq_scale_values(checkpoint.raw(f"{module}.deq_scale"))
    zero_point = zero_point_of(checkpoint.raw(f"{module}.input_offset"))
    yield from _check_input_scale(checkpoint, f"{module}.input_scale", dtype)
    if not all_positive(deq_scale):
        yield Finding(f"{module}.deq_scale", "holds a scale that is not positive and finite")
    elif zero_point is None:
        yield Finding(
            f"{module}.input_offset", "is not an integer in [-128, 127]: the engine holds it in int8"
        )
    else:
        yield from _check_quant_bias(checkpoint, module, deq_scale, zero_point)


def _check_both_scales(checkpoint: Checkpoint, module: str) -> Iterator[Finding]:
    """The two ways that a layer is computed in have one scale for each row."""
    names = (f"{module}.{part}" for part in ("weight_scale", "input_scale"))
    row, step = (checkpoint.raw(name).astype(np.float64).reshape(-1) for name in names)
    both = deq_scale_values(checkpoint.raw(f"{module}.deq_scale"))
    if not np.allclose(both, row * step, rtol=_ROUNDED, atol=0):
        yield Finding(f"{module}.deq_scale", "is not input_scale * weight_scale, to a rounding of bfloat16")


def _check_scale_bias(checkpoint: Checkpoint, module: str, scheme: Scheme) -> Iterator[Finding]:
    names = (f"{module}.{part}" for part in four_bits.parts_of(scheme))
    tensors = {name: checkpoint.raw(name) for name in names}
    scale = four_bits.scales(tensors, module, scheme)
    if not all_positive(scale):
        problem = "holds scales whose products with those of rows are infinite or 0 in float16"
        yield Finding(f"{module}.{four_bits.GROUP_PARTS[0]}", problem)
        return
    weight, stored = unpack_rows(tensors[f"{module}.weight"]), tensors[f"{module}.scale_bias"]
    for problem in four_bits.bias_problems(weight, scale, stored):
        yield Finding(f"{module}.scale_bias", problem)


def _check_input_scale(checkpoint: Checkpoint, name: str, dtype: str | None) -> Iterator[Finding]:
    """The engine multiplies by its reciprocal, which float16 does not hold of every scale."""
    findings = list(check_positive(checkpoint, name))
    yield from findings
    if not findings and dtype is not None and dtype in MODEL_DTYPES:
        scale = checkpoint.raw(name).astype(np.float32)
        if not all_positive(rounded_reciprocal(scale, dtype)):
            yield Finding(name, f"is {scale.item():.4g}, whose reciprocal is infinite or 0 in {dtype}")


def _check_quant_bias(
    checkpoint: Checkpoint, module: str, deq_scale: NDArray[np.float32], zero_point: int
) -> Iterator[Finding]:
    """It is the only thing the engine knows of the zero point and of the bias."""
    name, weight = f"{module}.quant_bias", checkpoint.raw(f"{module}.weight")
    bias = checkpoint.raw(f"{module}.bias").astype(np.float32) if f"{module}.bias" in checkpoint else None
    try:
        expected = folded_bias(module, weight, zero_point, deq_scale, bias)
    except CheckpointError as error:
        yield Finding(name, error.what)
        return
    # A quotient that other tools computed in another precision may round to the next number.
    away = np.abs(checkpoint.raw(name).astype(np.int64) - expected)
    wrong = np.count_nonzero(away > (0 if bias is None else 1 + np.abs(expected) * 1e-6))
    if wrong:
        yield Finding(
            name,
            f"differs from round(bias / deq_scale) - sum(input_offset * weight) in {wrong} of {len(weight)} "
            "rows",
        )
