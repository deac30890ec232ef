"""The rules a compressed-tensors folder must keep for vLLM to load and compute it correctly.

Each rule is taken from what vllm 0.11.0 and 0.32.0 do: compressed_tensors.py, compressed_tensors/utils.py
(`find_matched_target`, `should_ignore_layer`), its schemes (`CompressedTensorsW8A8Int8.create_weights`), and
the loaders of model_executor/parameter.py, which copy into a parameter's dtype, but insist on its shape; a
number may be a scalar.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.formats.compressed_tensors import packed
from msquant.formats.compressed_tensors.layout import DYNAMIC_PARTS, STATIC_PARTS, scale_shape
from msquant.formats.compressed_tensors.section import ConfigGroup, Section
from msquant.formats.folder_rules import (
    FLOAT_CODES,
    Finding,
    Parts,
    Shape,
    check_float,
    check_integers,
    check_parts,
    check_positive,
    check_signed,
    layer_shape,
)
from msquant.formats.fused_layers import check_fused_inputs, experts_parent, fused_layers
from msquant.schemes import FLOAT, Scheme

_INT8 = frozenset({"I8"})
_NUMBER: tuple[Shape, ...] = ((1,), ())


def section_schemes(checkpoint: Checkpoint, section: Section) -> dict[str, Scheme]:
    """The scheme of every stored linear layer by module, as `config.json` says it."""
    schemes: dict[str, Scheme] = {}
    for name in checkpoint.names():
        module, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and is_linear(checkpoint, module)):
            group = section.group(module)
            schemes[module] = group.scheme if group else FLOAT
    return schemes


def check_fused_targets(section: Section, schemes: Mapping[str, Scheme]) -> Iterator[Finding]:
    """A layer that vLLM fuses is looked for by its own name and class before its parts are."""
    for fused, members in fused_layers(module for module in schemes if not experts_parent(module)).items():
        mine = section.group(members[0])
        # Ignored layers are looked for by their parts.
        if mine is None:
            continue
        found = section.group(fused) or mine
        if found != mine:
            yield Finding(
                "config.json",
                f"vLLM takes {fused} for a layer of {found.name}, its part {members[0]} is in {mine.name}: "
                f"name the fused layer in the targets of {mine.name} too",
            )


def parts_of(group: ConfigGroup) -> tuple[str, ...]:
    """The tensors of a layer of a group; the layer's own `bias` is the only other one."""
    if packed.is_packed(group.scheme) and group.scheme.weights is not None:
        return (
            *packed.part_shapes(group.scheme.weights, (1, 1)),
            *((packed.ORDER,) if group.ordered else ()),
        )
    if group.scheme.is_dynamic:
        return DYNAMIC_PARTS
    return tuple(part for part in STATIC_PARTS if part != "input_zero_point" or not group.symmetric)


def check_layout(checkpoint: Checkpoint, module: str, group: ConfigGroup) -> list[Finding]:
    """Check the names, dtypes and shapes of a quantized layer's tensors; no weight is read.

    Args:
        checkpoint: the opened folder.
        module: the layer, for example `model.layers.0.mlp.up_proj`.
        group: the one it is in.
    """
    if packed.is_packed(group.scheme):
        return packed.check_layout(checkpoint, module, group.scheme, ordered=group.ordered)
    shape = layer_shape(checkpoint, module, parts_of(group))
    if isinstance(shape, list):
        return shape
    quant = group.scheme.weights
    assert quant is not None
    if quant.group_size is not None and shape[1] % quant.group_size:
        problem = f"has {shape[1]} inputs, which groups of {quant.group_size} do not divide"
        return [Finding(f"{module}.weight", problem)]
    expected: Parts = {
        "weight": (_INT8, (shape,)),
        "weight_scale": (FLOAT_CODES, (scale_shape(quant, shape),) if group.per_channel else _NUMBER),
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
    quantized: dict[str, ConfigGroup] = {}
    for name in checkpoint.names():
        module, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and checkpoint.dtype(name) == "I8"):
            if group := section.group(module):
                quantized[module] = group
            else:
                stored = checkpoint.dtype(name)
                yield Finding(name, f"stored as {stored}, but config.json does not quantize the layer")
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


def _check_values(checkpoint: Checkpoint, module: str, group: ConfigGroup) -> Iterator[Finding]:
    alone = group.scheme.is_weight_only
    yield from (check_signed if alone else check_positive)(checkpoint, f"{module}.weight_scale")
    if group.scheme.is_static:
        yield from check_positive(checkpoint, f"{module}.input_scale")
    if f"{module}.bias" in checkpoint:
        yield from check_float(checkpoint, f"{module}.bias")
    zero_point = f"{module}.weight_zero_point"
    if packed.is_packed(group.scheme):
        return
    quant = group.scheme.weights
    if quant is not None and quant.bits < 8:
        yield from check_integers(checkpoint, f"{module}.weight", quant)
    if zero_point in checkpoint and np.any(checkpoint.raw(zero_point)):
        yield Finding(zero_point, "is not zero: vLLM takes weights as symmetric")
