"""Routed experts with int4 weights and per-token int8 inputs as golden-stick writes them for MindFormers.

Read in mindspore_gs 1.4.1 (ptq/ptq/hal.py: `GptqDynamicQuantMatmul`; models/mindformers_models/
param_processor.py: `MoeParamProcessor`) and mindformers 1.7.0 to 1.9.0 (quantization/golden_stick/a8dynw4.py:
`A8W4DynamicLinearMethod`; tensor_parallel/grouped_layers.py: `weight_loader`). It computes

    y = s * sum over groups of weight_scale * (weight @ round(x / s)),    s = max|x| / 127 of each token

A scale is a uint64 whose low half is the bits of a float32. The columns of a group are the description's
`group_size`, which golden-stick forgets. There are always groups: where a row has one scale, each holds it,
and an entry of the description's own, `weight_quant_granularity`, says so.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.description import GROUP_SIZE, Description
from msquant.formats.int4_rows import group_scales, pack_rows, splits_outputs, unpack_rows
from msquant.schemes import W4A8_DYNAMIC, Scheme

GRANULARITY, PER_CHANNEL = "weight_quant_granularity", "per_channel"
"""The entry that is added where a row has one scale; the words are those of golden-stick's `PTQConfig`."""

ROW_GROUPS: Final = (256, 128, 64, 32)
"""The sizes of groups that a row with one scale may be stored in; golden-stick has all but the last."""

Specs = dict[str, tuple[str, tuple[int, ...]]]


def row_groups(config: Mapping[str, Any]) -> int:
    """The greatest of `ROW_GROUPS` that fits the experts of a model; 0 where none does, or there are none."""
    hidden, inner = config.get("hidden_size"), config.get("moe_intermediate_size")
    if type(hidden) is not int or type(inner) is not int:
        return 0
    return next((size for size in ROW_GROUPS if not (hidden % size or inner % size) and hidden > size), 0)


def entries(scheme: Scheme, rows: int) -> dict[str, Any]:
    """What a description says of int4 weights beside their tensors.

    Args:
        scheme: theirs.
        rows: as `row_groups` returns it.
    """
    if scheme.group_size is not None:
        return {GROUP_SIZE: scheme.group_size}
    return {GROUP_SIZE: rows, GRANULARITY: PER_CHANNEL}


def stored_size(checkpoint: Checkpoint, module: str) -> int:
    """The columns of a group of a layer in a folder, by the shapes of its tensors; 0 where they have none."""
    shapes = (checkpoint.shape(f"{module}.{part}") for part in ("weight", "weight_scale"))
    columns, groups = (shape[1] if len(shape) == 2 else 0 for shape in shapes)
    return columns // groups if groups else 0


def stored_scheme(checkpoint: Checkpoint, module: str, description: Description) -> Scheme:
    """The scheme of such a layer, by its tensors: golden-stick's own descriptions have no `group_size`.

    Args:
        checkpoint: the opened folder, damaged or not.
        module: the layer.
        description: of the folder.
    """
    if description.entries.get(GRANULARITY) == PER_CHANNEL:
        return W4A8_DYNAMIC
    return W4A8_DYNAMIC.in_groups(max(stored_size(checkpoint, module), 1))


def shape_problem(module: str, shape: tuple[int, ...], size: int, processors: int = 1) -> str | None:
    """Why an expert's linear `[N, K]` cannot be stored or loaded in groups of a size; None if it can.

    Args:
        module: its name.
        shape: of the whole weight.
        size: columns in a group.
        processors: that share it.
    """
    rows, columns = shape
    if splits_outputs(module):
        rows //= processors
    else:
        columns //= processors
    if rows % 2:
        return f"a byte holds two of its rows, and they are {rows}"
    if columns % size:
        return f"groups of {size} do not divide its {columns} inputs"
    if columns == size and splits_outputs(module):
        # Its loader takes a tensor of one column for the scales of int8 weights.
        return f"its {columns} inputs are one group, which the loader of gate and up does not take"
    return None


def part_specs(shape: tuple[int, ...], size: int) -> Specs:
    """The safetensors dtype and the shape of each part of a weight `[N, K]` in groups of a size."""
    rows, columns = shape
    scales = rows, columns // size
    return {
        "weight": ("I8", (rows // 2, columns)),
        "weight_scale": ("U64", scales),
        "weight_offset": ("I32", scales),
    }


def encode(weight: NDArray[np.int8], scale: NDArray[np.float32], size: int) -> dict[str, NDArray[Any]]:
    """The parts of a layer.

    Args:
        weight: int4, one in each, `[N, K]`.
        scale: float32 `[N]` or `[N, K / size]`, positive.
        size: columns in a group.

    Returns:
        `weight` int8 `[N / 2, K]`; `weight_scale` uint64 and `weight_offset` int32, zeros, `[N, K / size]`.
    """
    stored = group_scales(scale, weight.shape[1] // size).view(np.uint32).astype(np.uint64)
    return {
        "weight": pack_rows(weight),
        "weight_scale": stored,
        "weight_offset": np.zeros(stored.shape, np.int32),
    }


def scale_values(stored: NDArray[np.uint64]) -> NDArray[np.float32]:
    """The float32 numbers whose bits the low halves hold."""
    return stored.astype(np.uint32).view(np.float32)


def decode(
    module: str, packed: NDArray[np.int8], stored: NDArray[np.uint64], scheme: Scheme
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The int4 of a layer, one in each, and its scales.

    Args:
        module: its name, for the error.
        packed: `[N / 2, K]`.
        stored: `[N, G]`.
        scheme: as `stored_scheme` returns it.

    Raises:
        CheckpointError: the description says that rows have one scale, and one of them has several.
    """
    scale = scale_values(stored)
    if scheme.group_size is None:
        if (scale != scale[:, :1]).any():
            raise CheckpointError(
                f"differs within a row, but the description says {GRANULARITY}: {PER_CHANNEL}",
                where=f"{module}.weight_scale",
            )
        scale = np.ascontiguousarray(scale[:, 0])
    return unpack_rows(packed), scale
