"""The tensors of one linear layer in the compressed-tensors layout `pack-quantized`, written and read back.

It holds layers whose weights alone are quantized: so many integers as fit into 32 bits are one number, the
first in its lowest bits, each raised by 2^(bits - 1) so that it is not negative. Read in compressed-tensors
0.11 to 0.20 (compressors/pack_quantized), and in vllm 0.11.0 and 0.32.0 (schemes/compressed_tensors_wNa16.py,
kernels/linear/mixed_precision/cpu.py), which compute `y = (weight_scale * (q - zero_point)) @ x + bias`.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.dtypes import DTYPE_CODES, cast
from msquant.formats.folder_rules import FLOAT_CODES, Finding, Parts, check_parts
from msquant.formats.packed_words import WORD_BITS, column_groups, pack, unpack
from msquant.formats.scales import all_signed
from msquant.schemes import Quant, Scheme

FORMAT: Final = "pack-quantized"
"""What `format` is in `config.json`."""

ORDER: Final = "weight_g_idx"
"""The group of each column, int32 `[K]`, of `actorder: group`; other orders need no tensor."""

_GRANULARITIES = ("channel", "group")


def is_packed(scheme: Scheme) -> bool:
    """Whether a layer is stored so: weights alone are quantized, to a width that fills 32 bits.

    The package leaves the rest of 32 bits empty for other widths, and vLLM 0.32 does not.
    """
    quant = scheme.weights
    return (
        quant is not None
        and scheme.inputs is None
        and WORD_BITS % quant.bits == 0
        and quant.granularity in _GRANULARITIES
    )


def per_word(quant: Quant) -> int:
    """How many integers one number holds."""
    return WORD_BITS // quant.bits


def groups_of(quant: Quant, columns: int) -> int:
    """How many scales a row of so many columns has."""
    return 1 if quant.group_size is None else columns // quant.group_size


def part_shapes(quant: Quant, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a layer `[N, K]` but its bias, by the last part of its name."""
    rows, columns = shape
    groups, held = groups_of(quant, columns), per_word(quant)
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (rows, -(-columns // held)),
        "weight_scale": (rows, groups),
        "weight_shape": (2,),
    }
    if not quant.symmetric:
        shapes["weight_zero_point"] = (-(-rows // held), groups)
    return shapes


def part_specs(quant: Quant, shape: tuple[int, ...], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same with the safetensors dtype of each; scales are in the model's, `dtype`."""
    codes = {"weight_scale": DTYPE_CODES[dtype], "weight_shape": "I64"}
    return {part: (codes.get(part, "I32"), size) for part, size in part_shapes(quant, shape).items()}


def encode_parts(module: str, linear: QuantizedLinear, dtype: str) -> dict[str, NDArray[Any]]:
    """The tensors of a layer but its bias.

    Args:
        module: its name, for errors.
        linear: in a scheme that `is_packed`.
        dtype: the model's, in which scales are stored.

    Returns:
        `weight_packed` int32 `[N, K / integers in 32 bits]`, `weight_scale` in `dtype` `[N, K / group_size]`,
        `weight_shape` int64 `[2]`, and with zero points `weight_zero_point` int32 `[N / integers in 32 bits,
        K / group_size]`.

    Raises:
        CheckpointError: a scale is 0 or not finite in `dtype`.
    """
    quant = linear.scheme.weights
    assert quant is not None
    groups = groups_of(quant, linear.weight.shape[1])
    scale = cast(f"{module}.weight_scale", linear.weight_scale.reshape(-1, groups), dtype)
    _check_scales(module, scale.astype(np.float32))
    parts = {
        "weight_packed": pack(linear.weight, quant.bits),
        "weight_scale": scale,
        "weight_shape": np.array(linear.weight.shape, np.int64),
    }
    if linear.weight_offset is not None:
        packed = pack(linear.weight_offset.reshape(-1, groups).T, quant.bits)
        parts["weight_zero_point"] = np.ascontiguousarray(packed.T)
    return parts


def decode_linear(module: str, tensors: Mapping[str, NDArray[Any]], scheme: Scheme) -> QuantizedLinear:
    """The layer that `encode_parts`, or another tool, stored.

    Args:
        module: its name.
        tensors: the parts by full name, and `bias` if there is one.
        scheme: as `config.json` has it.

    Raises:
        CheckpointError: a scale is 0 or not finite; an order names a group that is not there.
    """
    quant = scheme.weights
    assert quant is not None
    rows, columns = map(int, tensors[f"{module}.weight_shape"])
    scale = tensors[f"{module}.weight_scale"].astype(np.float32)
    _check_scales(module, scale)
    groups = scale.shape[1]
    if quant.group_size is None:
        scale = scale.reshape(rows)
    offset = None
    if not quant.symmetric:
        unpacked = unpack(tensors[f"{module}.weight_zero_point"].T, quant.bits, rows)
        offset = np.ascontiguousarray(unpacked.T).astype(np.int32).reshape(scale.shape)
    bias = tensors.get(f"{module}.bias")
    return QuantizedLinear(
        weight=unpack(tensors[f"{module}.weight_packed"], quant.bits, columns),
        weight_scale=scale,
        scheme=scheme,
        bias=None if bias is None else bias.astype(np.float32),
        weight_offset=offset,
        column_groups=column_groups(f"{module}.{ORDER}", tensors.get(f"{module}.{ORDER}"), groups),
    )


def stored_shape(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """The shape `(N, K)` that a layer says it has.

    Raises:
        CheckpointError: it does not say it, or says it in something that is no shape.
    """
    name = f"{module}.weight_shape"
    values = checkpoint.raw(name) if checkpoint.dtype(name) in ("I64", "I32") else np.zeros(0, np.int64)
    if values.shape != (2,) or (values < 1).any():
        raise CheckpointError(f"{name} is not the shape of a matrix", where=checkpoint.shard_path(name))
    return int(values[0]), int(values[1])


def check_layout(
    checkpoint: Checkpoint, module: str, scheme: Scheme, *, ordered: bool = False
) -> list[Finding]:
    """Check the names, dtypes and shapes of a layer's tensors.

    Args:
        checkpoint: the opened folder.
        module: the layer.
        scheme: as `config.json` has it.
        ordered: whether `ORDER` is one of the tensors.
    """
    quant = scheme.weights
    assert quant is not None
    parts = (*part_shapes(quant, (1, 1)), *((ORDER,) if ordered else ()))
    missing = [f"{module}.{part}" for part in parts if f"{module}.{part}" not in checkpoint]
    if missing:
        return [Finding(name, "missing from a quantized layer") for name in missing]
    try:
        shape = stored_shape(checkpoint, module)
    except CheckpointError as error:
        return [Finding(f"{module}.weight_shape", error.what)]
    if quant.group_size is not None and shape[1] % quant.group_size:
        problem = f"has {shape[1]} inputs, which groups of {quant.group_size} do not divide"
        return [Finding(f"{module}.weight_packed", problem)]
    codes = {"weight_scale": FLOAT_CODES, "weight_shape": frozenset({"I64", "I32"})}
    expected: Parts = {
        part: (codes.get(part, frozenset({"I32"})), (size,))
        for part, size in part_shapes(quant, shape).items()
    }
    if ordered:
        expected[ORDER] = (frozenset({"I32", "I64"}), ((shape[1],),))
    if f"{module}.bias" in checkpoint:
        expected["bias"] = (FLOAT_CODES, ((shape[0],),))
    return check_parts(checkpoint, module, expected)


def _check_scales(module: str, scales: NDArray[np.float32]) -> None:
    if not all_signed(scales):
        raise CheckpointError(
            f"its weight scales are 0 or not finite (from {scales.min():.4g} to {scales.max():.4g})",
            where=module,
            remedy="keep this layer in floating point",
        )
