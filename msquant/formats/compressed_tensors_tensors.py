"""What the tensors themselves must be for vLLM's int8 layers: dtypes, shapes and values.

Read in vllm 0.11.0 and 0.32.0: `CompressedTensorsW8A8Int8.create_weights` and the loaders of parameter.py,
which copy into a parameter's dtype, but insist on its shape; a number may be a scalar.
"""

from collections.abc import Iterator

import numpy as np

from msquant.checkpoint.reader import Checkpoint
from msquant.formats.compressed_tensors_layout import DYNAMIC_PARTS, STATIC_PARTS
from msquant.formats.compressed_tensors_section import Group, Section
from msquant.formats.format import Finding
from msquant.formats.fused_layers import check_fused_inputs
from msquant.formats.tensor_rules import (
    FLOAT_CODES,
    Parts,
    Shape,
    check_float,
    check_parts,
    check_positive,
    layer_shape,
)

_INT8 = frozenset({"I8"})
_NUMBER: tuple[Shape, ...] = ((1,), ())


def parts_of(group: Group) -> tuple[str, ...]:
    """The tensors of a layer of a group; the layer's own `bias` is the only other one."""
    if group.scheme.is_dynamic:
        return DYNAMIC_PARTS
    return tuple(part for part in STATIC_PARTS if part != "input_zero_point" or not group.symmetric)


def check_layout(checkpoint: Checkpoint, module: str, group: Group) -> list[Finding]:
    """Check the names, dtypes and shapes of a quantized layer's tensors, from the headers alone.

    Args:
        checkpoint: the opened folder.
        module: the layer, for example `model.layers.0.mlp.up_proj`.
        group: the one it is in.
    """
    shape = layer_shape(checkpoint, module, parts_of(group))
    if isinstance(shape, list):
        return shape
    expected: Parts = {
        "weight": (_INT8, (shape,)),
        "weight_scale": (FLOAT_CODES, ((shape[0], 1),) if group.per_channel else _NUMBER),
        "input_scale": (FLOAT_CODES, _NUMBER),
        "input_zero_point": (_INT8, _NUMBER),
    }
    expected = {part: expected[part] for part in parts_of(group)}
    if f"{module}.bias" in checkpoint:
        expected["bias"] = (FLOAT_CODES, ((shape[0],),))
    return check_parts(checkpoint, module, expected)


def check_tensors(checkpoint: Checkpoint, section: Section) -> Iterator[Finding]:
    """Check every stored tensor, reading one at a time.

    Args:
        checkpoint: the opened folder.
        section: what its `config.json` says.
    """
    quantized: dict[str, Group] = {}
    for name in checkpoint.names():
        module, _, part = name.rpartition(".")
        if part == "weight" and checkpoint.dtype(name) == "I8":
            if group := section.group(module):
                quantized[module] = group
            else:
                yield Finding(name, "stored as I8, but config.json does not quantize the layer")
        elif part == "weight" and is_linear(checkpoint, module) and (group := section.group(module)):
            yield Finding(
                name,
                f"stored as {checkpoint.dtype(name)}, but config.json quantizes the layer in {group.name}: "
                "it belongs into ignore",
            )
    for name in checkpoint.names():
        if name.rpartition(".")[0] not in quantized and checkpoint.dtype(name) != "I8":
            yield from check_float(checkpoint, name)
    for module, group in quantized.items():
        yield from check_layout(checkpoint, module, group) or _check_values(checkpoint, module, group)
    yield from check_fused_inputs(checkpoint, ("input_scale", "input_zero_point"))


def is_linear(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a stored module is a linear layer: a matrix that is no embedding."""
    name = f"{module}.weight"
    return len(checkpoint.shape(name)) == 2 and not module.endswith("embed_tokens")


def _check_values(checkpoint: Checkpoint, module: str, group: Group) -> Iterator[Finding]:
    yield from check_positive(checkpoint, f"{module}.weight_scale")
    if group.scheme.is_static:
        yield from check_positive(checkpoint, f"{module}.input_scale")
    if f"{module}.bias" in checkpoint:
        yield from check_float(checkpoint, f"{module}.bias")
    zero_point = f"{module}.weight_zero_point"
    if zero_point in checkpoint and np.any(checkpoint.raw(zero_point)):
        yield Finding(zero_point, "is not zero: vLLM takes weights as symmetric")
