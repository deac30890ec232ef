"""MXFP4: codes of four bits (E2M1) in blocks of 32 that share a power of two (E8M0), as gpt-oss has experts.

"OCP Microscaling Formats (MX) Specification", version 1.0. A tensor `X` `[..., N, K]` is stored as
`X_blocks`, bytes `[..., N, K / 32, 16]` with the first of two codes in the low half, and `X_scales`, bytes
`[..., N, K / 32]` that stand for `2 ** (byte - 127)`; 255 is NaN.
"""

import numpy as np
from numpy.typing import NDArray

BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
METHOD = "mxfp4"
"""`quant_method` in `config.json`."""

BLOCK, BLOCK_BYTES = 32, 16
"""Values that share a scale, and the bytes of their codes."""

_NAN, _BIAS = 255, 127
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=1)


def decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What codes and scales stand for.

    Args:
        blocks: `[..., G, 16]`.
        scales: `[..., G]`.

    Returns:
        float32 `[..., 32 G]`; a block whose scale is NaN is NaN.
    """
    values = _PAIRS[blocks].reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore"):
        values = np.ldexp(values, (scales.astype(np.int32) - _BIAS)[..., None])
    values[scales == _NAN] = np.nan
    return values.reshape(*scales.shape[:-1], -1)


def scales_of(blocks: str) -> str:
    """The name of the scales, by the name of the codes."""
    return f"{blocks.removesuffix(BLOCKS_SUFFIX)}{SCALES_SUFFIX}"


def decoded_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what is decoded, by that of the codes."""
    return (*blocks[:-2], blocks[-2] * BLOCK)
