"""Routed experts with int4 weights and per-token int8 inputs as msModelSlim writes them for vllm-ascend.

Read in msModelSlim (save/utils/pack.py, save/ascendv1.py) and vllm-ascend 0.23.0 and 0.26.0rc1 (quantization/
methods/w4a8.py: `AscendW4A8DynamicFusedMoEMethod`, with `version` 1.0.0). With a `group_size` of 0 it
computes

    y = weight_scale * s * (weight @ round(x / s)),    s = max|x| / 127 of each token

and with another one, in groups of so many inputs,

    y = s * sum over groups of float16(weight_scale * weight_scale_second) * (weight @ round(x / s))

but takes inputs apart into two int4: x_q = 16 high + low + 8, low from -8 to 7. What it adds for the 8,
`scale_bias` = 8 sum_k scale weight, is stored; in so many parts as processors may share the inputs.
"""

from collections.abc import Iterator, Mapping
from math import lcm
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msquant.errors import CheckpointError
from msquant.formats.description import GROUP_SIZE
from msquant.formats.int4_rows import pack_rows, splits_outputs
from msquant.formats.scales import held_scales
from msquant.schemes import Scheme

PARTS = ("weight", "weight_scale", "weight_offset", "scale_bias")
"""The tensors of such a linear layer."""

GROUP_PARTS = ("weight_scale_second", "weight_offset_second")
"""Those that a layer in groups of columns has beside these."""

VERSION: Final = "1.0.0"
"""The entry `version` of a description whose weights are packed, and have a `scale_bias`."""

MOST_PROCESSORS: Final = 16
"""Those that may share the inputs of a layer: the columns of its `scale_bias`."""

_ROWS, _ROWS_OF_HALF = 8, 4


DEFAULT_GROUP_SIZE: Final = 256
"""What vllm-ascend takes where a description names none."""


def is_packed(entries: Mapping[str, Any]) -> bool:
    """Whether two int4 weights are in a byte, by the entries of a description.

    Before that version there was one in each, and no `scale_bias`: the engine computes it when it loads.
    """
    return bool(entries.get("version") == VERSION)


def parts_of(scheme: Scheme, packed: bool = True) -> tuple[str, ...]:
    """The tensors of a layer with one scale a row, or in groups."""
    parts = PARTS if packed else PARTS[:-1]
    return parts if scheme.group_size is None else parts + GROUP_PARTS


def entries(scheme: Scheme | None) -> dict[str, Any]:
    """What a description says of int4 weights beside their tensors.

    Without a `group_size` vllm-ascend 0.23.0 takes groups of 256. It is 0 where nothing is in int4, too.
    """
    size = None if scheme is None else scheme.group_size
    return {"version": VERSION, GROUP_SIZE: size or 0}


def bias_columns(module: str) -> int:
    """The columns of a layer's `scale_bias`: 1 where processors share its outputs out, as of gate and up.

    Args:
        module: an expert's linear, `model.layers.3.mlp.experts.0.down_proj`.
    """
    return 1 if splits_outputs(module) else MOST_PROCESSORS


def shape_problem(module: str, shape: tuple[int, ...], scheme: Scheme, processors: int = 1) -> str | None:
    """Why an expert's linear `[N, K]` cannot be stored or loaded so; None if it can.

    The operator takes eight int4 of a column in one number. Rows of gate and up lie beside one another, so
    that half as many are enough.

    Args:
        module: its name.
        shape: of the whole weight.
        scheme: its groups.
        processors: that share it.
    """
    rows, columns = shape
    if not rows or not columns:
        return "holds no numbers"
    together = splits_outputs(module)
    if together:
        rows //= processors
    else:
        columns //= processors
    least = _ROWS_OF_HALF if together else _ROWS
    if rows % least:
        return f"{least} do not divide its {rows} rows"
    if scheme.group_size is not None and columns % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide its {columns} inputs"
    if not together and shape[1] % MOST_PROCESSORS:
        return f"{MOST_PROCESSORS}, the parts of scale_bias, do not divide its {shape[1]} inputs"
    return None


def part_specs(
    module: str, shape: tuple[int, ...], scheme: Scheme, packed: bool = True
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The safetensors dtype and the shape of each part of a weight `[N, K]`."""
    rows, columns = shape
    scales = "F32", (rows, 1)
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": ("I8", (rows // 2, columns)),
        "weight_scale": scales,
        "weight_offset": scales,
        "scale_bias": ("F32", (rows, bias_columns(module))),
    }
    if not packed:
        parts["weight"] = "I8", (rows, columns)
        del parts["scale_bias"]
    if scheme.group_size is not None:
        parts |= dict.fromkeys(GROUP_PARTS, ("F32", (rows, columns // scheme.group_size)))
    return parts


def encode(module: str, weight: NDArray[np.int8], scale: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """The parts of a layer.

    Args:
        module: its name.
        weight: int4, one in each, `[N, K]`.
        scale: float32 `[N]` or `[N, G]`, positive.

    Returns:
        `weight` int8 `[N / 2, K]`; `weight_scale` and `weight_offset`, zeros, float32 `[N, 1]`; `scale_bias`
        float32 `[N, 1]` or `[N, 16]`; in groups `weight_scale` is 1, and there are `weight_scale_second` and
        `weight_offset_second`, zeros, float32 `[N, G]`.

    Raises:
        CheckpointError: a group's scale is not one that float16 holds.
    """
    column = scale.reshape(-1, 1) if scale.ndim == 1 else np.ones((len(scale), 1), np.float32)
    parts: dict[str, NDArray[Any]] = {
        "weight": pack_rows(weight),
        "weight_scale": column,
        "weight_offset": np.zeros_like(column),
        "scale_bias": scale_bias(weight, scale, bias_columns(module)),
    }
    if scale.ndim == 1:
        return parts
    if not np.array_equal(held_scales(scale, "float16"), scale):
        raise CheckpointError(
            f"its scales have more digits than float16 holds (from {scale.min():.4g} to {scale.max():.4g}), "
            "in which vllm-ascend keeps those of groups",
            where=module,
            remedy="write it with one scale a row (W4A8_DYNAMIC), as compressed-tensors or as golden-stick",
        )
    return parts | {"weight_scale_second": scale, "weight_offset_second": np.zeros_like(scale)}


def scales(tensors: Mapping[str, NDArray[Any]], module: str, scheme: Scheme) -> NDArray[np.float32]:
    """The scales that are computed with, float32 `[N]` or `[N, G]`.

    Args:
        tensors: of the layer, by full name.
        module: its name.
        scheme: with one scale a row or in groups.
    """
    first = tensors[f"{module}.weight_scale"].astype(np.float32)
    if scheme.group_size is None:
        return first.reshape(-1)
    # What overflows is not finite, which is named where the scales are checked.
    with np.errstate(over="ignore", invalid="ignore"):
        product = first * tensors[f"{module}.weight_scale_second"].astype(np.float32)
    return held_scales(product, "float16")


def scale_bias(weight: NDArray[np.int8], scale: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    """`8 sum_k scale weight` of each of so many runs of inputs, float32 `[N, columns]`.

    Args:
        weight: int4, one in each, `[N, K]`.
        scale: float32 `[N]` or `[N, G]`.
        columns: how many runs.
    """
    factors = scale.reshape(len(scale), -1).astype(np.float64)
    # Integers are summed as far as they are in one run and have one scale.
    runs = lcm(columns, factors.shape[1])
    sums = weight.reshape(len(weight), runs, -1).sum(axis=2, dtype=np.int64)
    added: NDArray[np.float64] = 8 * sums * factors.repeat(runs // factors.shape[1], axis=1)
    return np.asarray(added.reshape(len(weight), columns, -1).sum(axis=2), np.float32)


def bias_problems(
    weight: NDArray[np.int8], scale: NDArray[np.float32], stored: NDArray[np.float32]
) -> Iterator[str]:
    """What is wrong with a stored `scale_bias`; other tools sum floating-point products in float32.

    Arguments as for `scale_bias`. In groups they take scales that the engine has not rounded yet.
    """
    magnitudes = scale_bias(np.abs(weight), scale, stored.shape[1])
    allowed = magnitudes * np.float32(1e-4 if scale.ndim == 1 else 1e-3)
    away = np.abs(stored - scale_bias(weight, scale, stored.shape[1]))
    if wrong := np.count_nonzero(~(away <= allowed).all(axis=1)):
        yield f"differs from 8 * sum(scale * weight) in {wrong} of {len(weight)} rows"
