"""The rules a golden-stick folder must keep for vLLM-MindSpore 0.5.1 to load and compute it correctly.

Each rule is taken from what the engine does: vllm 0.11.0 (`get_quant_config`, `_get_quantization_config`),
vllm_mindspore 0.5.1 (`GoldenStickConfig`, `A8W8LinearMethod`, `load_weights`, the loaders in linear.py) and
mindformers 1.7.0 (parallel_core/inference: quantization, tensor_parallel, model_utils.py).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from msquant.checkpoint.checkpoint_reader import INDEX_NAME, Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.description import GROUP_SIZE, Description
from msquant.formats.dtypes import DTYPE_CODES, model_dtype
from msquant.formats.folder_rules import (
    FLOAT_CODES,
    Finding,
    Parts,
    check_float,
    check_parts,
    check_positive,
    layer_shape,
)
from msquant.formats.fused_layers import check_fused_inputs
from msquant.formats.golden_stick import int4_experts
from msquant.formats.golden_stick.layout import (
    DESCRIPTION_NAME,
    DESCRIPTION_NAMES,
    FLOAT,
    SECTION,
    SERVED_DTYPES,
    WORDS,
    Variant,
    parts_of,
    quantized_bias,
    stored_scheme,
)
from msquant.formats.scales import all_positive
from msquant.schemes import W8A8, Scheme

_INT8, _FLOAT32 = frozenset({"I8"}), frozenset({"F32"})


def check_config(config: Mapping[str, Any], variant: Variant) -> Iterator[Finding]:
    """Check what the engine reads of `config.json` with a backend."""
    text_config = config.get("text_config")
    nested = text_config if isinstance(text_config, dict) else {}
    section = config.get("quantization_config")
    if variant == "mindformers" and section != SECTION:
        yield Finding(
            "config.json",
            f"quantization_config is {section!r}: below TP16 MindFormers builds the attention of a quantized "
            f"model only if it is {json.dumps(SECTION)}",
        )
    elif variant == "native" and section is not None:
        yield Finding(
            "config.json",
            "quantization_config is there: vLLM reads it in place of the description, and all is float",
        )
    if nested.get("quantization_config") is not None:
        yield Finding("config.json", "quantization_config is there: vLLM reads it instead of the description")
    if config.get("compression_config") is not None:
        yield Finding("config.json", "compression_config is there: vLLM reads it instead of the description")
    if (dtype := model_dtype(config)) not in SERVED_DTYPES:
        yield Finding(
            "config.json",
            f"dtype is {dtype}: vLLM-MindSpore runs golden-stick in {' or '.join(SERVED_DTYPES)}",
        )


def check_names(checkpoint: Checkpoint, description: Description, variant: Variant) -> Iterator[Finding]:
    """Check that what is described is what is stored, in words that the backend knows."""
    for name in checkpoint.names():
        if name not in description.tensors:
            yield Finding(name, "stored, but not described")
    for name, value in description.tensors.items():
        if name not in checkpoint:
            yield Finding(name, "described, but not stored")
        if value not in WORDS[variant].values():
            *most, last = WORDS[variant].values()
            known = f"{', '.join(most)} and {last}"
            yield Finding(name, f"described as {value!r}: only {known} are known")


def check_stray_files(folder: Path, checkpoint: Checkpoint) -> Iterator[Finding]:
    """MindFormers loads every shard in the folder, and takes a description by a part of its path."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in checkpoint.shards:
            yield Finding(path.name, f"{INDEX_NAME} does not name it, but MindFormers would load it")
    for path in sorted(folder.glob("*.json")):
        stems = [name for name in DESCRIPTION_NAMES if Path(name).stem in path.name]
        if stems and not path.name.endswith(DESCRIPTION_NAMES):
            yield Finding(path.name, "MindFormers takes it for a description because of its name")


def check_tensors(checkpoint: Checkpoint, description: Description, dtype: str | None) -> Iterator[Finding]:
    """Check every stored tensor, reading one layer at a time.

    Args:
        checkpoint: the opened folder.
        description: what is said of its tensors.
        dtype: the model's, from config.json; None if that does not say.
    """
    quantized = {
        name.rpartition(".")[0]: stored_scheme(checkpoint, name.rpartition(".")[0], description)
        for name, value in description.tensors.items()
        if value != FLOAT
    }
    for name in checkpoint.names():
        if name.rpartition(".")[0] not in quantized:
            yield from check_float(checkpoint, name)
    yield from _check_group_size(description, quantized)
    for module, scheme in sorted(quantized.items()):
        # A word that is unknown was reported with its tensor.
        if not scheme.is_float:
            yield from check_layout(checkpoint, module, dtype, scheme) or _check_values(
                checkpoint, module, scheme
            )
    # A fused layer has one input_scale and one input_offset: those of the projection loaded last.
    yield from check_fused_inputs(checkpoint, ("input_scale", "input_offset"))


def _check_group_size(description: Description, quantized: Mapping[str, Scheme]) -> Iterator[Finding]:
    """MindFormers reads the columns of a group here, and nowhere else."""
    found = description.entries.get(GROUP_SIZE)
    for module, scheme in quantized.items():
        if scheme.is_int4 and (description.group_size is None or scheme.group_size not in (None, found)):
            wanted = scheme.group_size or "the columns of a group"
            yield Finding(
                DESCRIPTION_NAME,
                f"{GROUP_SIZE} is {found!r}, and the scales of {module} are of groups of {wanted}: "
                f'MindFormers reads it here, so put "{GROUP_SIZE}": {wanted} into it',
            )
            return


def check_layout(
    checkpoint: Checkpoint, module: str, dtype: str | None = None, scheme: Scheme = W8A8
) -> list[Finding]:
    """Check the names, dtypes and shapes of a quantized layer's tensors, from the headers alone.

    Args:
        checkpoint: the opened folder.
        module: the layer, for example `model.layers.0.mlp.up_proj`.
        dtype: the model's; None accepts any floating-point dtype where the model's belongs.
        scheme: one of `WORDS`, not in floating point.
    """
    shape = layer_shape(checkpoint, module, parts_of(scheme))
    if isinstance(shape, list):
        return shape
    rows, columns = shape[:1], shape[1:]
    model_codes = frozenset({DTYPE_CODES[dtype]}) if dtype in DTYPE_CODES else FLOAT_CODES
    expected: Parts = {"weight": (_INT8, (shape,))}
    if scheme.is_int4:
        whole, size = (2 * shape[0], shape[1]), int4_experts.stored_size(checkpoint, module)
        if not size:
            return [Finding(f"{module}.weight_scale", "has no scale for each group of columns")]
        if problem := int4_experts.shape_problem(module, whole, size):
            return [Finding(f"{module}.weight", problem)]
        specs = int4_experts.part_specs(whole, size)
        expected = {part: (frozenset({code}), (sizes,)) for part, (code, sizes) in specs.items()}
    elif scheme.is_dynamic:
        # The engine casts the scales, and squeezes [N, 1].
        for part in ("weight_scale", "weight_offset"):
            expected[part] = (_FLOAT32 | model_codes, (rows, (*rows, 1)))
    else:
        expected["deq_scale"] = (_FLOAT32, (rows,))
        expected["quant_bias"] = (frozenset({"I32"}), (rows,))
        expected["input_scale"] = (model_codes, (columns,))
        expected["input_offset"] = (_INT8, (columns,))
    if f"{module}.bias" in checkpoint:
        expected["bias"] = (model_codes, (rows,))
    return check_parts(checkpoint, module, expected)


def _check_values(checkpoint: Checkpoint, module: str, scheme: Scheme) -> Iterator[Finding]:
    if f"{module}.bias" in checkpoint:
        yield from check_float(checkpoint, f"{module}.bias")
    if scheme.is_int4:
        yield from _check_int4(checkpoint, module, scheme)
    else:
        for part in ("weight_scale",) if scheme.is_dynamic else ("deq_scale", "input_scale"):
            yield from check_positive(checkpoint, f"{module}.{part}")
    if scheme.is_dynamic:
        if checkpoint.raw(f"{module}.weight_offset").any():
            yield Finding(
                f"{module}.weight_offset", "is not zero everywhere: the engine takes weights as symmetric"
            )
        return
    weight, offset = checkpoint.raw(f"{module}.weight"), checkpoint.raw(f"{module}.input_offset")
    expected = quantized_bias(module, weight, offset)
    wrong = np.count_nonzero(expected != checkpoint.raw(f"{module}.quant_bias"))
    if wrong:
        yield Finding(
            f"{module}.quant_bias",
            f"differs from -sum(input_offset * weight) in {wrong} of {len(weight)} rows",
        )


def _check_int4(checkpoint: Checkpoint, module: str, scheme: Scheme) -> Iterator[Finding]:
    stored = checkpoint.raw(f"{module}.weight_scale")
    if (stored >> np.uint64(32)).any():
        yield Finding(f"{module}.weight_scale", "holds more than the bits of float32 numbers")
        return
    try:
        _, scale = int4_experts.decode(module, np.zeros((0, 1), np.int8), stored, scheme)
    except CheckpointError as error:
        yield Finding(f"{module}.weight_scale", error.what)
        return
    if not all_positive(scale):
        yield Finding(f"{module}.weight_scale", "holds a scale that is not positive and finite")
