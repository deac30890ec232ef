"""oneDNN's matrix products, in the library that MindSpore's CPU backend comes with.

`dnnl_gemm_u8s8s32` (oneDNN 2.2, include/oneapi/dnnl/dnnl.h) multiplies int8 as it is stored, a byte a weight,
with the processor's own int8 instructions. Processors without such instructions add pairs of products in 16
bits and saturate: `load_int8` therefore tries the extremes first, and gives no kernel that is not exact.

This build of oneDNN has no threads of its own. Large matrices are split by their rows over threads here, of
which there are half as many as processors, as in vLLM: one more than there are free cores keeps all waiting.
"""

import ctypes
import importlib.util
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int8Product = Callable[[NDArray[np.uint8], NDArray[np.int8]], NDArray[np.int32]]
"""`[T, K]` and `[N, K]`, both contiguous, to the exact `[T, N]`; for K below `LONGEST`."""

FloatProduct = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]
"""`[T, K]` and `[N, K]`, both contiguous, to `[T, N]`."""

# 255 * 128 for each channel stays within int32.
LONGEST = 2**31 // (255 * 128)

# A thread gets at least so much of a matrix: 0.4 ms of reading, ten times what handing it over takes.
SPLIT_BYTES = 1 << 22

# Rows that are computed while the matrix is read; from there on time goes with their number.
FEW_ROWS = 16

_LAYOUT = (b"N", b"T")
_SIZE, _POINTER, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


@cache
def load_int8() -> Int8Product | None:
    """The product of int8, or None where the library is not there or its products are not exact."""
    library = _library()
    if library is None:
        return None
    function = library.dnnl_gemm_u8s8s32
    function.argtypes = [ctypes.c_char] * 3 + [_SIZE] * 3 + [_REAL, _POINTER, _SIZE, ctypes.c_uint8]
    function.argtypes += [_POINTER, _SIZE, ctypes.c_int8, _REAL, _POINTER, _SIZE, _POINTER]
    no_offset = ctypes.c_int32(0)

    def multiply(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> None:
        (rows, channels), columns = a.shape, len(b)
        status = function(
            *(*_LAYOUT, b"F", rows, columns, channels, 1.0, a.ctypes.data, channels, 0),
            *(b.ctypes.data, channels, 0, 0.0, c.ctypes.data, c.strides[0] // c.itemsize),
            ctypes.addressof(no_offset),
        )
        _check(status)

    def product(a: NDArray[np.uint8], b: NDArray[np.int8]) -> NDArray[np.int32]:
        return _split(multiply, a, b, np.empty((len(a), len(b)), np.int32))

    return product if is_exact(product) else None


@cache
def load_float() -> FloatProduct | None:
    """The product of float32, or None where the library is not there.

    For few rows it takes as long as NumPy's own; but that wakes threads which wait for one another by
    spinning, and on a busy machine takes several times as long.
    """
    library = _library()
    if library is None:
        return None
    function = library.dnnl_sgemm
    function.argtypes = [ctypes.c_char] * 2 + [_SIZE] * 3 + [_REAL, _POINTER, _SIZE, _POINTER, _SIZE]
    function.argtypes += [_REAL, _POINTER, _SIZE]

    def multiply(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> None:
        (rows, channels), columns = a.shape, len(b)
        status = function(
            *(*_LAYOUT, rows, columns, channels, 1.0, a.ctypes.data, channels, b.ctypes.data, channels),
            *(0.0, c.ctypes.data, c.strides[0] // c.itemsize),
        )
        _check(status)

    def product(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
        return _split(multiply, a, b, np.empty((len(a), len(b)), np.float32))

    return product


def is_exact(product: Int8Product) -> bool:
    """Whether a product of the largest integers is right, by all kernels: few rows take others than many."""
    for rows in (1, 3, 64):
        for value in (127, -128):
            a, b = np.full((rows, 576), 255, np.uint8), np.full((96, 576), value, np.int8)
            if (product(a, b) != 576 * 255 * value).any():
                return False
    return True


def threads() -> int:
    """Half the processors that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


@cache
def _library() -> ctypes.CDLL | None:
    # Elsewhere oneDNN 2.2 multiplies int8 in plain C++, which is slower than float32.
    spec = importlib.util.find_spec("mindspore") if platform.machine() == "x86_64" else None
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libdnnl.so.2"))
    except OSError:
        return None
    return library if hasattr(library, "dnnl_gemm_u8s8s32") and hasattr(library, "dnnl_sgemm") else None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads(), "onednn")


def _split(
    multiply: Callable[[NDArray[Any], NDArray[Any], NDArray[Any]], None],
    a: NDArray[Any],
    b: NDArray[Any],
    c: NDArray[Any],
) -> NDArray[Any]:
    """Fill `c` with `a b^T`, the rows of `b` in parts of their own where there are many."""
    if not c.size:
        return c
    parts = b.nbytes * max(1, len(a) // FEW_ROWS) // SPLIT_BYTES
    if parts < 2 or (parts := min(parts, threads())) < 2:
        multiply(a, b, c)
        return c
    bounds = np.linspace(0, len(b), parts + 1, dtype=np.int64).tolist()
    done = [_pool().submit(multiply, a, b[i:j], c[:, i:j]) for i, j in pairwise(bounds)]
    for future in done:
        future.result()
    return c


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"oneDNN's matrix product failed with status {status}")
