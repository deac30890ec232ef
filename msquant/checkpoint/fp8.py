"""Matrices in FP8 with a scale a block, as DeepSeek publishes them.

A weight `W` of `F8_E4M3` codes `[N, K]` has a companion `<name>_scale_inv` `[ceil(N/bn), ceil(K/bk)]`, and
stands for `W[n, k] * scale_inv[n // bn, k // bk]`, rounded to float32 once
(https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md). The block's size is
`quantization_config.weight_block_size` of `config.json`.
"""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.json_file import read_json
from msquant.errors import CheckpointError

FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
DEFAULT_BLOCK = (128, 128)

SHIFT = np.float32(2.0**120)
"""What `spread` leaves out of the values of codes."""

_LARGEST = np.float32(448)
_NAN, _NEGATIVE_NAN = 0x7F, 0xFF
_KEPT = np.int32(0x87F00000 - 2**32)
_SMALL = np.float32(2.0**7)
_TINY = np.float32(2.0**-149)
VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""What the codes stand for, float32 `[256]`."""


@dataclass(frozen=True, eq=False)
class BlockScale:
    """The scales of a matrix.

    Attributes:
        values: float32 `[ceil(N/bn), ceil(K/bk)]`, positive and finite.
        block: `(bn, bk)`.
    """

    values: NDArray[np.float32]
    block: tuple[int, int]

    def of_row(self, row: int, columns: int) -> NDArray[np.float32]:
        """The scale of each column of a row, `[columns]`; the same for all rows of its block."""
        return np.repeat(self.values[row // self.block[0]], self.block[1])[:columns]

    @classmethod
    def checked(
        cls, name: str, values: NDArray[np.float32], block: tuple[int, int], where: Path
    ) -> "BlockScale":
        """Check the scales of the matrix `name`, which have the right shape; `where` is their file.

        Raises:
            CheckpointError: one is not positive, or so large that a value would overflow float32.
        """
        with np.errstate(over="ignore"):
            bad = ~((values > 0) & np.isfinite(values * _LARGEST))
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise CheckpointError(
                f"{name}{SCALE_SUFFIX} holds {values[row, column]} at [{row}, {column}], "
                "a positive number is expected",
                where=where,
                remedy="download this shard again; if the published file holds it too, it cannot be used",
            )
        return cls(values, block)


def check_scale_shape(
    name: str, shape: tuple[int, ...], found: tuple[int, ...], block: tuple[int, int], where: Path
) -> None:
    """Check the shape of a matrix's scales.

    Args:
        name: of the matrix.
        shape: of the matrix.
        found: shape of the scales.
        block: `(bn, bk)`.
        where: the file that holds the scales.

    Raises:
        CheckpointError: it is no matrix, or the scales are of another shape.
    """
    if len(shape) != 2:
        raise CheckpointError(
            f"{name} is stored as {FP8} of shape {list(shape)}: only matrices have block scales",
            where=where,
            remedy="start from a checkpoint that stores all but its matrices in bfloat16",
        )
    expected = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    if found != expected:
        raise CheckpointError(
            f"{name}{SCALE_SUFFIX} has shape {list(found)}; for {name} of shape {list(shape)} in "
            f"blocks of {list(block)}, {list(expected)} is expected",
            where=where,
            remedy="use the config.json that belongs to these weights: its "
            "quantization_config.weight_block_size says the block's size",
        )


def dequantize(codes: NDArray[np.uint8], scale: NDArray[np.float32], out: NDArray[np.float32]) -> int:
    """Write the float32 values of rows of one block into `out`.

    Args:
        codes: `[rows, K]`.
        scale: `[K]`, of `BlockScale.of_row`.
        out: `[rows, K]`.

    Returns:
        How many codes are NaN; there is no code for infinity.
    """
    if can_spread(scale):
        spread(codes, out)
        np.multiply(out, scale * SHIFT, out=out)
    else:
        # Half as fast, but with no overflow, and exact when the processor is set to flush subnormals to 0.
        np.take(VALUES, codes, out=out, mode="clip")
        np.multiply(out, scale, out=out)
    if not codes.size or (codes.max() < _NEGATIVE_NAN and codes.view(np.int8).max() < _NAN):
        return 0
    return int(np.count_nonzero((codes & _NAN) == _NAN))


def can_spread(scale: NDArray[np.float32]) -> bool:
    """Whether what `spread` writes can be multiplied by these scales and `SHIFT` without a loss."""
    return bool(scale.max(initial=0) < _SMALL and _TINY * SHIFT > 0)


def spread(codes: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Write the values of codes, divided by `SHIFT`, into `out` of the same shape; NaN is taken for 480."""
    # The code's bits put where float32 has them: its exponents are biased by 127 instead of 7.
    bits = out.view(np.int32)
    np.copyto(bits, codes.view(np.int8))
    np.left_shift(bits, 20, out=bits)
    np.bitwise_and(bits, _KEPT, out=bits)


def read_block_size(folder: Path) -> tuple[int, int]:
    """The block's size of a folder's `config.json`; 128 by 128 if that does not say.

    Raises:
        CheckpointError: `config.json` is damaged, or holds something else than two positive integers.
    """
    path = folder / "config.json"
    if not path.is_file():
        return DEFAULT_BLOCK
    settings = read_json(path).get("quantization_config")
    value = settings.get("weight_block_size") if isinstance(settings, dict) else None
    match value:
        case None:
            return DEFAULT_BLOCK
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise CheckpointError(
        f"quantization_config.weight_block_size is {value!r}, two positive integers are expected",
        where=path,
        remedy="copy config.json of the original model again",
    )
