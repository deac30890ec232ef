"""Integers of a few bits, as many side by side in 32 as fit, the first in the lowest bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.errors import CheckpointError

WORD_BITS = 32


def pack(values: NDArray[np.integer[Any]], bits: int) -> NDArray[np.int32]:
    """Integers `[R, C]` side by side in as few numbers as they fit into; what is left of the last is 0.

    Args:
        values: from -2^(bits - 1) to 2^(bits - 1) - 1; each is raised by 2^(bits - 1), so as not to be
            negative.
        bits: of each: 2, 4 or 8.
    """
    held = WORD_BITS // bits
    packed = np.zeros((values.shape[0], -(-values.shape[1] // held)), np.uint32)
    for place in range(held):
        part = values[:, place::held].astype(np.int32) + (1 << (bits - 1))
        packed[:, : part.shape[1]] |= part.astype(np.uint32) << np.uint32(bits * place)
    return packed.view(np.int32)


def unpack(packed: NDArray[np.int32], bits: int, columns: int) -> NDArray[np.int8]:
    """The integers `[R, columns]` of what `pack` returned."""
    held, words = WORD_BITS // bits, np.ascontiguousarray(packed).view(np.uint32)
    values = np.empty((packed.shape[0], packed.shape[1] * held), np.int8)
    mask = np.uint32((1 << bits) - 1)
    for place in range(held):
        part = (words >> np.uint32(bits * place)) & mask
        values[:, place::held] = part.astype(np.int16) - (1 << (bits - 1))
    return np.ascontiguousarray(values[:, :columns])


def column_groups(name: str, order: NDArray[Any] | None, groups: int) -> NDArray[np.int32] | None:
    """The group of each column, where groups are no runs of neighbours; None where they are.

    Args:
        name: of the tensor that says it.
        order: what that holds, `[K]`; None where there is none.
        groups: how many there are, which divides the columns.

    Raises:
        CheckpointError: it names a group that is not there.
    """
    if order is None:
        return None
    if (order < 0).any() or (order >= groups).any():
        raise CheckpointError(
            f"names groups from {order.min()} to {order.max()}, there are {groups}", where=name
        )
    runs = np.arange(len(order)) // (len(order) // groups)
    return None if np.array_equal(order, runs) else order.astype(np.int32)
