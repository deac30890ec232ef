"""What is known of a tensor before it is computed: its name, type and shape."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.shard import DTYPES
from msquant.errors import OutputError

_CODES = {np.dtype(dtype).name: code for code, dtype in DTYPES.items()}


def dtype_code(dtype: "np.dtype[Any]") -> str:
    """The safetensors code of a NumPy type, by its name: bfloat16 may be another package's than `ml_dtypes`.

    Raises:
        OutputError: safetensors has no such type.
    """
    if dtype.name not in _CODES:
        raise OutputError(f"safetensors has no type for {dtype.name}")
    return _CODES[dtype.name]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written.

    Attributes:
        name: its full name.
        dtype: safetensors code, for example `BF16`.
        shape: sizes, outermost first; empty for a scalar.

    Raises:
        OutputError: the code is unknown or a size is negative.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or any(size < 0 for size in self.shape):
            raise OutputError(f"{self.name} cannot be stored as {self.dtype} {list(self.shape)}")

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> "TensorSpec":
        """The spec of an array. Raises OutputError if safetensors has no such type."""
        return cls(name, dtype_code(array.dtype), array.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.itemsize

    @property
    def rows(self) -> int:
        """The outermost size; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"
