"""Orthogonal matrices that spread the outliers among a vector's channels over all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, pi, sqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_SEED = 2404_00456

# The matrix is applied as a Kronecker product of matrices of at most about this size: such products are fast.
_MOST = 128


class Rotation(Protocol):
    """An orthogonal matrix by which row vectors are multiplied."""

    def rotate(self, vectors: Floats) -> Floats:
        """Multiply row vectors by the matrix, `[..., size]` to the same."""
        ...

    def undo(self, vectors: Floats) -> Floats:
        """The inverse of `rotate`."""
        ...


@dataclass(frozen=True)
class StoredRotation:
    """A rotation whose matrix is known, not what it is made of.

    Attributes:
        matrix: `[size, size]`, orthogonal.
    """

    matrix: Floats

    def rotate(self, vectors: Floats) -> Floats:
        """Multiply row vectors by the matrix, `[..., size]` to the same."""
        return vectors @ self.matrix

    def undo(self, vectors: Floats) -> Floats:
        """The inverse of `rotate`."""
        return vectors @ self.matrix.T


class Hadamard:
    """The randomized Hadamard matrix of a size, by which row vectors are multiplied.

    It is `diag(signs) (S kron M)`: S is Sylvester's Hadamard matrix of the greatest power of two in the size,
    M an orthogonal matrix of the odd rest, both scaled to be orthogonal, as in QuaRot (arXiv 2404.00456) and
    SpinQuant (arXiv 2405.16406). They take known Hadamard matrices of 12, 20, 28, ... for sizes that are no
    power of two. Here M is the discrete Hartley transform `(cos + sin)(2 pi i j / m) / sqrt(m)` (Bracewell,
    "Discrete Hartley transform", 1983), which is there for every size, and no entry of which is greater than
    `sqrt(2 / m)`. The signs are the same on every machine.

    Args:
        size: of the vectors.

    Attributes:
        size: the same.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        power = size & -size
        self._factors = []
        while size > _MOST and power > 1:
            part = min(power, _MOST // 2, 1 << (ceil(size / _MOST) - 1).bit_length())
            self._factors.append(_sylvester(part))
            size, power = size // part, power // part
        self._factors.append(np.kron(_sylvester(power), _hartley(size // power)))
        # NumPy keeps a bit generator's raw stream between its versions (NEP 19), unlike its distributions.
        bits = np.random.PCG64(_SEED).random_raw(self.size) >> np.uint64(63)
        self._signs = 1.0 - 2.0 * bits.astype(np.float64)

    def matrix(self) -> Floats:
        """The matrix itself, `[size, size]`."""
        return self.rotate(np.eye(self.size, dtype=np.float32))

    def rotate(self, vectors: Floats) -> Floats:
        """Multiply row vectors by the matrix, `[..., size]` to the same; computed in float64."""
        return self._mix(vectors * self._signs).astype(np.float32)

    def rotate_columns(self, vectors: Floats) -> Floats:
        """The same for vectors that are the columns of a matrix, `[size, N]`."""
        return self._mix(vectors * self._signs[:, None], vectors.shape[1]).astype(np.float32)

    def undo(self, vectors: Floats) -> Floats:
        """The inverse of `rotate`."""
        return (self._mix(vectors.astype(np.float64)) * self._signs).astype(np.float32)

    def _mix(self, vectors: NDArray[np.float64], behind: int = 1) -> NDArray[np.float64]:
        """The product with the Kronecker product of the factors, which is symmetric and its own inverse.

        Args:
            vectors: `[..., size, behind]`, in any shape.
            behind: so many values lie between one channel and the next.
        """
        shape, behind = vectors.shape, self.size * behind
        for factor in self._factors:
            behind //= len(factor)
            if behind > 1:
                vectors = np.matmul(factor, vectors.reshape(-1, len(factor), behind))
            else:
                vectors = vectors.reshape(-1, len(factor)) @ factor
        return vectors.reshape(shape)


ROTATIONS: Mapping[str, Callable[[int], Hadamard] | None] = {"none": None, "hadamard": Hadamard}
"""What a recipe's `rotation` stands for: what makes the matrix of a size; None for no rotation."""


def _sylvester(size: int) -> NDArray[np.float64]:
    """Sylvester's Hadamard matrix of a power of two, scaled to be orthogonal."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / sqrt(size)


def _hartley(size: int) -> NDArray[np.float64]:
    """The discrete Hartley transform of a size, scaled to be orthogonal."""
    # A large angle would lose the digits that a multiple of the period takes.
    angles = np.outer(np.arange(size), np.arange(size)) % size * (2 * pi / size)
    matrix: NDArray[np.float64] = (np.cos(angles) + np.sin(angles)) / sqrt(size)
    return matrix
