"""oneDNN's int8 matrix product, in the library that MindSpore's CPU backend comes with.

`dnnl_gemm_u8s8s32` (oneDNN 2.2, include/oneapi/dnnl/dnnl.h) multiplies int8 as it is stored, a byte a weight,
with the processor's own int8 instructions. Processors without such instructions add pairs of products in 16
bits and saturate: `load` therefore tries the extremes first, and reports no kernel where it is not exact.
"""

import ctypes
import importlib.util
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Gemm = Callable[[NDArray[np.uint8], NDArray[np.int8]], NDArray[np.int32]]
"""`[T, K]` and `[N, K]`, both contiguous, to the exact `[T, N]`; for K below `LONGEST`."""

# 255 * 128 for each channel stays within int32.
LONGEST = 2**31 // (255 * 128)

_ROW_MAJOR, _TRANSPOSED, _FIXED = b"N", b"T", b"F"


@cache
def load() -> Gemm | None:
    """The product, or None where the library is not there or its products are not exact."""
    # Elsewhere oneDNN 2.2 multiplies int8 in plain C++, which is slower than float32.
    if platform.machine() != "x86_64":
        return None
    spec = importlib.util.find_spec("mindspore")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libdnnl.so.2"))
        gemm = _wrap(library.dnnl_gemm_u8s8s32)
    except (OSError, AttributeError):
        return None
    return gemm if _is_exact(gemm) else None


def _wrap(function: "ctypes._NamedFuncPointer") -> Gemm:
    size, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    function.argtypes = [ctypes.c_char] * 3 + [size] * 3 + [real, pointer, size, ctypes.c_uint8]
    function.argtypes += [pointer, size, ctypes.c_int8, real, pointer, size, pointer]
    function.restype = ctypes.c_int
    no_offset = ctypes.c_int32(0)

    def gemm(a: NDArray[np.uint8], b: NDArray[np.int8]) -> NDArray[np.int32]:
        rows, channels = a.shape
        columns = b.shape[0]
        c = np.empty((rows, columns), np.int32)
        status = function(
            *(_ROW_MAJOR, _TRANSPOSED, _FIXED, rows, columns, channels, 1.0),
            *(a.ctypes.data, channels, 0, b.ctypes.data, channels, 0, 0.0),
            *(c.ctypes.data, columns, ctypes.addressof(no_offset)),
        )
        if status:
            raise RuntimeError(f"dnnl_gemm_u8s8s32 returned {status}")
        return c

    return gemm


def _is_exact(gemm: Gemm) -> bool:
    # One row and few rows take other kernels than many.
    for rows in (1, 3, 64):
        for value in (127, -128):
            a, b = np.full((rows, 576), 255, np.uint8), np.full((96, 576), value, np.int8)
            if (gemm(a, b) != 576 * 255 * value).any():
                return False
    return True
