"""Routed experts with int4 weights and per-token int8 inputs as msModelSlim writes them for vllm-ascend.

Read in msModelSlim (save/utils/pack.py, save/ascendv1.py) and vllm-ascend 0.23.0 and 0.26.0rc1 (quantization/
methods/w4a8.py: `AscendW4A8DynamicFusedMoEMethod`, with `version` 1.0.0 and a `group_size` of 0). It computes

    y = weight_scale * s * (weight @ round(x / s)),    s = max|x| / 127 of each token

but takes inputs apart into two int4: x_q = 16 high + low + 8, low from -8 to 7. What it adds for the 8,
`scale_bias` = 8 weight_scale sum_k weight, is stored; in so many parts as processors may share the inputs.
"""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msquant.families import fused_linears

PARTS = ("weight", "weight_scale", "weight_offset", "scale_bias")
"""The tensors of such a linear layer."""

GROUP_PART = "weight_scale_second"
"""A tensor that layers with a scale for each group of columns have beside these."""

MOST_PROCESSORS: Final = 16
"""Those that may share the inputs of a layer: the columns of its `scale_bias`."""

_ROWS, _ROWS_OF_HALF = 8, 4


def bias_columns(module: str) -> int:
    """The columns of a layer's `scale_bias`: 1 where processors share its outputs out, as of gate and up.

    Args:
        module: an expert's linear, `model.layers.3.mlp.experts.0.down_proj`.
    """
    return 1 if _runs_with_another(module) else MOST_PROCESSORS


def shape_problem(module: str, shape: tuple[int, ...], processors: int = 1) -> str | None:
    """Why an expert's linear `[N, K]` cannot be stored or loaded so; None if it can.

    The operator takes eight int4 of a column in one number. Rows of gate and up lie beside one another, so
    that half as many are enough.

    Args:
        module: its name.
        shape: of the whole weight.
        processors: that share it.
    """
    rows, columns = shape
    if _runs_with_another(module):
        rows //= processors
        return None if rows % _ROWS_OF_HALF == 0 else f"{_ROWS_OF_HALF} do not divide its {rows} rows"
    if rows % _ROWS:
        return f"{_ROWS} do not divide its {rows} rows"
    return (
        None
        if columns % MOST_PROCESSORS == 0
        else f"{MOST_PROCESSORS}, the parts of scale_bias, do not divide its {columns} inputs"
    )


def part_specs(module: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The safetensors dtype and the shape of each part of a weight `[N, K]`."""
    rows, columns = shape
    scales = "F32", (rows, 1)
    return {
        "weight": ("I8", (rows // 2, columns)),
        "weight_scale": scales,
        "weight_offset": scales,
        "scale_bias": ("F32", (rows, bias_columns(module))),
    }


def encode(module: str, weight: NDArray[np.int8], scale: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """The parts of a layer.

    Args:
        module: its name.
        weight: int4, one in each, `[N, K]`.
        scale: float32 `[N]`, positive.

    Returns:
        `weight` int8 `[N / 2, K]`; `weight_scale` and `weight_offset`, zeros, float32 `[N, 1]`; `scale_bias`
        float32 `[N, 1]` or `[N, 16]`.
    """
    column = scale.reshape(-1, 1)
    return {
        "weight": pack_rows(weight),
        "weight_scale": column,
        "weight_offset": np.zeros_like(column),
        "scale_bias": scale_bias(weight, scale, bias_columns(module)),
    }


def scale_bias(weight: NDArray[np.int8], scale: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    """`8 weight_scale sum_k weight` of each of so many runs of inputs, float32 `[N, columns]`."""
    sums = weight.reshape(len(weight), columns, -1).sum(axis=2, dtype=np.int64).astype(np.float64)
    added: NDArray[np.float64] = 8 * sums * scale.reshape(-1, 1).astype(np.float64)
    return added.astype(np.float32)


def pack_rows(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """int4 `[N, K]` to bytes `[N / 2, K]`: rows 2j in the low halves, rows 2j + 1 in the high ones."""
    return (weight[0::2] & 0xF) | (weight[1::2] << 4)


def unpack_rows(packed: NDArray[np.int8]) -> NDArray[np.int8]:
    """The int4 `[N, K]`, one in each, of what `pack_rows` returned."""
    weight = np.empty((2 * len(packed), packed.shape[1]), np.int8)
    # Shifted to the right, the sign fills what is left free.
    weight[0::2] = (packed << 4) >> 4
    weight[1::2] = packed >> 4
    return weight


def bias_problems(
    weight: NDArray[np.int8], scale: NDArray[np.float32], stored: NDArray[np.float32]
) -> Iterator[str]:
    """What is wrong with a stored `scale_bias`; other tools sum floating-point products in float32."""
    runs = np.abs(weight.reshape(len(weight), stored.shape[1], -1).astype(np.int32)).sum(axis=2)
    allowed = 8 * runs * scale.reshape(-1, 1) * np.float32(1e-4)
    away = np.abs(stored - scale_bias(weight, scale, stored.shape[1]))
    if wrong := np.count_nonzero(~(away <= allowed).all(axis=1)):
        yield f"differs from 8 * weight_scale * sum(weight) in {wrong} of {len(weight)} rows"


def _runs_with_another(module: str) -> bool:
    name = module.rpartition(".")[2]
    return any(name in members for members in fused_linears().values())
